"""A comparison as one HTML page that needs nothing else: no network, no library.

All text goes through ``element``, which escapes what is not ``Markup`` already. A policy in the page forbids every
script but its own, told by its digest, and every request.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Iterator, Sequence
from html import escape
from importlib.resources import files
from itertools import combinations
from typing import NamedTuple

from mergekit_lite._version import __version__
from mergekit_lite.errors import counted
from mergekit_lite.vectors import plots
from mergekit_lite.vectors.comparison import Comparison, Figures, letter, looks_like
from mergekit_lite.vectors.words import CAN_NOT_TELL, figure, how, percent, suggestions

MOST_ROWS = 2000  # tensors in the table: those that changed most
VOID = ("meta",)
PICTURES = {
    "heat_map": "RMS of the change by layer and module",
    "cosine_matrix": "Cosine between the deltas of each two models",
    "histogram": "Share of the weights by the size of their change",
}


class Markup(str):
    """HTML, as against text."""

    __slots__ = ()


class Cell(NamedTuple):
    """A figure as it is shown, and by which it is sorted."""

    text: str
    value: float | None


Text = str | Cell


def page(comparison: Comparison) -> str:
    """The whole page."""
    style, script = (files(__package__).joinpath(f"page.{kind}").read_text(encoding="utf-8") for kind in ("css", "js"))
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = (
        f"default-src 'none'; style-src 'unsafe-inline'; img-src data:; script-src 'sha256-{digest}'; "
        "base-uri 'none'; form-action 'none'"
    )
    head = element(
        "head",
        element("meta", charset="utf-8"),
        element("meta", http_equiv="Content-Security-Policy", content=policy),
        element("meta", name="viewport", content="width=device-width, initial-scale=1"),
        element("meta", name="referrer", content="no-referrer"),
        element("title", f"What {counted(len(comparison.models), 'model')} changed in {comparison.base}"),
        element("style", Markup(style)),
    )
    body = element("body", element("main", *_sections(comparison)), element("script", Markup(script)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def element(name: str, /, *children: str, **attributes: str) -> Markup:
    """An element; text is escaped. ``class_`` and ``http_equiv`` are written ``class`` and ``http-equiv``."""
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(value, quote=True)}"' for key, value in attributes.items()
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    inner = "".join(child if isinstance(child, Markup) else escape(child) for child in children)
    return Markup(f"<{name}{written}>{inner}</{name}>")


def table(label: str, heads: Sequence[str], rows: Iterable[Sequence[Text]], tall: bool = False) -> Markup:
    """A table that sorts by the buttons in its head; a row's first cell is its name."""
    listed = list(rows)
    words = [any(isinstance(row[column], str) for row in listed) for column in range(len(heads))]
    top = [
        element("th", element("button", head, type="button"), scope="col", class_="word" if word else "figure")
        for head, word in zip(heads, words, strict=True)
    ]
    body = [element("tr", element("th", str(first), scope="row"), *map(_cell, others)) for first, *others in listed]
    kind = "scroll tall" if tall else "scroll"
    made = element("table", element("thead", element("tr", *top)), element("tbody", *body), aria_label=label)
    return element("div", made, class_=kind, tabindex="0", role="region", aria_label=label)


def _cell(cell: Text) -> Markup:
    if isinstance(cell, Cell):
        return element("td", cell.text, data_value="" if cell.value is None else repr(cell.value))
    return element("td", cell, class_="word")


def _sections(comparison: Comparison) -> Iterator[Markup]:
    models, overall = comparison.models, comparison.overall
    letters = [letter(number) for number in range(len(models))]
    yield element("h1", "What the models changed, and whether they agree")
    names = [element("dt", "base"), element("dd", comparison.base)]
    for short, reference in zip(letters, models, strict=True):
        names += [element("dt", short), element("dd", reference)]
    yield element("dl", *names)
    counts = f"{counted(len(comparison.findings), 'tensor')}, {counted(overall.elements, 'weight')} compared."
    yield element("p", f"{counts} {how(comparison)}", class_="soft")
    yield element("h2", "What this suggests")
    yield element("ul", *(element("li", said) for said in suggestions(comparison)))
    yield element("h2", "What it can’t tell")
    yield element("ul", *(element("li", said) for said in CAN_NOT_TELL))
    yield element("h2", "Models")
    heads = ["model", "RMS(delta)", "norm", "changed", "VaRM", "SCE", "stable rank", "by its size"]
    yield table("Models", heads, ([letters[n], *_of_model(overall, n)] for n in range(len(models))))
    if len(models) > 1:
        yield element("h2", "Pairs")
        heads = ["pair", "cosine", "both changed", "same sign", "opposite sign"]
        heads.append(f"overlap of the largest {100 * comparison.settings.top_k:g} %")
        pairs = combinations(range(len(models)), 2)
        yield table("Pairs", heads, ((f"{letters[i]} and {letters[j]}", *_of_pair(overall, i, j)) for i, j in pairs))
    yield element("h2", "Alpha after rounding")
    yield table("Alpha after rounding", ["dtype", "asked", *letters], _alphas(comparison))
    for draw in plots.panels(comparison):
        title = PICTURES[draw.__name__]
        picture = element("div", Markup(plots.svg(comparison, draw, title)), class_="scroll plot", tabindex="0")
        yield element("figure", picture, element("figcaption", title + ".", class_="soft"))
    yield element("h2", "Layers")
    heads = ["layer", *_heads(letters)]
    rows = ([name, *_unit(figures)] for name, figures in comparison.layers.items())
    yield table("Layers", heads, rows, tall=True)
    yield element("h2", "Tensors")
    yield from _tensors(comparison, letters)
    if comparison.unmatched:
        yield element("h2", "Not compared")
        left = ((one.name, one.model, one.why) for one in comparison.unmatched[:MOST_ROWS])
        yield table("Not compared", ["tensor", "model", "why"], left, tall=True)
    yield element("p", f"Made by mergekit_lite {__version__}.", class_="soft")


def _tensors(comparison: Comparison, letters: Sequence[str]) -> Iterator[Markup]:
    found = list(comparison.findings)
    if len(found) > MOST_ROWS:
        found.sort(key=lambda finding: -float(finding.tally["means"].max()))
        told = f"The {MOST_ROWS:,} of {len(found):,} tensors that changed most; --json and --csv have all."
        yield element("p", told, class_="soft")
    heads = ["tensor", "weights", *_heads(letters)]
    figures = ((finding.match, comparison.of(finding)) for finding in found[:MOST_ROWS])
    rows = ([match.name, Cell(f"{match.numel:,}", match.numel), *_unit(of)] for match, of in figures)
    yield table("Tensors", heads, rows, tall=True)


def _heads(letters: Sequence[str]) -> list[str]:
    """Of what ``_unit`` tells."""
    each = [f"{what} {name}" for what in ("RMS", "changed", "VaRM") for name in letters]
    pairs = [f"cosine {a}·{b}" for a, b in combinations(letters, 2)]
    return [*each, *pairs, "signs split"]


def _unit(figures: Figures) -> list[Text]:
    cells = [_small(rms) for rms in figures.rms] + [_share(changed) for changed in figures.changed]
    cells += [_plain(varm) for varm in figures.varm]
    cells += [_plain(figures.cosine[i][j]) for i, j in combinations(range(len(figures.rms)), 2)]
    return [*cells, _share(figures.split)]


def _of_model(figures: Figures, number: int) -> list[Text]:
    sizes = [_small(figures.rms[number]), _plain(figures.norm[number], 4), _share(figures.changed[number])]
    weights = [_plain(figures.varm[number], 3), _plain(figures.sce[number], 3), _plain(figures.stable_rank[number], 1)]
    return [*sizes, *weights, looks_like(figures.rms[number])]


def _of_pair(figures: Figures, i: int, j: int) -> list[Text]:
    shares = (figures.both, figures.agree, figures.conflict, figures.overlap)
    return [_plain(figures.cosine[i][j], 3), *(_share(of[i][j]) for of in shares)]


def _alphas(comparison: Comparison) -> Iterator[list[Text]]:
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
