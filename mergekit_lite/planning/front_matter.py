"""Front matter of a model's card: the few entries that are carried over into the output's card."""

from __future__ import annotations

import re
from collections.abc import Mapping

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.folder import small_file
from mergekit_lite.errors import CheckpointError, UsageError
from mergekit_lite.input_files import read_text
from mergekit_lite.yaml_document import Fields, Items, Node, RecipeError, Scalar, read

CARD = "README.md"
CARRIED = ("license", "license_name", "license_link", "language", "pipeline_tag", "library_name")
MAX_CHARACTERS = 10_000  # of all entries; a hundred languages take 500
FRONT_MATTER = re.compile(r"\A---[ \t]*\n(.*?)^---[ \t]*$", re.DOTALL | re.MULTILINE)
# An entry with its lines that are indented or begin with a hyphen. The others are left unread: a card may list
# thousands of results, and nothing in them can do harm then.
ENTRY = re.compile(rf"^(?:{'|'.join(CARRIED)})[ \t]*:.*(?:\n(?:[ \t-].*)?)*", re.MULTILINE)

FrontMatter = Mapping[str, str | list[str]]


def carried_over(source: Checkpoint) -> tuple[FrontMatter, list[str]]:
    """Return the entries of a model's card that the output's card takes over, and what the user should know of it.

    Values are text as it was written, or lists of such text. A card that can't be read gives nothing but a note.
    """
    try:
        path = small_file(source.folder, CARD) if source.folder else None
        return (entries(read_text(path)) if path else {}), []
    except (CheckpointError, UsageError) as error:
        why = error.problems[0].text if isinstance(error, RecipeError) else str(error)
        return {}, [f"nothing of the card of {source.reference} is taken over, not even its licence: {why}"]


def entries(card: str) -> FrontMatter:
    """Return the entries by their keys. Raises UsageError where they aren't YAML, or are neither text nor lists."""
    written = FRONT_MATTER.match(card.replace("\r\n", "\n"))
    entries = "".join(f"{entry}\n" for entry in ENTRY.findall(written[1])) if written else ""
    if len(entries) > MAX_CHARACTERS:
        raise UsageError(f"{', '.join(CARRIED)} have more than {MAX_CHARACTERS:,} characters")
    tree = read(entries, CARD) if entries else None
    values = {key.text: _value(node) for key, node in tree.entries} if isinstance(tree, Fields) else {}
    return {key: value for key, value in values.items() if value}


def _value(node: Node) -> str | list[str]:
    return [_text(item) for item in node.items] if isinstance(node, Items) else _text(node)


def _text(node: Node) -> str:
    if not isinstance(node, Scalar):
        raise UsageError(f"{', '.join(CARRIED)} should be text, or lists of text")
    return node.text if node.value is not None else ""
