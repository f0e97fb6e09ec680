"""What is searched, and what is known of it: the contract between search, study and what measures models."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict

Numbers = Mapping[str, float]  # what makes a candidate: {"alpha": 0.3}, or several numbers of a recipe by their names


class Row(TypedDict, total=False):
    """One item of one candidate: a line of its ledger.

    Attributes:
        item: the id of a prompt, a preference pair or a text; ``ID#0``, ``ID#1`` … for several answers to one prompt.
        values: by scorer, higher is better; None where no verdict can be given.
        text: the answer, where the item asks for one.
        finish: ``stop`` where the model ended by itself, ``length`` where the limit cut it.
        tokens: of the answer.
        log_prob: of the answer under the candidate that gave it, summed over its tokens.
        aligned_log_prob: of the same answer under the baseline.
        judged: a judge's probability that the answer is better than the baseline's, from 0 to 1.
    """

    item: str
    values: dict[str, float | None]
    text: str
    finish: str
    tokens: int
    log_prob: float
    aligned_log_prob: float
    judged: float


class Bench(Protocol):
    """Measures candidates."""

    items: Sequence[str]

    def measure(self, numbers: Numbers, items: Sequence[str], wanted: frozenset[str]) -> Iterator[Row]:
        """The rows of the ``wanted`` items, in any order, as they are ready.

        ``items`` are all of them, in one order for the whole search: what works in batches cuts them from these,
        so that a row doesn't depend on what else is wanted. Calls for one candidate come one after the other.
        """

    def facts(self, numbers: Numbers) -> dict[str, Any]:
        """What else is told of the candidate that was measured last, such as its effective alpha. JSON."""


def subject(item: str) -> str:
    """What the item is about. Answers to one prompt are no independent evidence: they are counted as one."""
    before, mark, number = item.rpartition("#")
    return before if mark and number.isdecimal() else item


def label(numbers: Numbers) -> str:
    """A candidate's name: ``alpha=0.3``, ``a=1,b=0.5``. The same numbers have the same name."""
    return ",".join(f"{name}={_plain(numbers[name])}" for name in sorted(numbers))


def _plain(number: float) -> str:
    short = f"{number:g}"
    return short if float(short) == number else repr(float(number))
