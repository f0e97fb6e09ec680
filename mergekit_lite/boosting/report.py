"""The report of a search: ``report.html`` and ``curve.png`` to look at, ``boost.json`` for machines."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from pathlib import Path

from mergekit_lite.answers.intervals import Interval
from mergekit_lite.answers.rows import write_text
from mergekit_lite.answers.traits import HEADS, Reasons
from mergekit_lite.boosting import curve, record
from mergekit_lite.boosting.candidates.candidate import ItemRow, label
from mergekit_lite.boosting.search.choice import Result
from mergekit_lite.boosting.search.guards import Guards
from mergekit_lite.boosting.search.point import Point, plain, why
from mergekit_lite.boosting.search.study import Study
from mergekit_lite.boosting.summary import CAN_NOT_TELL, highest, stability, verdict
from mergekit_lite.errors import counted, shortened
from mergekit_lite.pages import drawing
from mergekit_lite.pages.html import Cell, Markup, Text, document, element, plot, table

SAMPLES = 4  # items with answers side by side
SHOWN = 4000  # characters of an answer
PAGE = "report.html"


def write(result: Result, study: Study, about: Mapping[str, str], asked: Mapping[str, str]) -> Path:
    """Write the report into the study's folder.

    Args:
        result: the search's.
        study: with the answers.
        about: what was searched with, as text by name: models, scorers, search.
        asked: the question of each item, by item; for those that have one.

    Returns:
        The path of the page.

    Raises:
        UsageError: matplotlib is missing.
    """
    drawing.check_drawable(None)
    figure = drawing.new_figure(curve.height(result))
    curve.draw(figure, result)
    drawing.save(figure, study.folder / "curve.png")
    best = result.picked or highest(result)
    reasons = None if best is None else why(best.params, study.items, study, result.settings)
    whole = record.as_json(result, about) | {"reasons": plain(reasons)}
    page = study.folder / PAGE
    title = f"Boost: {label(result.chosen)}" if result.chosen is not None else "Boost: no candidate helps"
    write_text(page, document(title, _sections(result, study, about, asked, reasons)))
    record.write_ended(study.folder, whole)
    return page


def _sections(
    result: Result, study: Study, about: Mapping[str, str], asked: Mapping[str, str], reasons: Reasons | None
) -> Iterator[Markup]:
    answer, *more = verdict(result)
    yield element("h1", answer)
    if more:
        yield element("ul", *(element("li", said) for said in more))
    drawn = drawing.svg(lambda figure: curve.draw(figure, result), curve.height(result), "Gain by candidate")
    yield plot(drawn, "Gains over the baseline, item by item; arrows are candidates far below")
    yield element("h2", "What it can’t tell")
    yield element("ul", *(element("li", said) for said in CAN_NOT_TELL))
    yield element("h2", "Candidates")
    yield element("p", " ".join(_explained(result)), class_="soft")
    heads, rows = candidates(result)
    yield table("Candidates", heads, rows)
    yield element("h2", "How")
    settings = result.settings
    decides = f"{settings.score}: {settings.direction(settings.score)}"
    facts = {**about, "score that decides": decides, "baseline": label(settings.baseline)}
    facts["limits"] = ", ".join(f"{name} {value}" for name, value in _limits(result)) or "none"
    facts["held out from the search"] = _held_out(result)
    if result.stays:
        facts["how firm"] = stability(result)
    compared = max((point.guards.kl_answers for point in result.points), default=0)
    if compared:
        facts["KL"] = f"with its standard error, from the first {compared:,} answers of each candidate"
    facts["measuring took"] = f"{sum(point.seconds for point in (result.baseline, *result.points)):,.0f} s"
    yield element(
        "dl", *(element(kind, text) for pair in facts.items() for kind, text in zip(("dt", "dd"), pair, strict=True))
    )
    best = result.picked or highest(result)
    if best is not None and reasons is not None:
        yield element("h2", f"What goes with {result.called(best)} being better than the baseline")
        yield element("p", reasons.told, class_="soft")
        yield table("Traits", HEADS, [[trait, *(Cell(*cell) for cell in cells)] for trait, cells in reasons.table])
    yield from _samples(result, study, asked)


def _held_out(result: Result) -> str:
    total, apart = result.items + result.items_held_out, result.items_held_out
    if not apart:
        return f"none of {counted(total, 'item')}"
    unused = "" if result.held_out else "; not asked, as no candidate was preferred"
    return f"{apart:,} of {counted(total, 'item')}{unused}"


def _explained(result: Result) -> Iterator[str]:
    settings = result.settings
    base, sure = result.called(result.baseline), f"{100 * settings.confidence:g} %"
    yield f"Gains are paired differences to {base} with {sure} intervals."
    if compared := [name for name in (settings.score, *result.baseline.others) if name in settings.head_to_head]:
        yield f"{' and '.join(compared)}: each answer against that of {base}, head to head, in both orders."
    if minimised := [name for name in (settings.score, *result.baseline.others) if name in settings.minimised]:
        yield f"Of {' and '.join(minimised)} lower is better: there a gain is how much lower it became."


def _limits(result: Result) -> Iterator[tuple[str, str]]:
    for name, value in plain(result.settings.limits).items():
        if name == "loss":
            yield from ((f"loss of {scorer}", f"{limit:g}") for scorer, limit in value.items())
        elif value is not None:
            yield name, f"{value:g}"


def candidates(result: Result) -> tuple[list[str], list[list[Text]]]:
    """Return heads and rows of the table of candidates, without columns that are empty."""
    points = (result.baseline, *result.points, *([result.held_out] if result.held_out else []))
    scores = [result.settings.shown(result.settings.score, point.score).mean for point in points]
    rates, guards = [point.win_rates for point in points], [point.guards for point in points]
    shares = ("truncated", "ended", "repetition", "identical", "unchanged", "unscored")
    columns: list[tuple[str, list[Cell]]] = [
        ("score", [_number(score if math.isfinite(score) else None, ".4g") for score in scores]),
        ("gain", [_gain(None), *(_gain(point.gain) for point in points[1:])]),
        ("items", [Cell(f"{point.gain.items:,}", point.gain.items) for point in points]),
        *((name, [_gain(None), *(_gain(one.others[name]) for one in points[1:])]) for name in result.baseline.others),
        ("at equal length", [_gain(point.length and point.length.at_equal_length) for point in points]),
        ("win rate", [_percent(rate and rate.raw / 100) for rate in rates]),
        ("win rate at equal length", [_percent(rate and rate.at_equal_length / 100) for rate in rates]),
        ("length", [_number(one.length, ".0f") for one in guards]),
        ("growth", [_number(one.growth, ".2f") for one in guards]),
        *((name, [_percent(getattr(one, name)) for one in guards]) for name in shares),
        ("KL", [_kl(one) for one in guards]),
        ("KL a token", [_number(one.kl_per_token, ".2g") for one in guards]),
        ("effective alpha", [_number(point.facts.get("effective"), ".3g") for point in points]),
        ("seconds", [_number(point.seconds or None, ",.0f") for point in points]),
    ]
    shown = [(head, cells) for head, cells in columns if any(cell.text != "–" for cell in cells)]
    # Candidates of several numbers have long names, which wrap, and are called by their place in the order of trials.
    several = len(result.baseline.params) > 1
    called = [f"{place}: {point.name}" if several else point.name for place, point in enumerate(result.points, 1)]
    called += [f"{result.called(result.held_out)}, held out"] if result.held_out else []
    names = [name.replace(",", ", ") for name in (result.baseline.name, *called)]
    verdicts = [_state(result, point) for point in points]
    heads = ["candidate", "verdict", *(head for head, _ in shown)]
    return heads, [list(row) for row in zip(names, verdicts, *(cells for _, cells in shown), strict=True)]


def _state(result: Result, point: Point) -> str:
    if point.params == result.baseline.params:
        return "baseline"
    chosen = ["chosen"] if point.params == result.chosen else []
    return "; ".join([*chosen, *point.beyond, *([f"dropped: {point.dropped}"] if point.dropped else [])])


def _samples(result: Result, study: Study, asked: Mapping[str, str]) -> Iterator[Markup]:
    shown = {name: study.rows(params, study.items) for name, params in _sampled(result).items()}
    items = [item for item in study.items if all("text" in rows.get(item, {}) for rows in shown.values())][:SAMPLES]
    if not items:
        return
    yield element("h2", "Answers side by side")
    yield element("p", "The first items in an order drawn by chance; nobody chose them.", class_="soft")
    for number, item in enumerate(items, 1):
        yield element("h3", f"Item {number}")
        if item in asked:
            yield _verbatim("asked", asked[item])
        for name, rows in shown.items():
            yield _verbatim(f"{name}{scored(result, rows[item])}", rows[item]["text"])


def _sampled(result: Result) -> dict[str, Mapping[str, float]]:
    params = {f"{result.baseline.name}, the baseline": result.baseline.params}
    best = result.picked or highest(result)
    if best is not None:
        params[f"{best.name}, {'chosen' if result.chosen else 'the best of them'}"] = best.params
    bad = [point for point in result.points if not point.allowed]
    if bad:
        worst = min(bad, key=lambda point: point.gain.mean if math.isfinite(point.gain.mean) else -math.inf)
        params[f"{worst.name}, too much"] = worst.params
    return params


def scored(result: Result, row: ItemRow) -> str:
    """Return the scores of an answer as the end of its heading."""
    signs = {name: -1 if name in result.settings.minimised else 1 for name in row["values"]}
    values = [f"{name} {signs[name] * value:.4g}" for name, value in row["values"].items() if value is not None]
    cut = ["cut at the limit"] if row.get("finish") == "length" else []
    return ": " + ", ".join([*values, *cut]) if values or cut else ""


def _verbatim(name: str, text: str) -> Markup:
    return element(
        "div", element("span", name, class_="soft"), element("pre", shortened(text, SHOWN)), class_="verbatim"
    )


def _gain(of: Interval | None) -> Cell:
    if of is None or not math.isfinite(of.low):
        return Cell("–", None)
    return Cell(f"{of.mean:+.3g} ({of.low:+.3g} to {of.high:+.3g})", of.mean)


def _number(value: float | None, form: str) -> Cell:
    return Cell("–" if value is None else format(value, form), value)


def _kl(of: Guards) -> Cell:
    error = f" ± {of.kl_error:.2g}" if of.kl_error is not None else ""
    return Cell("–" if of.kl is None else f"{of.kl:.3g}{error}", of.kl)


def _percent(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{100 * value:.1f} %", value)
