"""Pictures of a distillation: how training went, and what came of it on held-out prompts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergekit_lite.answers.intervals import Interval
from mergekit_lite.answers.rows import read_rows
from mergekit_lite.distillation.held_out import LENGTH, MODELS, Comparison
from mergekit_lite.errors import shortened
from mergekit_lite.pages.drawing import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

MANY = 60  # points from which a running mean is drawn over them
PANEL_HEIGHT = 2.1  # inches
COLOUR_OF = {"source": COLOURS[0], "target": COLOURS[2], "rejected": COLOURS[1]}

Log = Sequence[Mapping[str, float]]


class Panel(NamedTuple):
    """Figures of the log that share an axis."""

    title: str
    unit: str
    lines: Mapping[str, str]  # column of the log: label


PANELS = {
    "sft": (
        Panel("Loss", "nats a token", {"loss": ""}),
        Panel("Learning rate", "a step", {"learning_rate": ""}),
        Panel("Norm of the gradient", "norm", {"grad_norm": ""}),
        Panel("Length of the responses", "tokens", {"length/response": ""}),
    ),
    "preference": (
        Panel(
            "Rewards",
            "reward",
            {"rewards/source": "source, chosen", "rewards/target": "target, chosen", "rewards/rejected": "rejected"},
        ),
        Panel("Margin of chosen over rejected", "reward", {"margin": ""}),
        Panel(
            "Accuracy: chosen above rejected",
            "share of rows",
            {"accuracy": "all chosen", "accuracy/source": "source", "accuracy/target": "target"},
        ),
        Panel("Loss", "mean of the rows", {"loss": ""}),
        Panel("KL to the reference, estimate", "nats a response", {"kl": ""}),
        Panel("Weight of the sources' answer, α", "share", {"alpha": ""}),
        Panel(
            "Length of the responses",
            "tokens",
            {"length/source": "source", "length/target": "target", "length/rejected": "rejected"},
        ),
        Panel("Learning rate", "a step", {"learning_rate": ""}),
    ),
}


@dataclass(frozen=True)
class Picture:
    """A picture that can be drawn as PNG and into the page.

    Attributes:
        name: of its file.
        title: what it shows.
        height: in inches.
        draw: onto a figure.
    """

    name: str
    title: str
    height: float
    draw: Callable[[FigureBase], None]


def read_log(path: Path) -> Log:
    """The rows of a training log by step; of a step that a resumed run logged again the later one."""
    if not path.exists():
        return []
    rows = {line.row["step"]: line.row for line in read_rows(path, []) if "step" in line.row}
    return [rows[step] for step in sorted(rows)]


def training(stage: str, log: Log) -> Picture | None:
    """How one stage of training went: a panel for whatever the log has. None where it has nothing."""
    there = [panel for panel in PANELS[stage] if any(key in row for row in log for key in panel.lines)]
    if not there:
        return None

    def draw(figure: FigureBase) -> None:
        columns = min(2, len(there))
        grid = figure.subplots(-(-len(there) // columns), columns, squeeze=False)
        for axes, panel in zip(grid.flat, there, strict=False):
            _panel(axes, panel, log)
        for axes in list(grid.flat)[len(there) :]:
            axes.set_visible(False)

    title = {"sft": "Supervised fine-tuning", "preference": "Preference training"}[stage]
    return Picture(f"{stage}.png", title, PANEL_HEIGHT * -(-len(there) // 2), draw)


def _panel(axes: Axes, panel: Panel, log: Log) -> None:
    drawn = {key: label for key, label in panel.lines.items() if any(key in row for row in log)}
    for number, (key, label) in enumerate(drawn.items()):
        points = [(row["step"], row[key]) for row in log if key in row and math.isfinite(row[key])]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        colour = COLOUR_OF.get(key.partition("/")[2], "#7f7f7f" if len(drawn) > 1 else COLOURS[number])
        if len(values) > MANY:
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
            steps, values = _smooth(steps, values, len(values) // 20)
        marker = "o" if len(values) == 1 else ""
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, label=label)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("optimiser step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if len(drawn) > 1:
        axes.legend(fontsize=7, frameon=False)


def _smooth(steps: np.ndarray[Any, Any], values: np.ndarray[Any, Any], width: int) -> tuple[Any, Any]:
    """Running means, of steps as of values, so that a point is where what it stands for is."""
    kernel = np.ones(width) / width
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


def held_out(comparison: Comparison) -> Picture:
    """Means of all models and their paired differences, with 95 % intervals, a row for each scorer and for length."""
    figures = [*comparison.scorers, LENGTH]

    def draw(figure: FigureBase) -> None:
        grid = figure.subplots(len(figures), 2, squeeze=False)
        for row, name in zip(grid, figures, strict=True):
            models = [model for model in MODELS if model in comparison.answered]
            means = {str(model): comparison.mean(model, name) for model in models}
            _intervals(row[0], means, COLOURS)
            row[0].set_title(f"{shortened(name, 24)}: mean", fontsize=10, parse_math=False)
            of = {f"{one.after} − {one.before}": one.of for one in comparison.differences if one.figure == name}
            _intervals(row[1], of, ("#404040",) * len(of))
            row[1].axvline(0, color="#7f7f7f", linewidth=1, linestyle="--")
            row[1].set_title("difference on the same prompts", fontsize=10)
            for axes in row:
                axes.set_xlabel("characters" if name == LENGTH else "score", fontsize=8)

    return Picture("held-out.png", "Held-out prompts, with 95 % intervals", 0.4 + 1.65 * len(figures), draw)


def _intervals(axes: Axes, named: Mapping[str, Interval], colours: Sequence[str]) -> None:
    for place, (of, colour) in enumerate(zip(named.values(), colours, strict=False)):
        if not math.isfinite(of.mean):
            continue
        ends = [[of.mean - of.low], [of.high - of.mean]] if math.isfinite(of.low) else None
        axes.errorbar([of.mean], [place], xerr=ends, fmt="o", color=colour, capsize=3, markersize=5)
    axes.set_yticks(range(len(named)), list(named), fontsize=8)
    axes.set_ylim(len(named) - 0.5, -0.5)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)
