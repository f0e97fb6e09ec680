"""What a search has found, as the page shows it: the curve, the guards, the choice, and answers side by side.

All of it is read from the search's folder, which the command writes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import lru_cache
from pathlib import Path

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import read_rows
from mergekit_lite.boosting import curve, record, report
from mergekit_lite.boosting.candidates.candidate import ItemRow, Params
from mergekit_lite.boosting.search.choice import Result
from mergekit_lite.boosting.search.point import Point
from mergekit_lite.boosting.search.study import candidate_file
from mergekit_lite.boosting.summary import highest, verdict
from mergekit_lite.commands.app.planned import table
from mergekit_lite.commands.app.tabs.parts import refusal
from mergekit_lite.errors import MergekitLiteError, counted, shortened
from mergekit_lite.pages import drawing
from mergekit_lite.pages.html import Markup, element, plot

MOST_SHOWN = 4000  # characters of an answer
MOST_BESIDE = 6  # candidates


def figures_of(folder: Path) -> tuple[Path, int]:
    """Return the file with the figures of a search, and when it was written; of one without, a time of 0."""
    for name in (record.SO_FAR, record.ENDED):
        try:
            return folder / name, (folder / name).stat().st_mtime_ns
        except OSError:
            continue
    return folder / record.ENDED, 0


def result_of(folder: Path) -> Result | None:
    """Return what a search has found so far, or in the end; None before its baseline is measured.

    Raises:
        MergekitLiteError: its figures can't be read.
    """
    path, written = figures_of(folder)
    return _read(path, written) if written else None


@lru_cache(maxsize=4)
def _read(path: Path, written: int) -> Result:
    return record.read(path)


def found(folder: Path) -> Markup:
    """Return the verdict if there is one, the curve with the guards under it, and all figures as a table."""
    try:
        result = result_of(folder)
        if result is None:
            return Markup("")
        return element("div", *_found(result, ended=not (folder / record.SO_FAR).exists()))
    except MergekitLiteError as error:
        return refusal(str(error))


def _found(result: Result, ended: bool) -> Iterator[Markup]:
    if ended:
        first, *more = verdict(result)
        yield element("p", element("b", first), class_="sound" if result.chosen else "warning")
        yield element("ul", *(element("li", said) for said in more), class_="said")
    else:
        yield element("p", f"{counted(len(result.points), 'candidate')} so far; nothing is chosen yet.")
    drawing.check_drawable(None)
    drawn = drawing.svg(lambda figure: curve.draw(figure, result), curve.height(result), "Gain by candidate")
    sure = f"{100 * result.settings.confidence:g} %"
    base = result.called(result.baseline)
    yield plot(drawn, f"Gain over {base}, item by item, with {sure} intervals; below, the guards of the answers")
    heads, rows = report.candidates(result)
    yield table(heads, [[str(cell if isinstance(cell, str) else cell.text) for cell in row] for row in rows])


def in_part(folder: Path) -> str:
    """Return which candidates are being measured in the folder of a search, and how far; empty where none is."""
    ended = {candidate_file(folder, point.params, "partial.jsonl").name for point in _points(folder)}
    told = []
    for path in sorted(folder.glob("candidates/*.partial.jsonl")):
        if path.name in ended:  # what is missing of it was not wanted
            continue
        try:
            with path.open("rb") as file:
                rows = sum(chunk.count(b"\n") for chunk in iter(lambda: file.read(1 << 20), b""))
        except OSError:  # finished meanwhile
            continue
        told.append(f"{path.name.removesuffix('.partial.jsonl')} on {counted(rows, 'item')}")
    return f"In part measured: {'; '.join(told)}." if told else ""


def names_of(folder: Path) -> list[str]:
    """Return the names of the candidates whose answers can be looked at, the baseline first; of no search none."""
    return [point.name for point in _points(folder)]


def _points(folder: Path) -> list[Point]:
    """Return the baseline and the candidates that are in; none where figures can't be read, as the curve tells."""
    try:
        result = result_of(folder)
    except MergekitLiteError:
        return []
    return [] if result is None else [result.baseline, *result.points]


def _usual_names(result: Result) -> list[str]:
    """Return those that are looked at first: the baseline, and the chosen or the best one, or else the latest."""
    other = result.picked or highest(result) or (result.points[-1] if result.points else None)
    return [result.baseline.name, *([other.name] if other is not None else [])]


def beside(folder: Path, names: Sequence[str], number: int) -> Markup:
    """Return the answers of some candidates to one item, side by side; the items are in the order of the search.

    Args:
        folder: of the search.
        names: of candidates.
        number: of the item among those that the baseline has answered, from 1.
    """
    try:
        result = result_of(folder)
        if result is None:
            return refusal("There are no answers yet.")
        return _beside(folder, result, list(names)[:MOST_BESIDE] or _usual_names(result), number)
    except (MergekitLiteError, OSError) as error:
        return refusal(str(error))


def _beside(folder: Path, result: Result, names: Sequence[str], number: int) -> Markup:
    told = {row.row.get("item"): row.row for row in read_rows(folder / record.ITEMS, [])}
    items = [item for item in told if isinstance(item, str)]
    points = {point.name: point for point in (result.baseline, *result.points)}
    rows = {name: _rows(folder, points[name].params, items) for name in names if name in points}
    base = _rows(folder, result.baseline.params, items)
    answered = [item for item in items if "text" in base.get(item, {})]
    if not answered:
        return refusal("This search has no answers: its scores read texts that are given.")
    number = min(max(number, 1), len(answered))
    item = answered[number - 1]
    asked = told[item].get("asked")
    parts = [element("p", f"Item {number} of {len(answered):,}, in an order drawn by chance.", class_="soft")]
    if isinstance(asked, str):
        parts.append(_verbatim("asked", asked))
    columns = [_answer(result, name, own.get(item)) for name, own in rows.items()]
    return element("div", *parts, element("div", *columns, class_="beside"))


def _rows(folder: Path, params: Params, items: Sequence[str]) -> dict[str, ItemRow]:
    path = candidate_file(folder, params, "jsonl")
    rows = Ledger(path, items, lambda row: str(row["item"]), {"item": str, "values": dict}).rows()
    return {row["item"]: row for row in rows}  # type: ignore[misc]


def _answer(result: Result, name: str, row: ItemRow | None) -> Markup:
    if row is None:
        return _verbatim(name, "", "not measured on this item: dropped before it, or not yet there")
    return _verbatim(f"{name}{report.scored(result, row)}", row.get("text", ""))


def _verbatim(name: str, text: str, instead: str = "") -> Markup:
    said = element("pre", shortened(text, MOST_SHOWN), tabindex="0") if not instead else element("p", instead)
    return element("div", element("span", name, class_="soft"), said)
