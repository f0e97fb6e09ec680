"""The figures of a search as a file: ``boost.json`` of one that has ended, ``so_far.json`` while it goes on.

Both are written for whoever looks at a search, and read back into its result. What was asked stands beside them, in the
order of the items (``items.jsonl``), so the folder of a search is enough to show it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from mergekit_lite._version import __version__
from mergekit_lite.answers.rows import as_line, write_lines, write_text
from mergekit_lite.boosting.candidates.candidate import Params
from mergekit_lite.boosting.search.choice import Result
from mergekit_lite.boosting.search.flips import Kept
from mergekit_lite.boosting.search.point import Point, Settings, plain
from mergekit_lite.boosting.summary import verdict
from mergekit_lite.errors import UnreadableError
from mergekit_lite.input_files import read_json

ENDED, SO_FAR, ITEMS = "boost.json", "so_far.json", "items.jsonl"
VERSION = 1
MISSING = {"mean": math.nan, "low": -math.inf, "high": math.inf}  # of an interval: what JSON has null for


def as_json(result: Result, about: Mapping[str, str]) -> dict[str, Any]:
    """Return all figures; those that are infinite or NaN are None."""
    return {
        "version": VERSION,
        "mergekit_lite": __version__,
        "chosen": plain(result.chosen),
        "verdict": verdict(result),
        "about": dict(about),
        "settings": plain(result.settings),
        "directions": {
            name: result.settings.direction(name) for name in (result.settings.score, *result.baseline.others)
        },
        "baseline": _figures(result, result.baseline),
        "candidates": [_figures(result, point) for point in result.points],
        "picked": plain(result.picked and result.picked.params),
        "held_out": result.held_out and _figures(result, result.held_out),
        "items": {"searched": result.items, "held_out": result.items_held_out},
        "stays": {f"{share:g}": kept._asdict() for share, kept in result.stays.items()},
        "broken": dict(result.broken),
    }


def write_so_far(folder: Path, result: Result, about: Mapping[str, str]) -> None:
    """Write what is known while the search goes on. Nothing is chosen yet, so there is no verdict."""
    _write(folder / SO_FAR, as_json(result, about) | {"verdict": []})


def write_ended(folder: Path, figures: Mapping[str, Any]) -> None:
    """Write the figures of a search that has ended, ``as_json`` and what else is known, in place of those so far."""
    _write(folder / ENDED, figures)
    (folder / SO_FAR).unlink(missing_ok=True)


def write_items(folder: Path, items: Sequence[str], asked: Mapping[str, str]) -> None:
    """Write the items in their order, each with its question if it has one."""
    path = folder / ITEMS
    if not path.exists():
        rows = ({"item": item, **({"asked": asked[item]} if item in asked else {})} for item in items)
        write_lines(path, (as_line(row).encode() for row in rows))


def read(path: Path) -> Result:
    """Read a result back from its figures: what was written by ``write_so_far`` or ``write_ended``.

    Raises:
        UnreadableError: the file can't be read, or doesn't hold such figures.
    """
    from pydantic import TypeAdapter

    content = _restored(read_json(path))
    try:
        settings = TypeAdapter(Settings).validate_python(content["settings"])
        baseline, *points = (_point(each, settings) for each in (content["baseline"], *content["candidates"]))
        return Result(
            settings,
            baseline,
            tuple(points),
            next((each for each in points if each.params == content["picked"]), None),
            content["held_out"] and _point(content["held_out"], settings),
            TypeAdapter(Params | None).validate_python(content["chosen"]),
            int(content["items"]["searched"]),
            int(content["items"]["held_out"]),
            TypeAdapter(Mapping[float, Kept]).validate_python(content["stays"]),
            TypeAdapter(Mapping[str, str]).validate_python(content["broken"]),
        )
    except (KeyError, TypeError, ValueError, AttributeError) as error:  # a ValidationError is a ValueError
        raise UnreadableError(path, f"does not hold the figures of a search ({type(error).__name__})") from error


def _figures(result: Result, point: Point) -> dict[str, Any]:
    """Return a candidate's figures: the score as it is, and gains of which positive is better."""
    settings, figures = result.settings, plain(point)
    return {"numbers": figures.pop("params"), **figures, "score": plain(settings.shown(settings.score, point.score))}


def _point(figures: Mapping[str, Any], settings: Settings) -> Point:
    """Return the point of some figures, its score with the sign that values have."""
    from pydantic import TypeAdapter

    fields = {name: value for name, value in figures.items() if name != "numbers"}
    point = TypeAdapter(Point).validate_python({**fields, "params": figures["numbers"]})
    return replace(point, score=settings.shown(settings.score, point.score))


def _restored(value: Any) -> Any:
    """Return JSON with the intervals' ends that it can't hold."""
    if isinstance(value, dict):
        inner = {key: _restored(each) for key, each in value.items()}
        if MISSING.keys() <= inner.keys():
            inner |= {key: end for key, end in MISSING.items() if inner[key] is None}
        return inner
    return [_restored(each) for each in value] if isinstance(value, list) else value


def _write(path: Path, figures: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(figures, indent=1, ensure_ascii=False, allow_nan=False) + "\n")
