"""Exact match with the reference.

The whole answer, or what a regular expression finds in it, is compared with the whole reference; white space at the
ends doesn't count, nor does how much of it stands between words.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from pydantic import field_validator

from mergekit_lite.answers.scorers.scorer import Judged, Score
from mergekit_lite.answers.scorers.settings import Strict


class Options(Strict):
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


class Exact:
    """1 where the answer is the reference, 0 where it is not."""

    def __init__(self, name: str, options: Options):
        self.name = name
        self.pattern = re.compile(options.pattern) if options.pattern else None

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """A verdict for each; None where the prompt has no reference."""
        return [self._verdict(each) for each in judged]

    def _verdict(self, judged: Judged) -> Score:
        if judged.prompt.reference is None:
            return Score(None, "the prompt has no reference")
        found = judged.answer if self.pattern is None else self._found(judged.answer)
        if found is None:
            return Score(0.0, "the pattern isn't in the answer")
        return Score(float(found.split() == judged.prompt.reference.split()))

    def _found(self, answer: str) -> str | None:
        assert self.pattern is not None
        matches = list(self.pattern.finditer(answer))
        if not matches:
            return None
        return str(matches[-1].group(1) or "") if self.pattern.groups else matches[-1].group()
