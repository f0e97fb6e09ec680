"""Plots of a training run's path: lengths, directions and what one line explains, over the steps."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import numpy as np

from mergekit_lite.comparison.comparison import Comparison, ModelValues
from mergekit_lite.comparison.run_path import by_module, path_of
from mergekit_lite.errors import shortened
from mergekit_lite.pages.drawing import COLOURS

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import FigureBase

MOST_MODULES = 24  # bars; of more those that one line explains least
MOST_LETTERS = 34
PATH_HEIGHT, UPDATES_HEIGHT = 6.6, 3.6  # inches


def path(figure: FigureBase, comparison: Comparison) -> None:
    """Draw over the steps, one above the other: how far the run went, which way, what one line explains."""
    of = path_of(comparison)
    lengths, directions, line = figure.subplots(3, 1, sharex=True)
    _line(lengths, of.steps, of.norm, "from the base, ‖δ‖")
    _line(lengths, of.steps, of.moved, "since the checkpoint before", 1)
    lengths.set(title="How far the run went", ylabel="norm of the weights' change", ylim=(0, None))
    _line(directions, of.steps, of.turn, "an update and the one before")
    _line(directions, of.steps, of.toward, "a checkpoint and the last one, from the base", 1)
    directions.set(title="Which way", ylabel="cosine", ylim=(min([-0.05, *_known(of.turn), *_known(of.toward)]), 1.05))
    directions.axhline(0, color="#8a8f98", linewidth=0.8)
    _line(line, of.steps, _percent(of.explained), "explained by one line")
    _line(line, of.steps, _percent(of.bound), "needed to follow it", 7, "--")
    line.set(title="How much of it is one line, of the checkpoints so far", ylabel="share of variance (%)")
    line.set_xlabel("training step")
    for axes in (lengths, directions, line):
        axes.grid(alpha=0.3)
        axes.legend(fontsize=8, frameon=False)


def updates(figure: FigureBase, comparison: Comparison) -> None:
    """Draw the cosine of each two updates as colours."""
    of = path_of(comparison)
    axes = figure.subplots()
    drawn = axes.imshow(np.array(of.updates, dtype=float), vmin=-1, vmax=1, cmap="RdBu_r", origin="lower")
    every = -(-len(of.steps) // 12)
    places, names = range(0, len(of.steps), every), [f"{step:g}" for step in of.steps[::every]]
    axes.set_xticks(places, names, fontsize=7)
    axes.set_yticks(places, names, fontsize=7)
    axes.set(title="Cosine of each two updates", xlabel="update that ends at step", ylabel="update that ends at step")
    figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.04).set_label("cosine")


def modules(figure: FigureBase, comparison: Comparison) -> None:
    """Draw the share that one line explains of each kind of tensor, the least explained on top."""
    shares = {name: of.explained[-1] for name, of in by_module(comparison).items()}
    known = sorted(((share, name) for name, share in shares.items() if share is not None), reverse=True)[-MOST_MODULES:]
    axes = figure.subplots()
    axes.barh(range(len(known)), [100 * share for share, _ in known], color=COLOURS[0])
    names = [shortened(name, MOST_LETTERS).split("… (")[0] for _, name in known]
    axes.set_yticks(range(len(known)), names, fontsize=7)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)
    if (bound := path_of(comparison).bound[-1]) is not None:
        axes.axvline(100 * bound, color=COLOURS[1], linestyle="--")
    axes.set_xlabel("share of variance (%); dashed: needed to follow the line")
    axes.set(title="How much of it is one line, by kind of tensor", xlim=(0, 100))


def modules_height(comparison: Comparison) -> float:
    """Return the height of ``modules`` in inches."""
    kinds = {compared.tensor.module for compared in comparison.tensors}
    return 1.4 + 0.18 * min(len(kinds), MOST_MODULES)


def _line(
    axes: Axes, steps: tuple[float, ...], values: ModelValues, label: str, colour: int = 0, style: str = "-"
) -> None:
    heights = [math.nan if value is None else value for value in values]
    axes.plot(steps, heights, style, marker=".", label=label, color=COLOURS[colour])


def _known(values: ModelValues) -> list[float]:
    return [value for value in values if value is not None]


def _percent(shares: ModelValues) -> ModelValues:
    return tuple(None if share is None else 100 * share for share in shares)
