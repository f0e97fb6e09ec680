"""The rows of ``pairs/`` as tokens, with counts of those that training leaves out."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from pydantic import BaseModel, ValidationError
from xxhash import xxh3_128

from mergekit_lite.answers.logprobs import Batch, padded
from mergekit_lite.answers.packing import Packed, packed
from mergekit_lite.answers.rows import Message, read_rows, seed_of
from mergekit_lite.answers.template import ChatTemplate, LengthLimits, TemplateError, Tokens, fitted
from mergekit_lite.errors import UsageError, counted, listing

Role = Literal["source", "target"]
# How the rows of a batch lie: padded to the longest, end to end, or so with prompts that responses share.
Layout = Literal["padded", "packed", "shared"]
JUDGMENT = "\n\nWrite an answer that deserves this judgment:\n"  # between a question and the judgment of an answer
LEFT_OUT = ("too long", "refused", "malformed", "not aligned", "not taught")  # why a row is


class Turn(BaseModel):
    """A ``Message``, validated."""

    role: str
    content: str


class OwnResponse(BaseModel):
    """The model's own response, for selm; keys that training doesn't need are ignored."""

    text: str
    cut: bool = False  # by the limit of tokens: no end of turn follows it


class Response(OwnResponse):
    """A chosen or rejected response."""

    role: Role
    win: float | None = None  # the probability that it beats the others, for sppo


class SftRow(BaseModel):
    """A line of ``pairs/sft.jsonl``."""

    messages: list[Turn]
    response: str
    cut: bool = False
    judgment: str | None = None  # of the response: what is wrong with it


class TaughtSftRow(SftRow):
    """A line of ``pairs/sft.jsonl`` with its domain, which says who teaches it."""

    domain: str = ""


class PreferenceRow(BaseModel):
    """A line of ``pairs/preference.jsonl``."""

    messages: list[Turn]
    chosen: list[Response]
    rejected: list[Response]
    own: OwnResponse | None = None


@dataclass(frozen=True)
class Part:
    """One teacher's part in a row.

    Attributes:
        teacher: its number among those of the training.
        student_groups: of each token of the response, the group that it lies in; −1 in none.
        teacher_groups: of each of the teacher's tokens, likewise.
        groups: their number.
        weight: of the teacher in this row, above 0.
        by_token: whether a group counts as often as it has tokens of the student, instead of once.
    """

    teacher: int
    student_groups: array[int]
    teacher_groups: array[int]
    groups: int
    weight: float
    by_token: bool = False

    @property
    def counts(self) -> np.ndarray[Any, Any]:
        """(G,); how often each group counts."""
        if not self.by_token:
            return np.ones(self.groups, np.int64)
        placed = np.frombuffer(self.student_groups, np.int32)
        return np.bincount(placed[placed >= 0], minlength=self.groups)


@dataclass(frozen=True)
class Lesson:
    """What teachers say of a row's response; their distributions stay in their files, under ``key``.

    Attributes:
        key: of the conversation and the response (``teaching/rows.py``).
        domain: of the prompt.
        ends: of each token of the response, the bytes of the text that are consumed with it (``alignment/spans.py``).
        parts: of the teachers that have a say.
    """

    key: str
    domain: str
    ends: array[int]
    parts: tuple[Part, ...] = ()

    @property
    def groups(self) -> float:
        """What the row counts in groups (or tokens), by the mean of its teachers under their weights."""
        total = sum(part.weight for part in self.parts)
        return sum(part.weight * int(part.counts.sum()) for part in self.parts) / total if total else 0.0


@dataclass(frozen=True)
class TrainingRow:
    """A prompt with its responses as tokens of four bytes: the chosen ones, sources' first, and the rejected one.

    The model's own response is last, for objectives that need it. A row of SFT has one response.
    """

    prompt: array[int]
    answers: tuple[array[int], ...]
    roles: tuple[Role, ...]  # of the answers
    wins: tuple[float, ...] | None = None  # of the chosen and rejected answers, if all have one
    lesson: Lesson | None = None  # where teachers teach it
    judged: array[int] | None = None  # the prompt with a judgment of the response, for CUT

    @property
    def responses(self) -> tuple[Tokens, ...]:
        """Each response with the prompt."""
        return tuple(Tokens(tuple(self.prompt), tuple(answer)) for answer in self.answers)

    @property
    def key(self) -> str:
        """A digest of all tokens."""
        digest = xxh3_128()
        for ids in (self.prompt, *self.answers):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()

    @property
    def longest(self) -> int:
        """The number of tokens of the prompt, the longer one of two, and the longest response."""
        return max(len(self.prompt), len(self.judged or ())) + max(map(len, self.answers))


class UnfittedRow(NamedTuple):
    """A row whose length is not checked yet."""

    responses: tuple[Tokens, ...]
    roles: tuple[Role, ...]
    wins: tuple[float, ...] | None = None
    lesson: Lesson | None = None
    judged: tuple[int, ...] | None = None  # see ``TrainingRow``


@dataclass
class TokenRows:
    """The rows of a file as tokens.

    ``counts`` has the numbers of rows ``kept`` (of them ``cut``), ``too long``, ``refused`` by the template,
    ``malformed``, and where teachers teach ``not aligned`` and ``not taught``.
    """

    rows: list[TrainingRow] = field(default_factory=list)  # to train on, in the order of the file
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)  # of refused and malformed rows, with file and line
    notes: list[str] = field(default_factory=list)  # warnings about the template

    def add(self, row: UnfittedRow, limits: LengthLimits) -> None:
        """Add a row if it is within the limits, or can be cut to them; else count it."""
        within = fitted(row.responses, limits)
        judged = None
        if within is not None and row.judged is not None:
            judged = fitted((Tokens(row.judged, within.rows[0].response),), limits)
            within = None if judged is None else within
        if within is None:
            self.counts["too long"] += 1
            return
        self.counts["cut"] += within.cut or (judged is not None and judged.cut)
        # The same answer in both contexts: as much of it as is left in both.
        answers = tuple(array("i", tokens.response) for tokens in (judged or within).rows)
        prompt, other = array("i", within.rows[0].prompt), judged and array("i", judged.rows[0].prompt)
        self.rows.append(TrainingRow(prompt, answers, row.roles, row.wins, row.lesson, other))

    @property
    def summary(self) -> str:
        """The counts in words: ``120 rows (3 cut), left out: 2 too long``."""
        cut = f" ({self.counts['cut']:,} cut)" if self.counts["cut"] else ""
        left = [f"{self.counts[why]:,} {why}" for why in LEFT_OUT if self.counts[why]]
        return f"{counted(self.counts['kept'], 'row')}{cut}" + (f", left out: {', '.join(left)}" if left else "")


Tokeniser = Callable[[dict[str, Any]], list[UnfittedRow]]  # of a row as it is in the file


def sft_rows(path: Path, template: ChatTemplate, limits: LengthLimits, judged: bool = False) -> TokenRows:
    """Return the rows of ``pairs/sft.jsonl`` as tokens. With ``judged``, those that have a judgment in two contexts.

    Raises:
        UsageError: the file can't be read, or none of its rows can be trained on, or none has a judgment.
    """

    def tokenise(line: dict[str, Any]) -> list[UnfittedRow]:
        row = SftRow.model_validate(line)
        messages = messages_of(row.messages)
        plain = template.tokens(messages, row.response, cut=row.cut)
        if not judged or row.judgment is None or not row.judgment.strip():
            return [UnfittedRow((plain,), ("source",))]
        question = Message(role=messages[-1]["role"], content=f"{messages[-1]['content']}{JUDGMENT}{row.judgment}")
        other = template.tokens([*messages[:-1], question], row.response, cut=row.cut)
        if other.response != plain.response:
            raise TemplateError("the answer has other tokens after the judgment than without it")
        return [UnfittedRow((plain,), ("source",), judged=other.prompt)]

    tokens = read(path, tokenise, template, limits)
    if judged and all(row.judged is None for row in tokens.rows):
        raise UsageError(f"train.sft.unlikelihood: no row of {path} has a 'judgment'. Give some, or leave the key out.")
    return tokens


def preference_rows(path: Path, template: ChatTemplate, limits: LengthLimits, own: bool = False) -> TokenRows:
    """Return the rows of ``pairs/preference.jsonl`` as tokens. All must have equally many chosen responses.

    A row with several rejected responses becomes as many rows, one for each of them with all chosen responses. With
    ``own`` the model's own response is in each, too, and a row without it is left out.

    Raises:
        UsageError: the file can't be read, none of its rows can be trained on, or their shapes differ.
    """

    def tokenise(line: dict[str, Any]) -> list[UnfittedRow]:
        row = PreferenceRow.model_validate(line)
        if not row.chosen or not row.rejected:
            shape = f"{len(row.chosen)} chosen and {len(row.rejected)} rejected"
            raise TemplateError(f"expected one or more chosen responses, and one or more rejected, got {shape}")
        if own and row.own is None:
            raise TemplateError("the objective needs the model's own answer, and the row has no 'own'")
        messages = messages_of(row.messages)
        chosen = sorted(row.chosen, key=lambda response: response.role)  # source before target
        last = row.own if own else None
        return [_unfitted(messages, [*chosen, rejected], last, template) for rejected in row.rejected]

    tokens = read(path, tokenise, template, limits)
    shapes = Counter(tuple(row.roles[: -2 if own else -1]) for row in tokens.rows)
    if len({len(shape) for shape in shapes}) > 1:
        listed = [f"{counted(number, 'row')} with {', '.join(shape)} chosen" for shape, number in shapes.items()]
        raise UsageError(listing(f"All rows of {path} must have as many chosen responses, got", listed))
    return tokens


def laid_out(rows: Sequence[TrainingRow], layout: Layout) -> Batch | Packed:
    """Return all responses of the first row, then of the next, in a layout."""
    if layout == "padded":
        return padded([response for row in rows for response in row.responses])
    return packed([row.responses for row in rows], share=layout == "shared")


def order(rows: int, total: int, seed: int, stage: str) -> list[int]:
    """Return the indices of the ``total`` rows that training sees: all rows in a new random order each epoch."""
    indices: list[int] = []
    while len(indices) < total:
        draws = torch.Generator().manual_seed(seed_of(seed, stage, len(indices) // rows))
        indices += torch.randperm(rows, generator=draws).tolist()
    return indices[:total]


def _unfitted(
    messages: list[Message], responses: Sequence[Response], own: OwnResponse | None, template: ChatTemplate
) -> UnfittedRow:
    wins = tuple(response.win for response in responses if response.win is not None)
    every = responses if own is None else (*responses, own)
    roles = tuple(response.role for response in responses)
    return UnfittedRow(
        tuple(template.tokens(messages, response.text, cut=response.cut) for response in every),
        roles if own is None else (*roles, "target"),
        wins if len(wins) == len(responses) else None,
    )


def messages_of(turns: Sequence[Turn]) -> list[Message]:
    """Return validated turns as messages."""
    return [Message(role=turn.role, content=turn.content) for turn in turns]


def malformed(error: ValidationError) -> str:
    """Return what is wrong with a row, key by key, in one line."""
    return "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())


def read(path: Path, tokenise: Tokeniser, template: ChatTemplate, limits: LengthLimits) -> TokenRows:
    """Return the rows of a file as tokens. What ``tokenise`` refuses by a TemplateError is left out and counted.

    Raises:
        UsageError: the file can't be read, or none of its rows can be trained on.
    """
    tokens = TokenRows()
    for line in read_rows(path, tokens.problems):
        try:
            unfitted = tokenise(line.row)
        except ValidationError as error:
            tokens.problems.append(f"{path}:{line.number}: {malformed(error)}")
        except TemplateError as error:
            tokens.problems.append(f"{path}:{line.number}: {error}")
            tokens.counts["refused"] += 1
        else:
            for row in unfitted:
                tokens.add(row, limits)
    tokens.notes = template.notes
    tokens.counts["malformed"] = len(tokens.problems) - tokens.counts["refused"]
    tokens.counts["kept"] = len(tokens.rows)
    if not tokens.rows:
        too_long = tokens.counts["too long"]
        reasons = tokens.problems or [
            f"{counted(too_long, 'row')} longer than max_length" if too_long else "it has none: see the stage `pair`"
        ]
        raise UsageError(listing(f"No row of {path} can be trained on", reasons))
    return tokens
