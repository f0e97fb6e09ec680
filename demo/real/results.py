"""What was measured, from the files of the commands: rows of every alpha, and what rounding leaves."""

import json
from collections.abc import Callable, Sequence
from statistics import fmean
from typing import Any, NamedTuple

from demo.real.instructions import KINDS
from demo.real.plan import ASKED, DTYPES, Out
from mergekit_lite.answers.intervals import Interval, difference, interval

Row = dict[str, Any]


class Candidate(NamedTuple):
    """All rows of one alpha on one measurement, by item."""

    alpha: float  # -1 is the released model, 0 the trained one
    rows: dict[str, Row]

    def values(self, name: str) -> dict[str, float]:
        """Return a score of each item that has it."""
        found = {item: row["values"].get(name) for item, row in self.rows.items() if "values" in row}
        return {item: value for item, value in found.items() if value is not None}

    def mean(self, name: str) -> Interval:
        return interval(list(self.values(name).values()))

    def gain(self, over: "Candidate", name: str) -> Interval:
        """Return the mean difference of a score to that of another alpha, item by item; to its own it is 0."""
        if over is self:
            return Interval(0.0, 0.0, 0.0, len(self.values(name)))
        return difference(self.values(name), over.values(name))

    @property
    def answers(self) -> list[Row]:
        return [row for row in self.rows.values() if "text" in row]

    @property
    def characters(self) -> float:
        """The mean length of an answer."""
        return fmean(len(row["text"]) for row in self.answers)

    @property
    def cut(self) -> float:
        """The share of answers that the limit of tokens cut."""
        return fmean(row["finish"] == "length" for row in self.answers)

    def share(self, kind: str, name: str) -> float:
        """Return the mean score of one kind of instruction."""
        chosen = [value for item, value in self.values(name).items() if kind_of(item) == kind]
        return fmean(chosen) if chosen else float("nan")


def kind_of(item: str) -> str:
    """Return the kind of an instruction by its id."""
    slug = item.partition("-")[2].rpartition("-")[0]
    return next((kind for kind in KINDS if kind.replace(" ", "-").lower() == slug), "")


def candidates(out: Out, *names: str) -> list[Candidate]:
    """Return every alpha that some measurements have rows of, in ascending order."""
    found: dict[float, dict[str, Row]] = {}
    files = [path for name in names for path in out.figures(name).parent.glob("candidates/*.jsonl")]
    for path in sorted(files):
        alpha = float(path.name.removesuffix(".jsonl").removesuffix(".partial").removeprefix("alpha="))
        for line in path.read_text().splitlines():
            row = json.loads(line)
            found.setdefault(alpha, {})[row["item"]] = row
    return [Candidate(alpha, rows) for alpha, rows in sorted(found.items())]


def common(measured: Sequence[Candidate]) -> list[Candidate]:
    """Keep the items that every alpha has: after a stop some have more than others."""
    shared = set.intersection(*(set(each.rows) for each in measured))
    return [Candidate(each.alpha, {item: each.rows[item] for item in each.rows if item in shared}) for each in measured]


def at(alpha: float) -> Callable[[Sequence[Candidate]], Candidate]:
    """Return what finds an alpha among candidates."""
    return lambda measured: next(each for each in measured if each.alpha == alpha)


class Rounding(NamedTuple):
    """The size of the delta, and the alphas that written models have."""

    rms: float
    effective: dict[str, list[float]]  # by dtype, for each of ``ASKED``


def rounding(out: Out) -> Rounding:
    """Return what ``compare`` computed."""
    overall = json.loads(out.rounding.read_text())["overall"]
    tables = {dtype: [row[0] for row in table] for dtype, table in zip(DTYPES, overall["effective"], strict=True)}
    assert all(len(table) == len(ASKED) for table in tables.values())
    return Rounding(overall["rms"][0], tables)
