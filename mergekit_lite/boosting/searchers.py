"""The search that a request asks for, once it is known what is tuned."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from mergekit_lite.boosting.candidates.family import Family, PairFamily, RunFamily
from mergekit_lite.boosting.search.choice import Searcher
from mergekit_lite.boosting.search.optuna_search import optuna_search
from mergekit_lite.boosting.search.point import Settings
from mergekit_lite.boosting.search.search import bracket, grid
from mergekit_lite.errors import UsageError, nearest

if TYPE_CHECKING:
    from mergekit_lite.boosting.request import Request

GRID = (0.1, 0.2, 0.3, 0.4, 0.5)  # of the paper, for finished models
GRID_POINTS = 5  # of other parameters


def can_bracket(family: Family) -> bool:
    """Return whether one number is tuned, of a pair or a run, so that a bracket can be searched."""
    return isinstance(family, PairFamily | RunFamily) and len(family.ranges) == 1


def searcher_of(request: Request, kind: str, family: Family, settings: Settings) -> Searcher:
    """Return what begins the search. Raises UsageError where it doesn't fit the tuned parameters."""
    if kind == "bracket":
        if not can_bracket(family):
            raise UsageError("The bracket searches a pair's alpha or a run's to_step. For others: grid, tpe or cmaes.")
        return _bracket(request, family)
    if kind == "grid":
        values = _grid(request.grid, family)
        return lambda same: grid(values)
    storage = request.storage or f"sqlite:///{(request.folder / 'study.db').absolute()}"
    return lambda same: optuna_search(
        family.ranges,
        settings,
        storage=storage,
        sampler=kind,
        trials=request.trials,
        seed=request.seed,
        at_once=request.at_once,
    )


def _bracket(request: Request, family: Family) -> Searcher:
    """Return the bracket. A step (1 + alpha)·last of a run is as far on its line as alpha is on a pair's."""
    ((name, of),) = family.ranges.items()
    origin, unit = (family.last, family.last) if isinstance(family, RunFamily) else (0.0, 1.0)
    most = (of.high - origin) / unit
    if most <= 0:
        raise UsageError(f"--tune {name}: {of.high:g} is not beyond the baseline, {origin:g}.")
    start, step, final = min(request.start, most), request.step, request.final_step
    return lambda same: bracket(name, start, step, final, most, same, origin, unit)


def _grid(given: Mapping[str, tuple[float, ...]], family: Family) -> dict[str, Sequence[float]]:
    unknown = [name for name in given if name not in family.ranges]
    if unknown:
        raise UsageError(f"--grid {unknown[0]}: is not tuned.{nearest(unknown[0], family.ranges)}")
    values: dict[str, Sequence[float]] = {}
    for name, of in family.ranges.items():
        width = (of.high - of.low) / (GRID_POINTS - 1)
        even = [float(f"{of.low + width * number:.6g}") for number in range(GRID_POINTS)]
        usual = GRID if name == "alpha" and isinstance(family, PairFamily) else even
        values[name] = given.get(name, usual)
        outside = [value for value in values[name] if not of.low <= value <= of.high]
        if outside:
            raise UsageError(f"--grid {name}: {outside[0]:g} is outside of its range {of.low:g}:{of.high:g}.")
    if math.prod(map(len, values.values())) > 1000:
        raise UsageError("The grid has more than 1,000 candidates: give fewer values, or take --search tpe.")
    return values
