"""One candidate with all its figures, computed from its rows and the baseline's."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, is_dataclass
from typing import Any

import numpy as np

from mergekit_lite.answers.intervals import Interval, difference, interval, paired
from mergekit_lite.answers.thoughts import parted
from mergekit_lite.answers.traits import Compared, Reasons, preferred, reasons
from mergekit_lite.boosting.candidates.candidate import ItemRow, Params, cluster_of, label
from mergekit_lite.boosting.search import guards as guarding
from mergekit_lite.boosting.search.guards import Guards, Limits
from mergekit_lite.boosting.search.length import (
    Judgements,
    LengthEffect,
    WinRates,
    at_equal_length,
    win_rates,
)
from mergekit_lite.boosting.search.study import Study


@dataclass(frozen=True)
class Settings:
    """The rules by which candidates are judged."""

    score: str  # the scorer that decides
    baseline: Params = field(default_factory=lambda: {"alpha": 0.0})  # the params that candidates must beat
    limits: Limits = field(default_factory=Limits)  # of candidates
    confidence: float = 0.95  # of all intervals
    held_out: float = 0.5  # the share of the items that takes no part in the search
    batch: int = 1  # clusters that are measured together; looks and the search's items are multiples of it
    minimised: tuple[str, ...] = ()  # the scores of which lower is better: their values have the other sign
    stop_early: bool = True  # drop candidates before all items are measured
    head_to_head: tuple[str, ...] = ()  # the scores that compare an answer with the baseline's

    def shown(self, name: str, of: Interval) -> Interval:
        """Return an interval of a score's values as the score itself has them."""
        return of.turned if name in self.minimised else of

    def direction(self, name: str) -> str:
        """Return which way a score is better, in words."""
        return "lower is better" if name in self.minimised else "higher is better"


@dataclass(frozen=True)
class Point:
    """A measured candidate."""

    params: Params
    score: Interval  # the mean of the deciding score's values; ``Settings.shown`` gives the score's own
    gain: Interval  # its paired difference to the baseline: positive is better
    others: Mapping[str, Interval]  # the paired differences of the other scores; positive is better
    guards: Guards  # figures of its answers
    beyond: tuple[str, ...]  # the limits it passes; empty where it is allowed
    dropped: str  # why it was not measured on all items; empty where it was
    length: LengthEffect | None  # the gain without the part that goes with length; None without answers
    win_rates: WinRates | None  # against the baseline; None without answers
    facts: Mapping[str, Any]  # from the evaluator, such as the effective alpha
    seconds: float  # of measuring

    @property
    def name(self) -> str:
        """The candidate's name, such as ``alpha=0.3``."""
        return label(self.params)

    @property
    def allowed(self) -> bool:
        """Whether it was measured on all items and is within all limits."""
        return not self.dropped and not self.beyond


def called(candidate: Point, tried: Sequence[str]) -> str:
    """Return how a candidate is called in sentences: by its name; one of several numbers by its place among ``tried``.

    ``tried`` are the names of all candidates but the baseline, in their order.
    """
    if len(candidate.params) == 1:
        return candidate.name
    return f"candidate {tried.index(candidate.name) + 1}" if candidate.name in tried else "the baseline"


def point(params: Params, items: Sequence[str], study: Study, settings: Settings, dropped: str = "") -> Point:
    """Compute all figures of a candidate from its rows of these items."""
    rows, base = study.rows(params, items), study.rows(settings.baseline, items)
    scorers = list(dict.fromkeys(name for row in rows.values() for name in row["values"]))
    gains = {name: difference(values(rows, name), values(base, name), settings.confidence) for name in scorers}
    lost = guarding.losses({name: gain.mean for name, gain in gains.items()}, settings.limits)
    own = [value for value in values(rows, settings.score).values() if value is not None]
    both = [item for item in rows if "text" in rows[item] and "text" in base.get(item, {})]
    answered = {item: rows[item] for item in both}, {item: base[item] for item in both}
    return Point(
        params=params,
        score=interval(own, settings.confidence),
        gain=gains.pop(settings.score, Interval(math.nan, -math.inf, math.inf, 0)),
        others=gains,
        guards=guarding.guards(rows, base, settings.score),
        beyond=(*beyond(params, items, study, settings), *lost),
        dropped=dropped,
        length=_length_effect(*answered, settings),
        win_rates=_win_rates(*answered, settings.score),
        **study.about(params),
    )


def beyond(params: Params, items: Sequence[str], study: Study, settings: Settings) -> list[str]:
    """Return a sentence for each limit of answers that a candidate passes on these items."""
    rows, base = study.rows(params, items), study.rows(settings.baseline, items)
    ours, theirs = (guarding.guards(each, base, settings.score) for each in (rows, base))
    return guarding.beyond(ours, theirs, settings.limits)


def plain(value: Any) -> Any:
    """Return a value of this package as JSON can hold it; numbers that are infinite or NaN become None."""
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {key: plain(inner) for key, inner in value.items()}
    if hasattr(value, "_asdict"):
        return plain(value._asdict())
    if is_dataclass(value):
        return {one.name: plain(getattr(value, one.name)) for one in fields(value)}
    return [plain(inner) for inner in value] if isinstance(value, list | tuple) else value


def values(rows: Mapping[str, ItemRow], score: str) -> dict[str, float | None]:
    """Return a scorer's value of each cluster: the mean over its items."""
    return cluster_means({item: row["values"].get(score) for item, row in rows.items()})


def cluster_means(figures: Mapping[str, float | None]) -> dict[str, float | None]:
    """Return the mean over the items of each cluster that have a figure; None where none has."""
    clusters: dict[str, list[float]] = {}
    for item, figure in figures.items():
        clusters.setdefault(cluster_of(item), []).extend([] if figure is None else [figure])
    return {name: sum(those) / len(those) if those else None for name, those in clusters.items()}


def _length(row: ItemRow) -> int:
    """Return the characters of an answer as scorers get it, without its thoughts."""
    return len(parted(row["text"]).answer)


def _length_effect(rows: Mapping[str, ItemRow], base: Mapping[str, ItemRow], settings: Settings) -> LengthEffect | None:
    longer = cluster_means({item: float(_length(row) - _length(base[item])) for item, row in rows.items()})
    ours, theirs = values(rows, settings.score), values(base, settings.score)
    scored = [name for name in longer if ours[name] is not None and theirs[name] is not None]
    gains = paired({name: ours[name] for name in scored}, theirs)
    return at_equal_length(gains, np.array([longer[name] for name in scored], dtype=np.float64), settings.confidence)


def _win_rates(rows: Mapping[str, ItemRow], base: Mapping[str, ItemRow], score: str) -> WinRates | None:
    """Compute win rates from which answer scores higher.

    A judge that compares it with the baseline's answer gives that ½ beside itself, so who wins has the higher score.
    """
    known = [
        (value, _length(row), _length(base[item]))
        for item, row in rows.items()
        if (value := _preferred(row, base[item], score)) is not None
    ]
    return win_rates(Judgements(*np.array(known, dtype=np.float64).T)) if known else None


def why(params: Params, items: Sequence[str], study: Study, settings: Settings) -> Reasons | None:
    """Return why a candidate's answers are preferred to the baseline's, or aren't; None for few answers."""
    rows, base = study.rows(params, items), study.rows(settings.baseline, items)
    return reasons(
        [
            Compared(row["text"], base[item]["text"], better)
            for item, row in rows.items()
            if "text" in row
            and "text" in base.get(item, {})
            and (better := _preferred(row, base[item], settings.score)) is not None
        ]
    )


def _preferred(ours: ItemRow, theirs: ItemRow, score: str) -> float | None:
    return preferred(ours["values"].get(score), theirs["values"].get(score))
