"""A candidate: its params, its rows, its name; and the contract between search, study and evaluator."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Protocol, TypedDict

Params = Mapping[str, float]  # of a candidate: {"alpha": 0.3}, or several numbers of a recipe by their names


class ItemRow(TypedDict, total=False):
    """One item of one candidate: a line of its ledger."""

    item: str  # the id of a prompt, a preference pair or a text; ``ID#0``, ``ID#1`` … for several answers to one prompt
    values: dict[str, float | None]  # by score; higher is better, with the other sign where need be; None for no score
    text: str  # the answer, where the item asks for one
    finish: str  # ``stop`` where the model ended by itself, ``length`` where the limit cut it
    tokens: int  # of the answer
    log_prob: float  # of the answer under the candidate that gave it, summed over its tokens
    aligned_log_prob: float  # of the same answer under the baseline
    judged: float  # a judge's probability that the answer is better than the baseline's, from 0 to 1


class Evaluator(Protocol):
    """Measures candidates."""

    items: Sequence[str]

    def measure(self, params: Params, items: Sequence[str], wanted: frozenset[str]) -> Iterator[ItemRow]:
        """Yield the rows of the ``wanted`` items, in any order, as they are ready.

        ``items`` are all of them, in one order for the whole search: what works in batches cuts them from these,
        so that a row doesn't depend on what else is wanted. Calls for one candidate come one after the other.
        """

    def facts(self, params: Params) -> dict[str, Any]:
        """Return facts about the candidate measured last, such as its effective alpha, as JSON can hold them."""


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
