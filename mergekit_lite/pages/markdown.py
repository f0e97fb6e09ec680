"""Text of strangers in Markdown: as text, as code, in a block of lines, in a table."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from mergekit_lite.plain_text import plain, plain_line

MEANINGFUL = re.compile(r"([\\`*_<>|\[\]#])")  # characters that begin a heading, link, picture, HTML, code or table


def text(content: str) -> str:
    """Return text as one line that Markdown shows as it is."""
    return MEANINGFUL.sub(r"\\\1", plain_line(content.replace("\n", " ")))


def code(content: str) -> str:
    """Return text as code within a line."""
    shown = plain_line(content.replace("\n", " "))
    fence = "`" * (_longest_run(shown) + 1)
    blank = " " if "`" in shown else ""  # taken off again by what shows it
    return f"{fence}{blank}{shown}{blank}{fence}"


def block(content: str, language: str) -> str:
    """Return lines of text as a block of code."""
    shown = plain(content)
    fence = "`" * max(3, _longest_run(shown) + 1)
    return f"{fence}{language}\n{shown}\n{fence}"


def table(columns: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return texts as a table."""
    head, *others = (f"| {' | '.join(map(text, row))} |" for row in (columns, *rows))
    return "\n".join([head, f"|{' --- |' * len(columns)}", *others])


def _longest_run(content: str) -> int:
    return max(map(len, re.findall("`+", content)), default=0)
