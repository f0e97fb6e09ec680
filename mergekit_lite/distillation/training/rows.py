"""The rows of ``pairs/`` as tokens, and what became of each."""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import torch
from pydantic import BaseModel, ValidationError
from xxhash import xxh3_128

from mergekit_lite.answers.rows import Message, read_rows, seed_of
from mergekit_lite.answers.template import ChatTemplate, LengthLimits, TemplateError, Tokens, fitted
from mergekit_lite.errors import UsageError, counted, listing

Role = Literal["source", "target"]


class Turn(BaseModel):
    """A ``Message``, checked."""

    role: str
    content: str


class Response(BaseModel):
    """One of the chosen or rejected; what training doesn't need is passed over."""

    text: str
    role: Role
    win: float | None = None  # how probably it beats the others, for sppo


class SftRow(BaseModel):
    """A line of ``pairs/sft.jsonl``."""

    messages: list[Turn]
    response: str


class PreferenceRow(BaseModel):
    """A line of ``pairs/preference.jsonl``."""

    messages: list[Turn]
    chosen: list[Response]
    rejected: list[Response]


@dataclass(frozen=True)
class Row:
    """A prompt with its responses as tokens, four bytes each: the chosen ones, sources first, and last the rejected.

    A row of SFT has one response.

    Attributes:
        prompt: token ids.
        answers: token ids of each response.
        roles: of the responses.
        wins: of the responses, where all tell.
    """

    prompt: array[int]
    answers: tuple[array[int], ...]
    roles: tuple[Role, ...]
    wins: tuple[float, ...] | None = None

    @property
    def responses(self) -> tuple[Tokens, ...]:
        """Each with the prompt."""
        return tuple(Tokens(tuple(self.prompt), tuple(answer)) for answer in self.answers)

    @property
    def key(self) -> str:
        """A digest of all its tokens."""
        digest = xxh3_128()
        for ids in (self.prompt, *self.answers):
            digest.update(len(ids).to_bytes(8, "little") + ids.tobytes())
        return digest.hexdigest()

    @property
    def longest(self) -> int:
        """The tokens of the prompt and the longest response."""
        return len(self.prompt) + max(map(len, self.answers))


class Candidate(NamedTuple):
    """A row before it is known to fit."""

    responses: tuple[Tokens, ...]
    roles: tuple[Role, ...]
    wins: tuple[float, ...] | None = None


@dataclass
class Rows:
    """What a file of rows came to.

    Attributes:
        rows: those that are trained on, in the order of the file.
        counts: how many are ``kept`` (of them ``cut``), ``too long``, ``refused`` by the template, ``malformed``.
        problems: why, for the refused and the malformed, with file and line.
        notes: what else is worth telling.
    """

    rows: list[Row] = field(default_factory=list)
    counts: Counter[str] = field(default_factory=Counter)
    problems: list[str] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)


M = TypeVar("M", bound=BaseModel)
Reading = Callable[[Any, ChatTemplate], list[Candidate]]


def sft_rows(path: Path, template: ChatTemplate, limits: LengthLimits) -> Rows:
    """The rows of ``pairs/sft.jsonl``.

    Raises:
        UsageError: the file can't be read, or none of its rows can be trained on.
    """

    def reading(row: SftRow, template: ChatTemplate) -> list[Candidate]:
        return [Candidate((template.tokens(_talk(row.messages), row.response),), ("source",))]

    return _read(path, SftRow, reading, template, limits)


def preference_rows(path: Path, template: ChatTemplate, limits: LengthLimits) -> Rows:
    """The rows of ``pairs/preference.jsonl``. All have as many chosen responses.

    A row with several rejected responses becomes as many, one for each of them with all that are chosen; each counts
    like any other.

    Raises:
        UsageError: the file can't be read, none of its rows can be trained on, or their shapes differ.
    """

    def reading(row: PreferenceRow, template: ChatTemplate) -> list[Candidate]:
        if not row.chosen or not row.rejected:
            shape = f"{len(row.chosen)} chosen and {len(row.rejected)} rejected"
            raise TemplateError(f"expected one or more chosen responses, and one or more rejected, got {shape}")
        talk = _talk(row.messages)
        chosen = sorted(row.chosen, key=lambda response: response.role)  # source before target
        return [_candidate(talk, [*chosen, rejected], template) for rejected in row.rejected]

    found = _read(path, PreferenceRow, reading, template, limits)
    shapes = Counter(tuple(row.roles[:-1]) for row in found.rows)
    if len({len(shape) for shape in shapes}) > 1:
        listed = [f"{counted(number, 'row')} with {', '.join(shape)} chosen" for shape, number in shapes.items()]
        raise UsageError(listing(f"All rows of {path} must have as many chosen responses, got", listed))
    return found


def _candidate(talk: list[Message], responses: list[Response], template: ChatTemplate) -> Candidate:
    wins = tuple(response.win for response in responses if response.win is not None)
    return Candidate(
        tuple(template.tokens(talk, response.text) for response in responses),
        tuple(response.role for response in responses),
        wins if len(wins) == len(responses) else None,
    )


def _talk(turns: list[Turn]) -> list[Message]:
    return [Message(role=turn.role, content=turn.content) for turn in turns]


def _read(path: Path, model: type[M], reading: Reading, template: ChatTemplate, limits: LengthLimits) -> Rows:
    found = Rows(notes=[template.note] if template.note else [])
    for line in read_rows(path, found.problems):
        try:
            candidates = reading(model.model_validate(line.row), template)
        except ValidationError as error:
            why = "; ".join(f"{'.'.join(map(str, one['loc']))}: {one['msg']}" for one in error.errors())
            found.problems.append(f"{path}:{line.number}: {why}")
        except TemplateError as error:
            found.problems.append(f"{path}:{line.number}: {error}")
            found.counts["refused"] += 1
        else:
            for candidate in candidates:
                _take(found, candidate, limits)
    found.counts["malformed"] = len(found.problems) - found.counts["refused"]
    found.counts["kept"] = len(found.rows)
    if not found.rows:
        reasons = found.problems or [f"{counted(found.counts['too long'], 'row')} longer than max_length"]
        raise UsageError(listing(f"No row of {path} can be trained on", reasons))
    return found


def _take(found: Rows, row: Candidate, limits: LengthLimits) -> None:
    within = fitted(row.responses, limits)
    if within is None:
        found.counts["too long"] += 1
        return
    found.counts["cut"] += within.cut
    answers = tuple(array("i", tokens.response) for tokens in within.rows)
    found.rows.append(Row(array("i", within.rows[0].prompt), answers, row.roles, row.wins))


def order(rows: int, total: int, seed: int, stage: str) -> list[int]:
    """Which rows ``total`` places of training see: all of them in a new order again and again."""
    places: list[int] = []
    while len(places) < total:
        draws = torch.Generator().manual_seed(seed_of(seed, stage, len(places) // rows))
        places += torch.randperm(rows, generator=draws).tolist()
    return places[:total]


def told(counts: Counter[str]) -> str:
    """``120 rows (3 cut), left out: 2 too long``."""
    cut = f" ({counts['cut']:,} cut)" if counts["cut"] else ""
    left = [f"{counts[why]:,} {why}" for why in ("too long", "refused", "malformed") if counts[why]]
    return f"{counted(counts['kept'], 'row')}{cut}" + (f", left out: {', '.join(left)}" if left else "")
