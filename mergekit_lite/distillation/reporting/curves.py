"""Pictures of a distillation: training curves, and the models compared on held-out prompts."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergekit_lite.answers.intervals import Interval
from mergekit_lite.answers.rows import read_rows
from mergekit_lite.distillation.reporting.held_out import LENGTH, UNTRAINED, HeldOutComparison
from mergekit_lite.errors import shortened
from mergekit_lite.pages.drawing import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

MANY = 60  # points: curves with more have a running mean drawn over them
PANEL_HEIGHT = 2.1  # inches
COLOUR_OF = {"source": COLOURS[0], "target": COLOURS[2], "rejected": COLOURS[1]}
HELD_OUT = "eval_"  # begins the names of what is measured on held-out rows

Log = Sequence[Mapping[str, float]]


class Panel(NamedTuple):
    """Columns of the log that are drawn on one pair of axes."""

    title: str
    unit: str
    lines: Mapping[str, str]  # labels by column of the log; ``distance/`` stands for all columns that begin so

    def of(self, log: Log) -> Panel:
        """Return the panel with the columns that a log has."""
        there = dict.fromkeys(key for row in log for key in row)
        lines: dict[str, str] = {}
        for key, label in self.lines.items():
            if key.endswith("/"):
                lines |= {name: name.removeprefix(key) for name in there if name.startswith(key)}
            elif key in there:
                lines[key] = label
        return self._replace(lines=lines)


PANELS = {
    "sft": (
        Panel("Loss", "nats a token", {"loss": "training", "eval_loss": "held out"}),
        Panel("Learning rate", "a step", {"learning_rate": ""}),
        Panel("Norm of the gradient", "norm", {"grad_norm": ""}),
        Panel("Length of the responses", "tokens", {"length/response": ""}),
    ),
    "fuse": (
        Panel("Loss", "clm · CLM + (1 − clm) · D", {"loss": "training", "eval_loss": "held out"}),
        Panel("CLM: plain SFT's loss", "nats a token", {"clm": ""}),
        Panel("Distance to the teachers", "mean of the groups", {"distance": "all", "distance/": ""}),
        Panel("Weight of the teachers", "mean of the rows", {"weight/": ""}),
        Panel("Tokens that are compared", "share", {"grouped": ""}),
        Panel("Norm of the gradient", "norm", {"grad_norm": ""}),
        Panel("Learning rate", "a step", {"learning_rate": ""}),
    ),
    "on_policy": (
        Panel("KL(student ‖ teacher), estimate", "nats a token", {"reverse_kl": "all", "reverse_kl/": ""}),
        Panel("Length of the answers", "tokens", {"length/response": ""}),
        Panel("Importance weights", "mean", {"ratio": "weight", "clipped": "share clipped"}),
        Panel("Norm of the gradient", "norm", {"grad_norm": ""}),
        Panel("Learning rate", "a step", {"learning_rate": ""}),
    ),
    "preference": (
        Panel(
            "Rewards",
            "reward",
            {"rewards/source": "source, chosen", "rewards/target": "target, chosen", "rewards/rejected": "rejected"},
        ),
        Panel("Margin of chosen over rejected", "reward", {"margin": "training", "eval_margin": "held out"}),
        Panel(
            "Accuracy: chosen above rejected",
            "share of rows",
            {
                "accuracy": "all chosen",
                "accuracy/source": "source",
                "accuracy/target": "target",
                "eval_accuracy": "all chosen, held out",
            },
        ),
        Panel("Loss", "mean of the rows", {"loss": "training", "eval_loss": "held out"}),
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


KINDS = {
    "sft": "Supervised fine-tuning",
    "fuse": "Training on teachers' distributions",
    "on_policy": "On-policy training",
    "preference": "Preference training",
}


@dataclass(frozen=True)
class Picture:
    """A picture that is drawn both as PNG and into the page."""

    name: str  # of its file
    title: str
    height: float  # in inches
    draw: Callable[[FigureBase], None]


def kind_of(stage: str) -> str:
    """Return the training that a log is of, in any round: each student of FuseChat's is fused."""
    _, name = _parted(stage)
    return "fuse" if name.startswith("fuse-") else name


def name_of(stage: str) -> str:
    """Return a training's name for readers."""
    number, name = _parted(stage)
    student = name.removeprefix("fuse-") if name != kind_of(stage) else ""
    of_round = f", round {number}" if number else ""
    return KINDS[kind_of(stage)] + of_round + (f": the student of {student}" if student else "")


def _parted(stage: str) -> tuple[str, str]:
    """Return the number of the round, or an empty text, and the training."""
    number, name = re.fullmatch(r"(?:round-(\d+)-)?(.+)", stage).groups("")  # type: ignore[union-attr]  # all match
    return number, name


def read_log(path: Path) -> Log:
    """Return the figures of a training log by step, in order; of a figure that was logged again, the last one."""
    if not path.exists():
        return []
    rows: dict[int, dict[str, float]] = {}
    for line in read_rows(path, []):
        if "step" in line.row:
            rows.setdefault(line.row["step"], {}).update({k: v for k, v in line.row.items() if k != "time"})
    return [rows[step] for step in sorted(rows)]


def ends(log: Log) -> dict[str, tuple[float, float]]:
    """Return the first and the last value of each figure of a log."""
    found: dict[str, tuple[float, float]] = {}
    for row in log:
        for key, value in row.items():
            found[key] = (found.get(key, (value,))[0], value)
    return found


def training(stage: str, log: Log) -> Picture | None:
    """Return the curves of one training: a panel for all columns that the log has. None for an empty log."""
    panels = [panel for each in PANELS[kind_of(stage)] if (panel := each.of(log)).lines]
    if not panels:
        return None

    def draw(figure: FigureBase) -> None:
        columns = min(2, len(panels))
        grid = figure.subplots(-(-len(panels) // columns), columns, squeeze=False)
        for axes, panel in zip(grid.flat, panels, strict=False):
            _panel(axes, panel, log)
        for axes in list(grid.flat)[len(panels) :]:
            axes.set_visible(False)

    return Picture(f"{stage}.png", name_of(stage), PANEL_HEIGHT * -(-len(panels) // 2), draw)


def _panel(axes: Axes, panel: Panel, log: Log) -> None:
    lines = panel.lines
    for number, (key, label) in enumerate(lines.items()):
        points = [(row["step"], row[key]) for row in log if key in row and math.isfinite(row[key])]
        steps, values = np.array(points, dtype=float).reshape(-1, 2).T
        plain = COLOURS[number % len(COLOURS)] if "/" in key or len(lines) == 1 else "#7f7f7f"
        others = COLOURS[3] if key.startswith(HELD_OUT) else plain
        colour = COLOUR_OF.get(key.partition("/")[2], others)
        if len(values) > MANY:
            axes.plot(steps, values, color=colour, linewidth=0.6, alpha=0.35)
            steps, values = _smooth(steps, values, len(values) // 20)
        marker = "o" if len(values) == 1 or (key.startswith(HELD_OUT) and len(values) <= MANY) else ""
        axes.plot(steps, values, color=colour, linewidth=1.6, marker=marker, markersize=3, label=label)
    axes.set_title(panel.title, fontsize=10)
    axes.set_xlabel("optimiser step", fontsize=8)
    axes.set_ylabel(panel.unit, fontsize=8)
    axes.tick_params(labelsize=8)
    axes.grid(alpha=0.3)
    if len(lines) > 1:
        axes.legend(fontsize=7, frameon=False)


def _smooth(steps: np.ndarray[Any, Any], values: np.ndarray[Any, Any], width: int) -> tuple[Any, Any]:
    """Return running means of values and of steps, so that each mean is drawn in the middle of its window."""
    kernel = np.ones(width) / width
    return np.convolve(steps, kernel, "valid"), np.convolve(values, kernel, "valid")


def held_out(comparison: HeldOutComparison) -> Picture:
    """Return means of all models and their paired differences, with 95 % intervals: a row of panels for each metric."""
    metrics = [*comparison.scorers, LENGTH]

    def draw(figure: FigureBase) -> None:
        grid = figure.subplots(len(metrics), 2, squeeze=False)
        for row, name in zip(grid, metrics, strict=True):
            means = {model: comparison.mean(model, name) for model in comparison.answers}
            _intervals(row[0], means, COLOURS)
            row[0].set_title(f"{shortened(name, 24)}: mean", fontsize=10, parse_math=False)
            differences = {
                f"{difference.after} − {difference.before}": difference.interval
                for difference in comparison.differences
                if difference.metric == name
            }
            _intervals(row[1], differences, ("#404040",) * len(differences))
            row[1].axvline(0, color="#7f7f7f", linewidth=1, linestyle="--")
            row[1].set_title("difference on the same prompts", fontsize=10)
            for axes in row:
                axes.set_xlabel("characters" if name == LENGTH else "score", fontsize=8)

    return Picture("held-out.png", "Held-out prompts, with 95 % intervals", 0.4 + 1.65 * len(metrics), draw)


def rounds(comparison: HeldOutComparison) -> Picture:
    """Return the means of each metric over the rounds, with 95 % intervals; 0 is the target as it was."""
    metrics = [*comparison.scorers, LENGTH]

    def draw(figure: FigureBase) -> None:
        grid = figure.subplots(len(metrics), 1, squeeze=False)
        numbers = [0 if model == UNTRAINED else int(model.removeprefix("round-")) for model in comparison.answers]
        for axes, metric in zip(grid.flat, metrics, strict=True):
            found = zip(numbers, (comparison.mean(model, metric) for model in comparison.answers), strict=True)
            points = [(number, each) for number, each in found if math.isfinite(each.mean)]
            ends = [(each.mean - each.low, each.high - each.mean) for _, each in points]
            spread = np.array([end if np.isfinite(end).all() else (0, 0) for end in ends]).reshape(-1, 2).T
            means = [each.mean for _, each in points]
            axes.errorbar([number for number, _ in points], means, spread, marker="o", capsize=3, color=COLOURS[0])
            axes.set_title(shortened(metric, 40), fontsize=10, parse_math=False)
            axes.set_xticks(numbers)
            axes.set_xlabel("round; 0 is the target as it was", fontsize=8)
            axes.set_ylabel("characters" if metric == LENGTH else "score", fontsize=8)
            axes.tick_params(labelsize=8)
            axes.grid(alpha=0.3)

    return Picture(
        "rounds.png", "Held-out prompts over the rounds, with 95 % intervals", 0.4 + 2.1 * len(metrics), draw
    )


def _intervals(axes: Axes, named: Mapping[str, Interval], colours: Sequence[str]) -> None:
    for row, (interval, colour) in enumerate(zip(named.values(), colours, strict=False)):
        mean = interval.mean
        if not math.isfinite(mean):
            continue
        ends = [[mean - interval.low], [interval.high - mean]] if math.isfinite(interval.low) else None
        axes.errorbar([mean], [row], xerr=ends, fmt="o", color=colour, capsize=3, markersize=5)
    axes.set_yticks(range(len(named)), list(named), fontsize=8)
    axes.set_ylim(len(named) - 0.5, -0.5)
    axes.tick_params(labelsize=8)
    axes.grid(axis="x", alpha=0.3)
