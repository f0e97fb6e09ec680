"""HTML pages in one file, without network or libraries.

All text goes through ``element``, which escapes everything that is not ``Markup`` already, and replaces what is not to
be shown (``plain_text``). A content security policy in the page allows one script, identified by its digest, and no
requests.
"""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterable, Sequence
from html import escape
from importlib.resources import files
from typing import NamedTuple

from mergekit_lite._version import __version__
from mergekit_lite.plain_text import plain

VOID = ("meta", "img")  # elements without an end tag


class Markup(str):
    """HTML that is not escaped again."""

    __slots__ = ()


class Cell(NamedTuple):
    """A figure as text, and as the number that its column is sorted by."""

    text: str
    value: float | None


Text = str | Cell


def document(title: str, sections: Iterable[str]) -> str:
    """Return a whole page: the sections, ``page.css``, ``page.js``, and a line with the version of mergekit_lite."""
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
    footer = element("p", f"Made by mergekit_lite {__version__}.", class_="soft")
    body = element("body", element("main", *sections, footer), element("script", Markup(script)))
    return f"<!DOCTYPE html>\n{element('html', head, body, lang='en')}\n"


def element(name: str, /, *children: str, **attributes: str) -> Markup:
    """Return an element with its text escaped.

    Attributes are written without outer underscores, and with hyphens for inner ones: ``class_``, ``http_equiv``.
    """
    written = "".join(
        f' {key.strip("_").replace("_", "-")}="{escape(plain(value), quote=True)}"' for key, value in attributes.items()
    )
    if name in VOID:
        return Markup(f"<{name}{written}>")
    inner = "".join(child if isinstance(child, Markup) else escape(plain(child)) for child in children)
    return Markup(f"<{name}{written}>{inner}</{name}>")


def table(label: str, heads: Sequence[str], rows: Iterable[Sequence[Text]], tall: bool = False) -> Markup:
    """Return a table that sorts by the buttons in its head.

    Args:
        label: its name for screen readers.
        heads: column headings.
        rows: the first cell of each is its heading.
        tall: whether the table scrolls in a box of limited height.
    """
    listed = list(rows)
    words = [any(isinstance(row[column], str) for row in listed) for column in range(len(heads))]
    top = [
        element("th", element("button", head, type="button"), scope="col", class_="word" if word else "figure")
        for head, word in zip(heads, words, strict=True)
    ]
    body = [element("tr", element("th", str(first), scope="row"), *map(_cell, others)) for first, *others in listed]
    kind = "scroll tall" if tall else "scroll"
    whole = element("table", element("thead", element("tr", *top)), element("tbody", *body), aria_label=label)
    return element("div", whole, class_=kind, tabindex="0", role="region", aria_label=label)


def plot(svg: str, title: str) -> Markup:
    """Return an SVG picture with its title below."""
    picture = element("div", Markup(svg), class_="scroll plot", tabindex="0")
    return element("figure", picture, element("figcaption", title + ".", class_="soft"))


def _cell(cell: Text) -> Markup:
    if isinstance(cell, Cell):
        return element("td", cell.text, data_value="" if cell.value is None else repr(cell.value))
    return element("td", cell, class_="word")
