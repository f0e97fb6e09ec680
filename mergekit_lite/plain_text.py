"""Text of strangers, made harmless where it is shown: on a terminal, in a card, on a page.

File names, references, configs and what servers answer may hold characters that a terminal obeys, that turn the
direction of the text after them, or that no file can hold. They are replaced where text leaves the program, and only
there: inside it a name stays what it is.
"""

from __future__ import annotations

import re

REPLACEMENT = "\ufffd"
CONTROLS = re.compile(
    "["
    "\x00-\x08\x0b-\x1f\x7f-\x9f"  # what terminals obey, all but tabs and line feeds
    "\u2028\u2029"  # separators of lines and paragraphs
    "\u061c\u200e\u200f\u202a-\u202e\u2066-\u206f"  # what turns the direction of text
    "\u00ad\u200b\u2060-\u2065\ufeff\ufff9-\ufffb\U000e0000-\U000e007f"  # what can't be seen
    "\ud800-\udfff"  # halves of surrogate pairs; also bytes of file names that are no UTF-8
    "]"
)
NOT_PLAIN = "this name has characters that a manifest can't hold (controls, or bytes that are no UTF-8)"
SURROGATE = re.compile("[\ud800-\udfff]")


def plain(text: str) -> str:
    """Return the text with ``�`` for each character that is not to be shown; lines stay."""
    return CONTROLS.sub(REPLACEMENT, text)


def plain_line(text: str) -> str:
    """Return the text as ``plain`` does, but in one line: a name can't pretend to be a line of its own."""
    return plain(text).replace("\n", REPLACEMENT)


def is_plain_line(text: str) -> bool:
    """Return whether a text can be shown as it is, in one line."""
    return plain_line(text) == text


def can_be_written(text: str) -> bool:
    """Return whether a text can be written to a file: it has no half of a surrogate pair."""
    return SURROGATE.search(text) is None
