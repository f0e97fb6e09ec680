"""All that is found of one candidate, from its rows and the baseline's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from mergekit_lite.answers.intervals import Interval, interval, paired
from mergekit_lite.boosting.candidates.candidate import Numbers, Row, label, subject
from mergekit_lite.boosting.search import guards as guarding
from mergekit_lite.boosting.search.guards import Guards, Limits
from mergekit_lite.boosting.search.length import (
    Judgements,
    LengthControlled,
    LengthEffect,
    at_equal_length,
    length_controlled,
)
from mergekit_lite.boosting.search.study import Study


@dataclass(frozen=True)
class Settings:
    """How candidates are judged.

    Attributes:
        score: the scorer that decides.
        baseline: what candidates must beat.
        confidence: of all intervals.
        held_out: the share of the items that takes no part in the search.
        batch: subjects that are measured together: looks, and where the search's items end, are multiples of this.
        stop_early: drop candidates before all items are measured.
    """

    score: str
    baseline: Numbers = field(default_factory=lambda: {"alpha": 0.0})
    limits: Limits = field(default_factory=Limits)
    confidence: float = 0.95
    held_out: float = 0.5
    batch: int = 1
    stop_early: bool = True


@dataclass(frozen=True)
class Point:
    """A candidate and all that was found.

    Attributes:
        score: the mean of the deciding score.
        gain: its paired difference to the baseline.
        others: the same for the other scorers.
        beyond: the limits it passes; empty where it is allowed.
        dropped: why it was not measured on all items; empty where it was.
        length: the gain with what goes with length taken out, where there are answers.
        controlled: win rates against the baseline, where there are answers.
        facts: what the bench tells, such as the effective alpha.
        seconds: of measuring.
    """

    numbers: Numbers
    score: Interval
    gain: Interval
    others: Mapping[str, Interval]
    guards: Guards
    beyond: tuple[str, ...]
    dropped: str
    length: LengthEffect | None
    controlled: LengthControlled | None
    facts: Mapping[str, Any]
    seconds: float

    @property
    def name(self) -> str:
        """``alpha=0.3``."""
        return label(self.numbers)

    @property
    def allowed(self) -> bool:
        """Measured on all items, and within all limits."""
        return not self.dropped and not self.beyond


def point(numbers: Numbers, items: Sequence[str], study: Study, settings: Settings, dropped: str = "") -> Point:
    """All figures of a candidate from its rows of these items."""
    rows, base = study.rows(numbers, items), study.rows(settings.baseline, items)
    scorers = list(dict.fromkeys(name for row in rows.values() for name in row["values"]))
    gains = {name: interval(paired(values(rows, name), values(base, name)), settings.confidence) for name in scorers}
    lost = guarding.losses({name: gain.mean for name, gain in gains.items()}, settings.limits)
    own = [value for value in values(rows, settings.score).values() if value is not None]
    return Point(
        numbers=numbers,
        score=interval(own, settings.confidence),
        gain=gains.pop(settings.score, Interval(math.nan, -math.inf, math.inf, 0)),
        others=gains,
        guards=guarding.guards(rows, base, settings.score),
        beyond=(*beyond(numbers, items, study, settings), *lost),
        dropped=dropped,
        length=_length_effect(rows, base, settings),
        controlled=_controlled(rows, base, settings.score),
        **study.about(numbers),
    )


def beyond(numbers: Numbers, items: Sequence[str], study: Study, settings: Settings) -> list[str]:
    """The limits of its answers that a candidate passes on these items."""
    rows, base = study.rows(numbers, items), study.rows(settings.baseline, items)
    found, theirs = (guarding.guards(each, base, settings.score) for each in (rows, base))
    return guarding.beyond(found, theirs, settings.limits)


def plain(found: Any) -> Any:
    """Anything of this package as JSON may hold it: no number is infinite or not a number, but null."""
    if isinstance(found, float):
        return found if math.isfinite(found) else None
    if isinstance(found, Mapping):
        return {key: plain(value) for key, value in found.items()}
    if hasattr(found, "_asdict"):
        return plain(found._asdict())
    if is_dataclass(found):
        return {one.name: plain(getattr(found, one.name)) for one in fields(found)}
    return [plain(value) for value in found] if isinstance(found, list | tuple) else found


def values(rows: Mapping[str, Row], score: str) -> dict[str, float | None]:
    """A scorer's verdict on each subject: the mean over its items."""
    return by_subject({item: row["values"].get(score) for item, row in rows.items()})


def by_subject(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    """Means over the items of each subject that have a figure; None where none has."""
    found: dict[str, list[float]] = {}
    for item, figure in figures.items():
        found.setdefault(subject(item), []).extend([] if figure is None else [figure])
    return {name: sum(those) / len(those) if those else None for name, those in found.items()}


def _length_effect(rows: Mapping[str, Row], base: Mapping[str, Row], settings: Settings) -> LengthEffect | None:
    both = [item for item in rows if "text" in rows[item] and "text" in base.get(item, {})]
    longer = by_subject({item: float(len(rows[item]["text"]) - len(base[item]["text"])) for item in both})
    ours, theirs = (values({item: each[item] for item in both}, settings.score) for each in (rows, base))
    told = [name for name in longer if ours[name] is not None and theirs[name] is not None]
    gains = paired({name: ours[name] for name in told}, theirs)
    return at_equal_length(gains, np.array([longer[name] for name in told], dtype=np.float64), settings.confidence)


def _controlled(rows: Mapping[str, Row], base: Mapping[str, Row], score: str) -> LengthControlled | None:
    """By a judge's comparisons where there are any, else by which of two answers scores higher."""
    both = [item for item in rows if "text" in rows[item] and "text" in base.get(item, {})]
    preferred = {item: _preferred(rows[item], base[item], score) for item in both}
    told = [(value, len(rows[i]["text"]), len(base[i]["text"])) for i, value in preferred.items() if value is not None]
    return length_controlled(Judgements(*np.array(told, dtype=np.float64).T)) if told else None


def _preferred(ours: Row, theirs: Row, score: str) -> float | None:
    """How sure our answer is the better one, from 0 to 1."""
    if "judged" in ours:
        return ours["judged"]
    a, b = ours["values"].get(score), theirs["values"].get(score)
    return None if a is None or b is None else (a > b) + (a == b) / 2
