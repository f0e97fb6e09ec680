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
from mergekit_lite.distillation.training.rows import TaughtSftRow, malformed

IMPOSSIBLE = "a token of the response is impossible (log p is −∞)"
NO_NUMBER = "a log-probability is NaN: the teacher's weights or its dtype are to blame"
EMPTY = "the response is empty"
NO_PROMPT = "nothing comes before the response, so nothing predicts its first token"


class TextRow(NamedTuple):
    """A row as text: a conversation with the response to it."""

    key: str
    messages: tuple[Message, ...]
    response: str
    cut: bool


class Asked(NamedTuple):
    """A row in the teacher's tokens."""

    key: str
    tokens: Tokens
    ends: npt.NDArray[np.int32]

    def taught(self, said: Said, vocabulary: int) -> TaughtRow | str:
        """Return the row of the file, or why there is none: a token's log-probability is −∞ or NaN.

        Likely tokens that are none of the vocabulary's (rows of a wider head, of which a server's tokenizer knows
        nothing) are left to the tail.
        """
        if np.isnan(said.log_probs).any() or np.isnan(said.top_log_probs).any():
            return NO_NUMBER
        if not np.isfinite(said.log_probs).all():
            return IMPOSSIBLE
        tokens = np.array(self.tokens.response, np.int32)
        return TaughtRow(self.key, tokens, self.ends, said.log_probs, *_within(said, vocabulary))


def _within(said: Said, vocabulary: int) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Return the likeliest tokens and their log-probabilities, those of the vocabulary alone, −inf behind them."""
    ids, values = said.top_ids, said.top_log_probs
    beyond = ids >= vocabulary
    if beyond.any():
        order = np.argsort(beyond, axis=1, kind="stable")
        ids = np.take_along_axis(np.where(beyond, np.int32(0), ids), order, 1)
        values = np.take_along_axis(np.where(beyond, np.float32(-np.inf), values), order, 1)
    return ids[:, :vocabulary], values[:, :vocabulary]


def text_rows(path: Path, teacher: RecipeTeacher, problems: list[str]) -> Iterator[TextRow]:
    """Yield the rows of ``pairs/sft.jsonl`` that a teacher teaches; malformed ones become problems.

    Raises:
        UsageError: the file can't be read.
    """
    for line in read_rows(path, problems):
        try:
            row = TaughtSftRow.model_validate(line.row)
        except ValidationError as error:
            problems.append(f"{path}:{line.number}: {malformed(error)}")
            continue
        if not teacher.teaches(row.domain):
            continue
        messages = tuple(Message(role=turn.role, content=turn.content) for turn in row.messages)
        yield TextRow(row_key(messages, row.response, cut=row.cut), messages, row.response, row.cut)


@dataclass
class Reader:
    """Puts rows into a teacher's tokens. ``left`` counts why some can't be."""

    template: ChatTemplate
    system: str | None
    left: Counter[str] = field(default_factory=Counter)

    def read(self, row: TextRow) -> Asked | None:
        """Return a row in the teacher's tokens; None where it can't be put into them."""
        try:
            tokens = self.template.tokens(with_system(row.messages, self.system), row.response, cut=row.cut)
        except TemplateError as error:
            self.left[str(error)] += 1
            return None
        if not tokens.prompt:
            self.left[NO_PROMPT] += 1
            return None
        if not tokens.response:
            self.left[EMPTY] += 1
            return None
        ends = response_ends(self.template.tokenizer, tokens.response, row.response, reasons=self.left)
        return None if ends is None else Asked(row.key, tokens, np.array(ends, np.int32))
