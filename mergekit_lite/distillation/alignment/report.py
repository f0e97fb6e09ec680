"""How two tokenizers meet: what share of the tokens has a counterpart, and how much of the vocabularies is the same."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lite.answers.loading import tokenizer_of
from mergekit_lite.answers.template import ChatTemplate, TemplateError
from mergekit_lite.distillation.alignment.groups import Groups, groups
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.alignment.spelling import spelling_of
from mergekit_lite.distillation.alignment.texts import Response, responses_of
from mergekit_lite.distillation.alignment.vocabulary import exact_map
from mergekit_lite.errors import UsageError, shortened

if TYPE_CHECKING:
    from array import array

    from transformers import PreTrainedTokenizerBase

KINDS = ("1:1", "1:n", "n:1", "n:m")  # tokens of the student to tokens of the teacher
NEEDS = "it needs the tokenizer alone: save it by transformers to a folder"


@dataclass
class Share:
    """Groups of one kind.

    Attributes:
        groups: how many there are.
        student: how many of the student's tokens are in them.
        teacher: how many of the teacher's.
    """

    groups: int = 0
    student: int = 0
    teacher: int = 0

    def add(self, groups: int, student: int, teacher: int) -> None:
        """Add what another text has."""
        self.groups, self.student, self.teacher = self.groups + groups, self.student + student, self.teacher + teacher


@dataclass(frozen=True)
class Side:
    """One of two tokenizers.

    Attributes:
        name: the model's.
        alphabet: how its tokens are written.
        tokens: of its vocabulary.
        shared: those of them whose bytes, or whose role, are a token of the other's, too.
        digits: of the longest token of digits alone.
        refused: how many texts have no ends of tokens, by reason.
    """

    name: str
    alphabet: str
    tokens: int
    shared: int
    digits: int
    refused: Counter[str] = field(default_factory=Counter)


@dataclass(frozen=True)
class AlignmentReport:
    """What aligning two tokenizers on some texts gives.

    Attributes:
        student: the first.
        teacher: the second.
        texts: how many there are.
        aligned: how many of them both have ends of tokens for.
        bytes: of these.
        shares: the groups by kind; ``alone``: tokens in no group, before the text or beyond where the other ends.
    """

    student: Side
    teacher: Side
    texts: int
    aligned: int
    bytes: int
    shares: dict[str, Share]

    def to_json(self) -> dict[str, Any]:
        """Return the report as plain data."""
        sides = {"student": self.student, "teacher": self.teacher}
        return {
            **{name: vars(side) | {"refused": dict(side.refused)} for name, side in sides.items()},
            "texts": self.texts,
            "aligned": self.aligned,
            "bytes": self.bytes,
            "groups": {kind: vars(share) for kind, share in self.shares.items()},
        }


def align(model: str, other: str, texts: Path | None = None) -> AlignmentReport:
    """Compare the tokenizers of two models, on a file of texts or on some of every kind.

    Args:
        model: a folder, or org/name on the hub; the student.
        other: likewise; the teacher.
        texts: .jsonl, .json or .parquet with rows as for training, or with a ``text``; .txt or .md: paragraphs.

    Raises:
        CheckpointError: a tokenizer can't be loaded.
        UsageError: the texts can't be read, or there are none.
    """
    if texts is not None and not texts.exists():  # before tokenizers are loaded
        raise UsageError(f"There is no file {texts}.")
    report = compared((model, tokenizer_of(model, NEEDS)), (other, tokenizer_of(other, NEEDS)), responses_of(texts))
    if not report.texts:
        raise UsageError(f"{texts} has no texts.")
    return report


Named = tuple[str, "PreTrainedTokenizerBase"]


def compared(student: Named, teacher: Named, responses: Iterable[Response]) -> AlignmentReport:
    """Compare two tokenizers, each with a name, on responses under their chat templates."""
    sides = _side(student, teacher), _side(teacher, student)
    templates = ChatTemplate(student[1]), ChatTemplate(teacher[1])
    shares = {kind: Share() for kind in (*KINDS, "alone")}
    texts = aligned = size = 0
    for response in responses:
        texts += 1
        ends = [_ends(template, response, side) for template, side in zip(templates, sides, strict=True)]
        if ends[0] is not None and ends[1] is not None:
            aligned, size = aligned + 1, size + len(response.text.encode())
            count(groups(*ends), shares)  # type: ignore[arg-type]
    return AlignmentReport(*sides, texts, aligned, size, shares)


def count(made: Groups, shares: dict[str, Share]) -> None:
    """Add the groups of a text to the shares of each kind."""
    student, teacher = (
        np.bincount(numbers[numbers >= 0], minlength=made.count) for numbers in (made.student, made.teacher)
    )
    kinds = 2 * (student > 1) + (teacher > 1)
    for number, kind in enumerate(KINDS):
        own = kinds == number
        shares[kind].add(int(own.sum()), int(student[own].sum()), int(teacher[own].sum()))
    shares["alone"].add(0, int((made.student < 0).sum()), int((made.teacher < 0).sum()))


def _ends(template: ChatTemplate, response: Response, side: Side) -> array[int] | None:
    try:
        tokens = template.tokens(response.messages, response.text, cut=response.cut)
    except TemplateError as error:
        side.refused[shortened(error, 160)] += 1
        return None
    return response_ends(template.tokenizer, tokens.response, response.text, reasons=side.refused)


def _side(named: Named, other: Named) -> Side:
    name, tokenizer = named
    spelling = spelling_of(tokenizer)
    found = exact_map(other[1], tokenizer).student_ids
    spelled = [spelling.readings(token) for token in range(spelling.rows)]
    digits = max((len(_digits(readings)) for readings in spelled), default=0)
    return Side(name, spelling.alphabet.value, len(tokenizer), int((found >= 0).sum()), digits)


def _digits(readings: Sequence[bytes]) -> bytes:
    """Return what is read without a blank, if that is digits alone."""
    bare = readings[-1].strip() if readings else b""
    return bare if bare.isdigit() else b""
