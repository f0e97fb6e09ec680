"""Plots of a comparison: where the weights changed, which deltas are alike, how large the changes are.

Names of tensors are shown as they are, never typeset as formulas.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lite.comparison import run_plots
from mergekit_lite.comparison.comparison import Comparison, letter
from mergekit_lite.comparison.deltas import SIZE_BINS, SMALLEST_EXPONENT, TensorComparison
from mergekit_lite.errors import shortened
from mergekit_lite.pages import drawing
from mergekit_lite.pages.drawing import COLOURS

if TYPE_CHECKING:
    from matplotlib.figure import FigureBase

MOST_NAMES = 40  # labels along an axis that can still be read
MOST_LETTERS = 34
LABELS_HEIGHT, OUTSIDE_HEIGHT = 2.6, 0.3  # inches: of a map's titles and names, of the row outside the layers
Draw = Callable[["FigureBase", Comparison], None]


def save(comparison: Comparison, path: Path) -> None:
    """Write one picture with all panels, one below the other."""
    draws = panels(comparison)
    heights = [_height(comparison, draw) for draw in draws]
    figure = drawing.new_figure(sum(heights))
    parts = figure.subfigures(len(draws), 1, squeeze=False, height_ratios=heights)
    for part, draw in zip(parts[:, 0], draws, strict=True):
        draw(part, comparison)
    drawing.save(figure, path)


def panels(comparison: Comparison) -> list[Draw]:
    """Return the functions that draw the panels; cosines only for several models, for a run those of its updates."""
    if comparison.steps:
        return [run_plots.path, run_plots.updates, run_plots.modules, heat_map, histogram]
    return [heat_map, *([cosine_matrix] if len(comparison.models) > 1 else []), histogram]


def svg(comparison: Comparison, draw: Draw, label: str) -> str:
    """Return one panel as an SVG element."""
    return drawing.svg(lambda figure: draw(figure, comparison), _height(comparison, draw), label)


def heat_map(figure: FigureBase, comparison: Comparison) -> None:
    """Draw RMS(delta) of layers × modules, a map for each model on one scale, above the tensors outside the layers."""
    from matplotlib.colors import LogNorm

    layers, modules, outside = _cells(comparison)
    values = [_rms(comparison, number) for number in comparison.shown]
    sizes = [size for of_model in values for size in of_model.values() if size > 0]
    norm = LogNorm(min(sizes), max(*sizes, min(sizes) * 1.01)) if sizes else LogNorm(1e-9, 1e-8)
    figure.suptitle("RMS of the change, by layer and module", fontsize=12)
    columns = min(len(values), 2)
    rows = -(-len(values) // columns)
    ratio = [_inside_height(len(layers)), OUTSIDE_HEIGHT] if layers and outside else [1]
    grid = figure.subplots(rows * len(ratio), columns, squeeze=False, height_ratios=ratio * rows)
    drawn = None
    for cell in range(rows * columns):
        row, column = divmod(cell, columns)
        axes = [grid[row * len(ratio) + part][column] for part in range(len(ratio))]
        if cell >= len(values):
            for empty in axes:
                empty.set_visible(False)
            continue
        rms = values[cell]
        axes[0].set_title(f"{letter(comparison.shown[cell])} − base", fontsize=10)
        first = column == 0
        if layers:
            inside = np.array([[rms.get((layer, module), math.nan) for module in modules] for layer in layers])
            drawn = axes[0].imshow(inside, aspect="auto", norm=norm, interpolation="nearest")
            _ticks(axes[0], modules, layers, first)
            axes[0].set_ylabel("layer" if first else "")
            axes[0].set_xlabel("" if outside else "module")
        if outside:
            below = np.array([[rms.get((None, name), math.nan) for name in outside]])
            drawn = axes[-1].imshow(below, aspect="auto", norm=norm, interpolation="nearest")
            _ticks(axes[-1], outside, [""], first)
            axes[-1].set_xlabel("outside the layers")
    if drawn is not None:
        bar = figure.colorbar(drawn, ax=list(grid.flat), fraction=0.05, pad=0.02)
        bar.set_label("RMS(delta), log scale; blank: 0")


def cosine_matrix(figure: FigureBase, comparison: Comparison) -> None:
    """Draw the cosine between each two deltas, as colours and as numbers, and list the models."""
    cosines = np.array(comparison.overall.cosine, dtype=float)
    names = [letter(number) for number in range(len(cosines))]
    axes, legend = figure.subplots(1, 2)
    drawn = axes.imshow(cosines, vmin=-1, vmax=1, cmap="RdBu_r", aspect="auto")
    axes.set_box_aspect(1)
    for row, column in np.ndindex(*cosines.shape):
        value = cosines[row, column]
        colour = "white" if abs(value) > 0.6 else "black"
        axes.text(column, row, "–" if math.isnan(value) else f"{value:.2f}", ha="center", va="center", color=colour)
    axes.set_xticks(range(len(names)), names)
    axes.set_yticks(range(len(names)), names)
    axes.set(title="Cosine between the deltas", xlabel="model", ylabel="model")
    bar = figure.colorbar(drawn, ax=axes, fraction=0.046, pad=0.04)
    bar.set_label("cosine")
    legend.set_axis_off()
    listed = [f"base  {_end(comparison.base)}"]
    listed += [f"{name}  {_end(model)}" for name, model in zip(names, comparison.models, strict=True)]
    legend.text(0, 0.5, "\n".join(listed), va="center", fontsize=8, parse_math=False)


def histogram(figure: FigureBase, comparison: Comparison) -> None:
    """Draw how many weights changed by how much, in powers of two; the legend gives the share that didn't change."""
    axes = figure.subplots()
    overall = comparison.overall
    edges = 2.0 ** np.arange(SMALLEST_EXPONENT, SMALLEST_EXPONENT + SIZE_BINS + 1)
    drawn = np.array(overall.sizes, dtype=float)[comparison.shown]
    for number, shares in zip(comparison.shown, drawn, strict=True):
        label = f"{letter(number)} ({100 * shares[0]:.1f} % of the weights unchanged)"
        axes.stairs(100 * shares[1:], edges, label=label, color=COLOURS[number % len(COLOURS)], linewidth=1.6)
    seen = np.nonzero(drawn[:, 1:].max(0) > 1e-4)[0]
    if len(seen):
        axes.set_xlim(edges[seen[0]] / 2, edges[seen[-1] + 1] * 2)
    axes.set_xscale("log")
    axes.set(title="Sizes of the changes", xlabel="|delta|, in steps of a factor of 2", ylabel="weights (%)")
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8, frameon=False)


def _cells(comparison: Comparison) -> tuple[list[tuple[str, int]], list[str], list[str]]:
    """Return the rows (layers) and columns (modules) of the map, and the modules outside the layers."""
    layers: dict[tuple[str, int], None] = {}
    modules: dict[str, None] = {}
    outside: dict[str, None] = {}
    for tensor in (compared.tensor for compared in comparison.tensors):
        if tensor.layer is None:
            outside[tensor.module] = None
        else:
            layers[tensor.stack or "", tensor.layer] = None
            modules[tensor.module] = None
    return sorted(layers), list(modules), list(outside)


def _rms(comparison: Comparison, number: int) -> dict[tuple[object, str], float]:
    """Return RMS(delta) of one model in each cell of the map; experts share a cell."""
    members: dict[tuple[object, str], list[TensorComparison]] = {}
    for compared in comparison.tensors:
        tensor = compared.tensor
        layer = None if tensor.layer is None else (tensor.stack or "", tensor.layer)
        members.setdefault((layer, tensor.module), []).append(compared)
    rms = {}
    for cell, tensors in members.items():
        square = sum(float(compared.sums["products"][number, number]) for compared in tensors)
        rms[cell] = math.sqrt(square / sum(compared.tensor.numel for compared in tensors))
    return rms


def _ticks(axes: Any, columns: list[str], rows: list[Any], first: bool) -> None:
    """Put names along the axes, no more than can be read."""
    shown = [] if len(columns) > MOST_NAMES else [shortened(name, MOST_LETTERS).split("… (")[0] for name in columns]
    axes.set_xticks(range(len(shown)), shown, rotation=60, ha="right", rotation_mode="anchor", fontsize=7)
    for label in axes.get_xticklabels():
        label.set_parse_math(False)
    if not first or rows == [""]:
        axes.set_yticks([])
        return
    stacks = {stack for stack, _ in rows}
    named = [str(layer) if len(stacks) == 1 else f"{stack[:12]} {layer}" for stack, layer in rows]
    every = -(-len(named) // MOST_NAMES)
    axes.set_yticks(range(0, len(named), every), named[::every], fontsize=7)
    for label in axes.get_yticklabels():
        label.set_parse_math(False)


def _end(reference: str) -> str:
    """Return the end of a long reference, which says more than its beginning."""
    return reference if len(reference) <= MOST_LETTERS else f"…{reference[-MOST_LETTERS:]}"


def _height(comparison: Comparison, draw: Draw) -> float:
    """Return the height of a panel in inches."""
    models = len(comparison.shown)
    if draw is run_plots.path:
        return run_plots.PATH_HEIGHT
    if draw is run_plots.updates:
        return run_plots.UPDATES_HEIGHT
    if draw is run_plots.modules:
        return run_plots.modules_height(comparison)
    if draw is heat_map:
        inside = _inside_height(len(_cells(comparison)[0]))
        return 0.5 + (LABELS_HEIGHT + OUTSIDE_HEIGHT + inside) * -(-models // 2)
    return 2.2 + 0.3 * models if draw is cosine_matrix else 3.2


def _inside_height(layers: int) -> float:
    return min(max(0.7, 0.11 * layers), 6.0)
