"""The keys that draw and choose: prompts of a model or near others, joint scorers, RIP, and which SFT rows are kept."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from statistics import fmean
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag

from mergekit_lite.answers.asked_model import AskedModel, Name
from mergekit_lite.answers.asking import PolicySampling
from mergekit_lite.answers.prompts import Prompts
from mergekit_lite.answers.tags import fields_of

Count = Annotated[int, Field(ge=1)]


class Choosing(BaseModel):
    """Keys that choose: unknown ones are errors."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Embedded(Choosing):
    """Keys that choose by embeddings."""

    model: str | None = None  # embeds prompts by the mean of its last hidden states: a folder or org/name
    column: str | None = None  # or the column with the embedding, a list of numbers, in all data
    max_length: Count = 512  # tokens of a prompt that the model reads
    batch_size: Count = 16
    device: str | None = None  # by default a GPU if the machine has one
    dtype: Literal["float32", "bfloat16", "float16"] | None = None

    def is_as(self, other: Embedded) -> bool:
        """Whether a model makes the same embeddings by these keys as by others."""
        same = (self.model, self.max_length, self.dtype) == (other.model, other.max_length, other.dtype)
        return self.model is not None and same


class Nearest(Embedded):
    """Keeps the prompts that are among the ``k`` nearest of any target prompt."""

    to: tuple[Prompts, ...]  # the target prompts
    k: Count
    distance: Literal["euclidean", "cosine"] = "euclidean"


class Distinct(Embedded):
    """Leaves out prompts that an earlier one is near to."""

    within: Annotated[float, Field(gt=0, le=4)] = 0.05  # squared distance of embeddings of length 1


class Systems(Choosing):
    """Asks each prompt under several system messages, each time as a prompt of its own."""

    texts: tuple[Annotated[str, Field(min_length=1)], ...] = ()  # of which each prompt has some, drawn by the seed
    column: str | None = None  # or the column with the prompt's own, a list of texts, of which it has the first
    each: Annotated[int, Field(ge=2)] = 3  # so many to a prompt


class Magpie(AskedModel):
    """Draws prompts from an aligned model: what it says in the place of the user's words."""

    name: Name = "magpie"  # of the files
    number: Count  # of draws, of which some are left out
    tokenizer: str | None = None  # a folder or org/name with the chat template of a served model; by default its name
    early_stopping: bool = True  # with the first line
    sampling: PolicySampling = PolicySampling()


class Drawn(Choosing):
    """Lines of a file that are drawn."""

    path: Path
    each: Count = 1  # so many for a request, with commas between


class Written(AskedModel):
    """Asks a model to write prompts, one by one."""

    name: Name = "written"  # of the files
    number: Count  # of requests, of which some replies are left out
    request: Annotated[str, Field(min_length=1)]  # with fields in braces: those of lists, and {prompt}, {reference}
    lists: dict[str, Drawn] = Field(default={})  # by field
    of: tuple[Prompts, ...] = ()  # given prompts, which the requests have in turn
    shots: Count = 1  # of them in a request
    sampling: PolicySampling = PolicySampling()

    @property
    def fields(self) -> frozenset[str]:
        """The fields of the request. Raises ValueError where its braces are no fields."""
        return frozenset(fields_of(self.request))


class ChosenPrompts(Prompts):
    """A source of prompts: data, of which some may be chosen, or a model; asked under several system messages."""

    magpie: Magpie | None = None  # instead of data
    written: Written | None = None  # instead of data
    distinct: Distinct | None = None
    nearest: Nearest | None = None  # of those that are distinct
    systems: Systems | None = None

    @property
    def chooses(self) -> bool:
        """Whether it is more than data that are read as they are."""
        return any(each is not None for each in (self.drawing, self.distinct, self.nearest, self.systems))

    @property
    def drawing(self) -> Magpie | Written | None:
        """The model that says the prompts; None where the data have them."""
        return self.magpie or self.written

    @property
    def called(self) -> str:
        """What it is called in messages."""
        if self.drawing is not None:
            return self.drawing.name
        return self.path.name if self.path else str(self.dataset)

    @property
    def embedding_columns(self) -> tuple[str, ...]:
        """The columns that have embeddings, each once."""
        columns = (keys.column for keys in (self.distinct, self.nearest) if keys is not None)
        return tuple(dict.fromkeys(column for column in columns if column is not None))


class Combined(Choosing):
    """Several scorers that rank together. Their scores are taken as they are, without bringing them to one scale."""

    mean: tuple[str, ...] = ()
    minimum: tuple[str, ...] = ()

    @property
    def names(self) -> tuple[str, ...]:
        """The scorers."""
        return self.mean or self.minimum

    def of(self, scores: Sequence[float]) -> float:
        """Return the one figure of their scores."""
        return fmean(scores) if self.mean else min(scores)


def _named(value: object) -> str | None:
    """Return which of ``UNNAMED`` a score is, so that what is wrong in a mapping shows there."""
    return UNNAMED[0] if isinstance(value, str) else UNNAMED[1] if isinstance(value, dict | Combined) else None


UNNAMED = ("(a name)", "(a mapping)")  # steps of pydantic's places of errors that are no keys of a recipe
Score = Annotated[
    Annotated[str, Tag(UNNAMED[0])] | Annotated[Combined, Tag(UNNAMED[1])],
    Discriminator(
        _named,
        custom_error_type="score_type",
        custom_error_message="the name of a scorer, or {mean: [NAME, NAME]}, or {minimum: …}",
    ),
]


class Rip(Choosing):
    """RIP's three thresholds, and what they select: pairs, or prompts by the sources' best and worst answer."""

    rejected_score: float | None = None
    rejected_length: float | None = None
    gap: float | None = None
    of: Literal["pairs", "prompts"] = "pairs"

    @property
    def thresholds(self) -> dict[str, float]:
        """Those that are given."""
        return self.model_dump(exclude={"of"}, exclude_none=True)


class SftRows(Choosing):
    """Which of a domain's SFT rows are kept, and in which order. Without any key all are, in that of the prompts."""

    by: Literal["score", "length", "difficulty"] = "score"  # of the answer; length: in characters
    least: float | None = None
    top: Count | None = None  # that many, from the highest
    student: str | None = None  # the source whose answers tell the difficulty: the answer's score minus their mean
    rising: bool = False  # from the lowest to the highest, over all domains

    @property
    def selects(self) -> bool:
        """Whether the rows are looked at."""
        return self.least is not None or self.top is not None or self.rising

    @property
    def needs_score(self) -> bool:
        """Whether it looks at scores."""
        return self.selects and self.by != "length"
