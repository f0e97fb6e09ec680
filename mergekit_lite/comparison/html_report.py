"""Report of a comparison as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from mergekit_lite.comparison import plots
from mergekit_lite.comparison.comparison import Comparison, DeltaFigures, letter, looks_like
from mergekit_lite.comparison.deltas import TensorComparison
from mergekit_lite.comparison.run_path import by_module, path_of
from mergekit_lite.comparison.suggestions import CAN_NOT_TELL, figure, how, percent, suggestions
from mergekit_lite.errors import counted
from mergekit_lite.pages.html import Cell, Markup, Text, document, element, plot, table

MOST_ROWS = 2000  # of a table; of more tensors those that changed most are listed
PICTURES = {
    "heat_map": "RMS of the change by layer and module",
    "cosine_matrix": "Cosine between the deltas of each two models",
    "path": "How far the run went, which way, and how much of it is one line",
    "updates": "Cosine of each two updates of the run",
    "modules": "How much of the run is one line, by kind of tensor",
    "histogram": "Share of the weights by the size of their change",
}


def page(comparison: Comparison) -> str:
    """Return the whole page as HTML."""
    title = f"What {counted(len(comparison.models), 'model')} changed in {comparison.base}"
    return document(title, _sections(comparison))


def _sections(comparison: Comparison) -> Iterator[Markup]:
    models, overall = comparison.models, comparison.overall
    letters = [letter(number) for number in range(len(models))]
    yield element("h1", "What the models changed, and whether they agree")
    references = [element("dt", "base"), element("dd", comparison.base)]
    for short, reference in zip(letters, models, strict=True):
        references += [element("dt", short), element("dd", reference)]
    yield element("dl", *references)
    counts = f"{counted(len(comparison.tensors), 'tensor')}, {counted(overall.elements, 'weight')} compared."
    yield element("p", f"{counts} {how(comparison)}", class_="soft")
    yield element("h2", "What this suggests")
    yield element("ul", *(element("li", said) for said in suggestions(comparison)))
    yield element("h2", "What it can’t tell")
    yield element("ul", *(element("li", said) for said in CAN_NOT_TELL))
    yield element("h2", "Models")
    heads = ["model", "RMS(delta)", "norm", "changed", "VaRM", "SCE", "stable rank", "by its size"]
    yield table("Models", heads, ([letters[n], *_model_cells(overall, n)] for n in range(len(models))))
    if comparison.steps:
        yield from _path(comparison)
    elif len(models) > 1:
        yield element("h2", "Pairs")
        heads = ["pair", "cosine", "both changed", "same sign", "opposite sign"]
        heads.append(f"overlap of the largest {100 * comparison.settings.top_k:g} %")
        pairs = combinations(range(len(models)), 2)
        yield table("Pairs", heads, ((f"{letters[i]} and {letters[j]}", *_pair_cells(overall, i, j)) for i, j in pairs))
    yield element("h2", "Alpha after rounding")
    yield table(
        "Alpha after rounding", ["dtype", "asked", *(letters[n] for n in comparison.shown)], _alpha_rows(comparison)
    )
    for draw in plots.panels(comparison):
        title = PICTURES[draw.__name__]
        yield plot(plots.svg(comparison, draw, title), title)
    yield element("h2", "Layers")
    heads = ["layer", *_unit_heads(comparison)]
    rows = ([name, *_unit_cells(comparison, figures)] for name, figures in comparison.layers.items())
    yield table("Layers", heads, rows, tall=True)
    yield element("h2", "Tensors")
    yield from _tensors(comparison)
    if comparison.unmatched:
        yield element("h2", "Not compared")
        unmatched = ((left.name, left.model, left.why) for left in comparison.unmatched[:MOST_ROWS])
        yield table("Not compared", ["tensor", "model", "why"], unmatched, tall=True)


def _path(comparison: Comparison) -> Iterator[Markup]:
    of = path_of(comparison)
    yield element("h2", "The path of the run")
    heads = ["checkpoint", "step", "norm", "moved", "cosine with the update before", "cosine with the last"]
    rows: Iterator[list[Text]] = (
        [
            letter(number),
            Cell(f"{step:g}", step),
            *(Cell(figure(values[number], ".3g"), values[number]) for values in (of.norm, of.moved)),
            *(_plain(values[number]) for values in (of.turn, of.toward)),
            *(_share(values[number]) for values in (of.explained, of.bound)),
        ]
        for number, step in enumerate(of.steps)
    )
    yield table("The path of the run", [*heads, "one line explains", "to follow it"], rows)
    yield element("h2", "The line by kind of tensor")
    kinds: Iterator[list[Text]] = ([name, _share(path.explained[-1])] for name, path in by_module(comparison).items())
    yield table("The line by kind of tensor", ["kind", "one line explains"], kinds, tall=True)


def _tensors(comparison: Comparison) -> Iterator[Markup]:
    tensors: Sequence[TensorComparison] = comparison.tensors
    if len(tensors) > MOST_ROWS:
        tensors = comparison.most_changed
        note = f"The {MOST_ROWS:,} of {len(tensors):,} tensors that changed most; --json and --csv have all."
        yield element("p", note, class_="soft")
    heads = ["tensor", "weights", *_unit_heads(comparison)]
    shown = ((compared.tensor, comparison.figures(compared)) for compared in tensors[:MOST_ROWS])
    rows = (
        [tensor.name, Cell(f"{tensor.numel:,}", tensor.numel), *_unit_cells(comparison, of)] for tensor, of in shown
    )
    yield table("Tensors", heads, rows, tall=True)


def _unit_heads(comparison: Comparison) -> list[str]:
    """Return the column heads of ``_unit_cells``."""
    letters = [letter(number) for number in comparison.shown]
    each = [f"{what} {name}" for what in ("RMS", "changed", "VaRM") for name in letters]
    pairs = [f"cosine {a}·{b}" for a, b in combinations(letters, 2)]
    return [*each, *pairs, "signs split"]


def _unit_cells(comparison: Comparison, figures: DeltaFigures) -> list[Text]:
    shown = comparison.shown
    cells = [_small(figures.rms[n]) for n in shown] + [_share(figures.changed[n]) for n in shown]
    cells += [_plain(figures.varm[n]) for n in shown]
    cells += [_plain(figures.cosine[i][j]) for i, j in combinations(shown, 2)]
    return [*cells, _share(figures.split)]


def _model_cells(figures: DeltaFigures, number: int) -> list[Text]:
    sizes = [_small(figures.rms[number]), _plain(figures.norm[number], 4), _share(figures.changed[number])]
    weights = [_plain(figures.varm[number], 3), _plain(figures.sce[number], 3), _plain(figures.stable_rank[number], 1)]
    return [*sizes, *weights, looks_like(figures.rms[number])]


def _pair_cells(figures: DeltaFigures, i: int, j: int) -> list[Text]:
    squares = (figures.both, figures.agree, figures.conflict, figures.overlap)
    return [_plain(figures.cosine[i][j], 3), *(_share(square[i][j]) for square in squares)]


def _alpha_rows(comparison: Comparison) -> Iterator[list[Text]]:
    settings = comparison.settings
    for dtype, of_dtype in zip(settings.dtypes, comparison.overall.effective, strict=True):
        for alpha, row in zip(settings.alphas, of_dtype, strict=True):
            yield [dtype, Cell(f"{alpha:g}", alpha), *(_plain(row[number], 4) for number in comparison.shown)]


def _small(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{value:.2e}", value)


def _plain(value: float | None, digits: int = 2) -> Cell:
    return Cell(figure(value, f".{digits}f"), value)


def _share(value: float | None) -> Cell:
    return Cell(percent(value), value)
