"""A comparison as JSON and as CSV."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from dataclasses import asdict
from typing import Any, TextIO

from mergekit_lite.comparison import run_path
from mergekit_lite.comparison.comparison import Comparison, DeltaFigures, layer_name, letter, looks_like
from mergekit_lite.comparison.deltas import SMALLEST_EXPONENT
from mergekit_lite.comparison.suggestions import CAN_NOT_TELL, how, suggestions

FORMULA_STARTS = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet would compute what begins with one of these


def as_data(comparison: Comparison) -> dict[str, Any]:
    """Return all figures as plain data; None where one has no meaning."""
    settings = comparison.settings
    return {
        "base": comparison.base,
        "models": list(comparison.models),
        "settings": asdict(settings),
        "exact": comparison.whole,
        "how": how(comparison),
        "size_bins": {"first": "unchanged", "from_power_of_two": SMALLEST_EXPONENT},
        "overall": {
            **asdict(comparison.overall),
            "looks_like": [looks_like(rms) for rms in comparison.overall.rms],
        },
        **({"run": run_path.as_data(comparison)} if comparison.steps else {}),
        "layers": {name: asdict(figures) for name, figures in comparison.layers.items()},
        "tensors": [
            {
                "name": compared.tensor.name,
                "shape": list(compared.tensor.shape),
                "layer": layer_name(compared),
                "module": compared.tensor.module,
                "exact": compared.whole,
                **asdict(comparison.figures(compared)),
            }
            for compared in comparison.tensors
        ],
        "unmatched": list(map(asdict, comparison.unmatched)),
        "nonfinite": comparison.nonfinite,
        "notes": list(comparison.notes),
        "suggests": suggestions(comparison),
        "can_not_tell": list(CAN_NOT_TELL),
    }


def write_csv(comparison: Comparison, file: TextIO) -> None:
    """Write a row for each unit (all, layer, tensor) and model.

    A figure of one model is one column, a figure of two models a column for each other model. Text that a spreadsheet
    would take for a formula gets an apostrophe in front.
    """
    settings, models = comparison.settings, comparison.models
    letters = list(map(letter, range(len(models))))
    pairs = ("cosine", "both", "agree", "conflict", "overlap")
    heads = ["unit", "name", "layer", "module", "elements", "model", "reference"]
    heads += ["norm", "rms", "changed", "split", "varm", "sce", "stable_rank"]
    heads += [f"alpha {alpha:g} in {dtype}" for dtype in settings.dtypes for alpha in settings.alphas]
    heads += [f"{pair} with {other}" for pair in pairs for other in letters]
    writer = csv.writer(file, lineterminator="\n")
    writer.writerow(heads)
    for unit, name, layer, module, figures in _units(comparison):
        for number, reference in enumerate(models):
            row: list[object] = [unit, name, layer, module, figures.elements, letters[number], reference]
            row += [figures.norm[number], figures.rms[number], figures.changed[number], figures.split]
            row += [figures.varm[number], figures.sce[number], figures.stable_rank[number]]
            row += [alphas[number] for of_dtype in figures.effective for alphas in of_dtype]
            for pair in pairs:
                of_pair = getattr(figures, pair)[number]
                row += ["" if other == number else value for other, value in enumerate(of_pair)]
            writer.writerow([_harmless(cell) for cell in row])


def _units(comparison: Comparison) -> Iterator[tuple[str, str, str, str, DeltaFigures]]:
    """Yield the kind, name, layer and module of each unit, and its figures."""
    yield "all", "", "", "", comparison.overall
    for name, figures in comparison.layers.items():
        yield "layer", name, name, "", figures
    for compared in comparison.tensors:
        tensor = compared.tensor
        yield "tensor", tensor.name, layer_name(compared), tensor.module, comparison.figures(compared)


def _harmless(cell: object) -> object:
    """Put an apostrophe before text that a spreadsheet would compute."""
    return f"'{cell}" if isinstance(cell, str) and cell.startswith(FORMULA_STARTS) else cell
