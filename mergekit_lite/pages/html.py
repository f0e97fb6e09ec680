"""An HTML page that needs nothing else: no network, no library.

All text goes through ``element``, which escapes what is not ``Markup`` already. A policy in the page forbids every
script but its own, told by its digest, and every request.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

from mergekit_lite._version import __version__

VOID = ("meta", "img")


class Markup(str):
    """HTML, as against text."""

    __slots__ = ()


class Cell(NamedTuple):
    """A figure as it is shown, and by which it is sorted."""

    text: str
    value: float | None


Text = str | Cell


def document(title: str, sections: Iterable[str]) -> str:
    """The whole page: what ``sections`` hold under the house's style, and who made it."""
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
        element("title", title),
        element("style", Markup(style)),
    )
    maker = element("p", f"Made by mergekit_lite {__version__}.", class_="soft")
    body = element("body", element("main", *sections, maker), element("script", Markup(script)))
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


def plot(svg: str, title: str) -> Markup:
    """A picture with its title under it."""
    picture = element("div", Markup(svg), class_="scroll plot", tabindex="0")
    return element("figure", picture, element("figcaption", title + ".", class_="soft"))


def _cell(cell: Text) -> Markup:
    if isinstance(cell, Cell):
        return element("td", cell.text, data_value="" if cell.value is None else repr(cell.value))
    return element("td", cell, class_="word")
