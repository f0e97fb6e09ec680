"""Exact match with the reference.

The whole answer, or the last match of a regular expression in it, is compared with the whole reference. Neither white
space at the ends counts, nor its amount between words.
"""

from __future__ import annotations

import re

from pydantic import field_validator

from mergekit_lite.answers.scoring.scorer import Judged, Score, Scorer, ScorerOptions, ScorerSettings, scorer


class Options(ScorerOptions):
    """``pattern``: a regular expression; its last match counts, the first group of it where it has one."""

    pattern: str | None = None

    @field_validator("pattern")
    @classmethod
    def _compiles(cls, pattern: str | None) -> str | None:
        try:
            re.compile(pattern or "")
        except re.error as error:
            raise ValueError(f"not a regular expression: {error}") from error
        return pattern


@scorer("exact")
class Exact(Scorer):
    """1 where the answer is the reference, 0 where it is not; no score where the prompt has no reference."""

    def __init__(self, settings: ScorerSettings, options: Options):
        self.name = settings.name
        self.pattern = re.compile(options.pattern) if options.pattern else None

    def score_one(self, judged: Judged) -> Score:
        """Return the score of an answer."""
        if judged.prompt.reference is None:
            return Score(None, "the prompt has no reference")
        compared = judged.answer if self.pattern is None else _last_match(self.pattern, judged.answer)
        if compared is None:
            return Score(0.0, "the pattern isn't in the answer")
        return Score(float(compared.split() == judged.prompt.reference.split()))


def _last_match(pattern: re.Pattern[str], answer: str) -> str | None:
    matches = list(pattern.finditer(answer))
    if not matches:
        return None
    return str(matches[-1].group(1) or "") if pattern.groups else matches[-1].group()
