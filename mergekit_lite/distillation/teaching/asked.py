"""The rows that a teacher is asked about: those of SFT, in its own tokens."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from pydantic import ValidationError

from mergekit_lite.answers.rows import Message, read_rows, with_system
from mergekit_lite.answers.template import ChatTemplate, TemplateError, Tokens
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.recipe.schema import RecipeTeacher
from mergekit_lite.distillation.teaching.rows import TaughtRow, row_key
from mergekit_lite.distillation.teaching.scoring import Said
from mergekit_lite.distillation.training.rows import SftRow

IMPOSSIBLE = "a token of the response is impossible (log p is −∞)"
NO_PROMPT = "nothing comes before the response, so nothing predicts its first token"


class Lesson(NamedTuple):
    """A conversation with the response to it."""

    key: str
    messages: tuple[Message, ...]
    response: str
    cut: bool


class Asked(NamedTuple):
    """A row in the teacher's tokens."""

    key: str
    tokens: Tokens
    ends: npt.NDArray[np.int32]

    def taught(self, said: Said) -> TaughtRow | None:
        """Return the row of the file; None where a token of the response is impossible."""
        if not np.isfinite(said.log_probs).all():
            return None
        return TaughtRow(self.key, np.array(self.tokens.response, np.int32), self.ends, *said)


class TaughtSftRow(SftRow):
    """A line of ``pairs/sft.jsonl`` with its domain, which says who teaches it."""

    domain: str = ""


def lessons(path: Path, teacher: RecipeTeacher, problems: list[str]) -> Iterator[Lesson]:
    """Yield the rows of ``pairs/sft.jsonl`` that a teacher teaches; malformed ones become problems.

    Raises:
        UsageError: the file can't be read.
    """
    for line in read_rows(path, problems):
        try:
            row = TaughtSftRow.model_validate(line.row)
        except ValidationError as error:
            why = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            problems.append(f"{path}:{line.number}: {why}")
            continue
        if not teacher.teaches(row.domain):
            continue
        messages = tuple(Message(role=turn.role, content=turn.content) for turn in row.messages)
        yield Lesson(row_key(messages, row.response, cut=row.cut), messages, row.response, row.cut)


@dataclass
class Reader:
    """Puts rows into a teacher's tokens. ``left`` counts why some can't be."""

    template: ChatTemplate
    system: str | None
    left: Counter[str] = field(default_factory=Counter)

    def read(self, lesson: Lesson) -> Asked | None:
        """Return a row in the teacher's tokens; None where it can't be put into them."""
        try:
            tokens = self.template.tokens(with_system(lesson.messages, self.system), lesson.response, cut=lesson.cut)
        except TemplateError as error:
            self.left[str(error)] += 1
            return None
        if not tokens.prompt:
            self.left[NO_PROMPT] += 1
            return None
        ends = response_ends(self.template.tokenizer, tokens.response, lesson.response, reasons=self.left)
        return None if ends is None else Asked(lesson.key, tokens, np.array(ends, np.int32))
