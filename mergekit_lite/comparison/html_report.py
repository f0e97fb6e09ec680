"""Report of a comparison as one HTML page."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import combinations

from mergekit_lite.comparison import plots
from mergekit_lite.comparison.comparison import Comparison, DeltaFigures, letter, looks_like
from mergekit_lite.comparison.deltas import TensorComparison
from mergekit_lite.comparison.suggestions import CAN_NOT_TELL, figure, how, percent, suggestions
from mergekit_lite.errors import counted
from mergekit_lite.pages.html import Cell, Markup, Text, document, element, plot, table

MOST_ROWS = 2000  # of a table; of more tensors those that changed most are listed
PICTURES = {
    "heat_map": "RMS of the change by layer and module",
    "cosine_matrix": "Cosine between the deltas of each two models",
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
    if len(models) > 1:
        yield element("h2", "Pairs")
        heads = ["pair", "cosine", "both changed", "same sign", "opposite sign"]
        heads.append(f"overlap of the largest {100 * comparison.settings.top_k:g} %")
        pairs = combinations(range(len(models)), 2)
        yield table("Pairs", heads, ((f"{letters[i]} and {letters[j]}", *_pair_cells(overall, i, j)) for i, j in pairs))
    yield element("h2", "Alpha after rounding")
    yield table("Alpha after rounding", ["dtype", "asked", *letters], _alpha_rows(comparison))
    for draw in plots.panels(comparison):
        title = PICTURES[draw.__name__]
        yield plot(plots.svg(comparison, draw, title), title)
    yield element("h2", "Layers")
    heads = ["layer", *_unit_heads(letters)]
    rows = ([name, *_unit_cells(figures)] for name, figures in comparison.layers.items())
    yield table("Layers", heads, rows, tall=True)
    yield element("h2", "Tensors")
    yield from _tensors(comparison, letters)
    if comparison.unmatched:
        yield element("h2", "Not compared")
        unmatched = ((left.name, left.model, left.why) for left in comparison.unmatched[:MOST_ROWS])
        yield table("Not compared", ["tensor", "model", "why"], unmatched, tall=True)


def _tensors(comparison: Comparison, letters: Sequence[str]) -> Iterator[Markup]:
    tensors: Sequence[TensorComparison] = comparison.tensors
    if len(tensors) > MOST_ROWS:
        tensors = comparison.most_changed
        note = f"The {MOST_ROWS:,} of {len(tensors):,} tensors that changed most; --json and --csv have all."
        yield element("p", note, class_="soft")
    heads = ["tensor", "weights", *_unit_heads(letters)]
    shown = ((compared.tensor, comparison.figures(compared)) for compared in tensors[:MOST_ROWS])
    rows = ([tensor.name, Cell(f"{tensor.numel:,}", tensor.numel), *_unit_cells(of)] for tensor, of in shown)
    yield table("Tensors", heads, rows, tall=True)


def _unit_heads(letters: Sequence[str]) -> list[str]:
    """Return the column heads of ``_unit_cells``."""
    each = [f"{what} {name}" for what in ("RMS", "changed", "VaRM") for name in letters]
    pairs = [f"cosine {a}·{b}" for a, b in combinations(letters, 2)]
    return [*each, *pairs, "signs split"]


def _unit_cells(figures: DeltaFigures) -> list[Text]:
    cells = [_small(rms) for rms in figures.rms] + [_share(changed) for changed in figures.changed]
    cells += [_plain(varm) for varm in figures.varm]
    cells += [_plain(figures.cosine[i][j]) for i, j in combinations(range(len(figures.rms)), 2)]
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
            yield [dtype, Cell(f"{alpha:g}", alpha), *(_plain(value, 4) for value in row)]


def _small(value: float | None) -> Cell:
    return Cell("–" if value is None else f"{value:.2e}", value)


def _plain(value: float | None, digits: int = 2) -> Cell:
    return Cell(figure(value, f".{digits}f"), value)


def _share(value: float | None) -> Cell:
    return Cell(percent(value), value)
