"""A candidate: its params, its rows, its name; and the contract between search, study, evaluator and team."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypedDict

Rivals = Mapping[str, str]  # answers of the baseline, by item
NONE: Rivals = {}
Params = Mapping[str, float]  # of a candidate: {"alpha": 0.3}, or several numbers of a recipe by their names


class ItemRow(TypedDict, total=False):
    """One item of one candidate: a line of its ledger."""

    item: str  # the id of a prompt, a preference pair or a text; ``ID#0``, ``ID#1`` … for several answers to one prompt
    values: dict[str, float | None]  # by score; higher is better, with the other sign where need be; None for no score
    text: str  # the answer with its thoughts, where the item asks for one
    finish: str  # ``stop`` where the model ended by itself, ``length`` where the limit cut it
    tokens: int  # of the answer
    log_prob: float  # of the answer under the candidate that gave it, summed over its tokens
    aligned_log_prob: float  # of the same answer under the baseline


class Evaluator(Protocol):
    """Measures candidates."""

    items: Sequence[str]

    def measure(
        self, params: Params, items: Sequence[str], wanted: frozenset[str], rivals: Rivals = NONE
    ) -> Iterator[ItemRow]:
        """Yield the rows of the ``wanted`` items, in any order, as they are ready; ``rivals`` as of ``Job``.

        ``items`` are all of them, in one order for the whole search: what works in batches cuts them from these,
        so that a row doesn't depend on what else is wanted. Calls for one candidate come one after the other.
        """

    def facts(self, params: Params) -> dict[str, Any]:
        """Return facts about the candidate measured last, such as its effective alpha, as JSON can hold them."""

    def portions(self, items: Sequence[str]) -> list[list[str]]:
        """Cut all items, in their common order, into what is best measured at once."""


class Job(NamedTuple):
    """What a worker measures at once."""

    params: Params  # of a candidate
    wanted: frozenset[str]  # items, of one portion
    rivals: Rivals = NONE  # the baseline's answers to these items, where a score compares with them


class Piece(NamedTuple):
    """What a worker sends of a job, as it comes."""

    rows: Sequence[ItemRow] = ()
    facts: Mapping[str, Any] | None = None  # as of ``Evaluator.facts``, with the first rows and at the end
    seconds: float = 0.0  # that the job took, at its end
    ended: bool = False  # nothing comes after it
    lost: bool = False  # the worker died: what is missing has to be measured again


class Seat(NamedTuple):
    """A worker's place in its team."""

    number: int = 0
    of: int = 1  # workers


ONLY = Seat()


class Team(Protocol):
    """Workers, each with an evaluator of its own, that measure side by side."""

    @property
    def size(self) -> int:
        """The number of workers, which are called 0, 1 and so on."""

    @property
    def workers(self) -> Sequence[int]:
        """Those that can be given jobs, or have one. Raises RunError where there is none."""

    def give(self, worker: int, job: Job) -> None:
        """Give a job to a worker that has none."""

    def next(self) -> tuple[int, Piece]:
        """Wait for a worker that has a job, and return what it sends. Raises what a job raised."""


@dataclass
class Alone:
    """A team of one: this process."""

    evaluator: Evaluator
    items: Sequence[str]  # all, in their common order
    size: int = field(default=1, init=False)
    workers: Sequence[int] = field(default=(0,), init=False)
    _pieces: Iterator[Piece] = field(init=False)

    def give(self, worker: int, job: Job) -> None:
        """Begin a job."""
        self._pieces = pieces(self.evaluator, self.items, job)

    def next(self) -> tuple[int, Piece]:
        """Go on with it."""
        return 0, next(self._pieces)


def pieces(evaluator: Evaluator, items: Sequence[str], job: Job) -> Iterator[Piece]:
    """Do a job and yield its rows one by one, then an end."""
    started, first = time.monotonic(), True
    with closing(evaluator.measure(job.params, items, job.wanted, job.rivals)) as rows:  # type: ignore[type-var]
        for row in rows:
            yield Piece([row], evaluator.facts(job.params) if first else None)
            first = False
    yield Piece(facts=evaluator.facts(job.params), seconds=time.monotonic() - started, ended=True)


def cluster_of(item: str) -> str:
    """Return the cluster of an item, its prompt. Answers to one prompt are dependent, so they count as one."""
    before, mark, number = item.rpartition("#")
    return before if mark and number.isdecimal() else item


def label(params: Params) -> str:
    """Return a candidate's name: ``alpha=0.3``, ``a=1,b=0.5``. Equal params have the same name."""
    return ",".join(f"{name}={_plain(params[name])}" for name in sorted(params))


def _plain(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))
