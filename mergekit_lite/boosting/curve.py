"""The picture of a search: the gain of each candidate with its interval, and the guards below."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lite.boosting.search.choice import Result
from mergekit_lite.boosting.search.point import Point
from mergekit_lite.boosting.summary import highest
from mergekit_lite.errors import shortened
from mergekit_lite.pages.drawing import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

GAIN_HEIGHT, GUARDS_HEIGHT = 3.4, 2.2  # inches
WIDE = 12  # the ratio of largest to smallest value from which an axis is logarithmic
MOST_PARAMS = 6  # panels
LONGEST = 30  # characters of a name
SHARES = ("truncated", "repetition", "identical", "unchanged")
FINE, DROPPED, BEYOND = COLOURS[0], "#8a8f98", COLOURS[1]
HELD_OUT, EQUAL = COLOURS[2], COLOURS[3]


def height(result: Result) -> float:
    """Return the height of the picture in inches."""
    names = _names(result)
    if len(names) == 1:
        return GAIN_HEIGHT + (GUARDS_HEIGHT if _guarded(result) else 0)
    return GAIN_HEIGHT + GUARDS_HEIGHT * math.ceil(len(names) / 2)


def draw(figure: FigureBase, result: Result) -> None:
    """Draw a search: for one parameter a curve and the guards; for several the trials in order, and each parameter."""
    names = _names(result)
    if len(names) == 1:
        _one(figure, result, names[0])
    else:
        _several(figure, result, names)


def _names(result: Result) -> list[str]:
    names = sorted({name for point in result.points for name in point.params}) or sorted(result.baseline.params)
    return names[:MOST_PARAMS]


def _one(figure: FigureBase, result: Result, name: str) -> None:
    points = sorted((result.baseline, *result.points), key=lambda point: point.params[name])
    xs = [point.params[name] for point in points]
    rows = 2 if _guarded(result) else 1
    panels = figure.subplots(rows, 1, squeeze=False, sharex=True, height_ratios=[GAIN_HEIGHT, GUARDS_HEIGHT][:rows])
    _gains(panels[0][0], result, points, xs)
    if rows == 2:
        _guards(panels[1][0], result, points, xs)
    for axes in panels[:, 0]:
        _spread(axes, xs)
        axes.grid(alpha=0.3)
    panels[-1][0].set_xlabel(name)


def _several(figure: FigureBase, result: Result, names: Sequence[str]) -> None:
    rows = 1 + math.ceil(len(names) / 2)
    heights = [GAIN_HEIGHT, *[GUARDS_HEIGHT] * (rows - 1)]
    top, *others = figure.subfigures(rows, 1, squeeze=False, height_ratios=heights)[:, 0]
    axes = top.subplots()
    order = list(range(1, len(result.points) + 1))
    _gains(axes, result, list(result.points), order)
    axes.set_xlabel("candidate, in the order they were tried")
    axes.grid(alpha=0.3)
    for row, part in enumerate(others):
        panels = part.subplots(1, 2, squeeze=False, sharey=True)[0]
        for axes, name in zip(panels, names[2 * row :], strict=False):
            _gains(axes, result, list(result.points), [point.params[name] for point in result.points], legend=False)
            axes.axvline(result.baseline.params[name], color="#8a8f98", linewidth=0.8, linestyle=":")
            axes.set_xlabel(name, parse_math=False)
            axes.grid(alpha=0.3)
        for axes in panels[len(names) - 2 * row :]:
            axes.set_visible(False)


def _gains(axes: Axes, result: Result, points: Sequence[Point], xs: Sequence[float], legend: bool = True) -> None:
    """Draw gains with intervals; a point far below the others is an arrow at the lower edge."""
    bottom, top = _window(result)
    kinds = {"measured on all items": FINE, "dropped early": DROPPED, "beyond a limit": BEYOND}
    shown = set()
    for point, x in zip(points, xs, strict=True):
        kind = "beyond a limit" if point.beyond else "dropped early" if point.dropped else "measured on all items"
        if point.params == result.baseline.params or not math.isfinite(point.gain.mean):
            continue
        label = None if kind in shown else kind
        shown.add(kind)
        if point.gain.mean < bottom:
            axes.plot(x, bottom, marker="v", color=kinds[kind], markersize=7, label=label, clip_on=False)
            axes.annotate(
                f"{point.gain.mean:.3g}", (x, bottom), (0, 8), textcoords="offset points", fontsize=7, ha="center"
            )
            continue
        ends = [[point.gain.mean - max(point.gain.low, bottom)], [min(point.gain.high, top) - point.gain.mean]]
        axes.errorbar(
            x,
            point.gain.mean,
            yerr=[[max(end[0], 0.0)] for end in ends],
            marker="x" if point.beyond else "o",
            color=kinds[kind],
            capsize=3,
            label=label,
            fillstyle="none" if point.dropped else "full",
        )
    fine = [(x, point.gain.mean) for point, x in zip(points, xs, strict=True) if point.allowed]
    if legend and len(_names(result)) == 1:
        axes.plot(*zip(*fine, strict=True), color=FINE, linewidth=1, alpha=0.5, zorder=0)
    _marked(axes, result, points, xs)
    axes.axhline(0, color="#8a8f98", linewidth=1)
    axes.set_ylim(bottom - 0.04 * (top - bottom), top)
    if legend:
        sure = f"{100 * result.settings.confidence:g} %"
        lower = ", lower is better" if result.settings.score in result.settings.minimised else ""
        axes.set_ylabel(f"gain over {shortened(result.called(result.baseline), LONGEST)}", parse_math=False)
        title = f"{shortened(result.settings.score, LONGEST)}{lower}; {sure} intervals"
        axes.set_title(title, fontsize=10, loc="left", parse_math=False)
        if result.points:
            # Above the axes, as points may lie everywhere within.
            axes.legend(fontsize=7, frameon=False, loc="lower right", bbox_to_anchor=(1.0, 1.0), ncols=2)


def _marked(axes: Axes, result: Result, points: Sequence[Point], xs: Sequence[float]) -> None:
    if result.picked is None:
        return
    place = xs[[point.params for point in points].index(result.picked.params)]
    chosen = "chosen" if result.chosen is not None else "preferred, not confirmed"
    label = f"{chosen}: {result.called(result.picked)}"
    axes.axvline(place, color=HELD_OUT, linewidth=5, alpha=0.2, label=label, zorder=0)
    effect = (result.held_out or result.picked).length
    for label, gain, colour, aside in (
        ("held out", result.held_out.gain if result.held_out else None, HELD_OUT, 7),
        ("at equal length", effect.at_equal_length if effect else None, EQUAL, 14),
    ):
        if gain is not None and math.isfinite(gain.low):
            ends = [[max(gain.mean - gain.low, 0.0)], [max(gain.high - gain.mean, 0.0)]]
            style: Any = {"marker": "D", "markersize": 5, "color": colour, "capsize": 3, "label": label}
            _aside(axes, axes.errorbar(place, gain.mean, yerr=ends, **style), aside)


def _aside(axes: Axes, bars: object, by: int) -> None:
    """Shift drawn bars to the right, ``by`` points, so that they don't hide others at the same place."""
    from matplotlib.transforms import ScaledTranslation

    figure = axes.get_figure(root=True)
    assert figure is not None
    shift = ScaledTranslation(by / 72, 0, figure.dpi_scale_trans)
    for artist in bars.get_children():  # type: ignore[attr-defined]
        artist.set_transform(artist.get_transform() + shift)


def _window(result: Result) -> tuple[float, float]:
    """Return the ends of the gains' axis: all intervals of whole measurements fit, and as much again below 0."""
    whole = [point.gain for point in (result.baseline, *result.points) if point.allowed]
    whole += [result.held_out.gain] if result.held_out else []
    highs = [gain.high for gain in whole if math.isfinite(gain.high)]
    lows = [gain.low for gain in whole if math.isfinite(gain.low)]
    others = [point.gain.mean for point in result.points if math.isfinite(point.gain.mean)]
    top = max([*highs, *others, 0.0])
    top = max(top, min(max([point.gain.high for point in result.points], default=0.0), 1.3 * top))
    low = min([*lows, 0.0])
    best = highest(result)
    deepest = low - max(top, (best.gain.high - best.gain.low) if best else 0.0)
    bottom = max(min([*others, low]), deepest)
    room = 0.08 * (top - bottom) or 1.0
    return bottom - room, top + room


def _guarded(result: Result) -> bool:
    return result.baseline.guards.answers > 0


def _guards(axes: Axes, result: Result, points: Sequence[Point], xs: Sequence[float]) -> None:
    for number, share in enumerate(SHARES):
        drawn = [
            (x, 100 * value)
            for point, x in zip(points, xs, strict=True)
            if (value := getattr(point.guards, share)) is not None
            and not (share == "unchanged" and point is result.baseline)
        ]
        if drawn:
            axes.plot(*zip(*drawn, strict=True), marker=".", linewidth=1, color=COLOURS[number + 1], label=share)
    axes.set_ylabel("share of answers (%)")
    axes.set_ylim(-4, 104)
    right = axes.twinx()
    growth = [(x, point.guards.growth) for point, x in zip(points, xs, strict=True) if point.guards.growth is not None]
    if growth:
        right.plot(*zip(*growth, strict=True), "--.", linewidth=1, color=COLOURS[0], label="length (right)")
    right.set_ylabel("length over the baseline's")
    right.set_ylim(0, 1.15 * max((value for _, value in growth), default=1.0))
    lines, labels = axes.get_legend_handles_labels()
    more, names = right.get_legend_handles_labels()
    # Above the axes: lines run everywhere within.
    place = {"bbox_to_anchor": (1.0, 1.0), "ncols": len(lines + more) or 1}
    axes.legend(lines + more, labels + names, loc="lower right", fontsize=7, frameon=False, **place)
    axes.set_title("Guards", fontsize=10, loc="left")


def _spread(axes: Axes, xs: Sequence[float]) -> None:
    """Make the axis logarithmic with a 0 where the values are of different orders of magnitude."""
    above = sorted(x for x in xs if x > 0)
    if not above or min(xs) < 0 or above[-1] / above[0] < WIDE:
        return
    axes.set_xscale("symlog", linthresh=above[0], linscale=0.5)
    axes.set_xlim(-0.3 * above[0], 1.3 * above[-1])
    ticks = [0.0, *above]
    spaced = [tick for place, tick in enumerate(ticks) if place == 0 or tick >= 1.25 * ticks[place - 1]]
    axes.set_xticks(spaced, [f"{tick:g}" for tick in spaced])
    axes.set_xticks([], minor=True)
