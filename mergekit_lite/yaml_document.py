"""A YAML text as a tree in which every key and value knows its line and column.

YAML is read as mergekit reads it (YAML 1.1, the safe tags) with these differences:

- a key given twice is an error, not "the last one wins";
- ``1e-5`` is a number, as everywhere but in YAML 1.1;
- a date is text: nothing in a recipe is one, but a revision may look like it;
- anchors, aliases and ``<<`` work, up to ``LIMIT`` values after expansion;
- tags beyond the plain ones are refused.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from mergekit_lite.errors import UnreadableError, UsageError, counted, listing, shortened
from mergekit_lite.input_files import MAX_DIGITS, read_text
from mergekit_lite.plain_text import can_be_written

MAX_BYTES = 10_000_000  # of a file; PyYAML reads some 100 kB a second
LIMIT = 100_000  # values after aliases are expanded: a recipe for 1,000 models with 20 rules each has some 60,000
SCIENTIFIC = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)[eE][-+]?\d+")
TAG = "tag:yaml.org,2002:"

Value = bool | int | float | str


def text_of(path: Path) -> str:
    """Return the text of a recipe's file, as it is. Raises UsageError where it can't be read."""
    try:
        return read_text(path, MAX_BYTES)
    except UnreadableError as error:
        raise UsageError(f"Can't read the recipe {path}: {error.reason}.") from error


class Mark(NamedTuple):
    """A place in the text, both counted from 1."""

    line: int
    column: int

    def __str__(self) -> str:
        return f"{self.line}:{self.column}"


class Remark(NamedTuple):
    """Something to tell the user about a place in the recipe."""

    at: Mark
    text: str

    def __str__(self) -> str:
        return f"{self.at}: {self.text}"


class RecipeError(UsageError):
    """The recipe is wrong. Carries every problem, in the order of the text."""

    def __init__(self, source: str, problems: Iterable[Remark]):
        self.problems = tuple(sorted(set(problems)))
        title = f"{source} has {counted(len(self.problems), 'problem')}"
        super().__init__(listing(title, list(map(str, self.problems))))


@dataclass(frozen=True)
class Scalar:
    """A single value; ``text`` is how it was written."""

    value: Value | None
    text: str
    at: Mark


@dataclass(frozen=True)
class Items:
    """A list."""

    items: tuple[Node, ...]
    at: Mark


@dataclass(frozen=True)
class Fields:
    """A mapping; its keys are text and differ."""

    entries: tuple[tuple[Scalar, Node], ...]
    at: Mark


Node = Scalar | Items | Fields


def describe(node: Node) -> str:
    """Return ``the text 'high'``, ``the number 3``, ``a list``: for "expected …, got …"."""
    if isinstance(node, Items):
        return "a list" if node.items else "an empty list"
    if isinstance(node, Fields):
        return "a mapping" if node.entries else "an empty mapping"
    if node.value is None:
        return "nothing"
    if isinstance(node.value, bool):
        return node.text
    return f"the text {shortened(node.value, 60)!r}" if isinstance(node.value, str) else f"the number {node.text}"


def read(text: str, source: str, needs: str = "merge_method and models") -> Node:
    """Return the tree of a YAML text of one document.

    Messages name ``source`` as the place the text is from; the one about an empty text asks for what it ``needs``.
    Raises RecipeError where it is no YAML, has several documents, or breaks one of the rules above.
    """
    first, *others = read_documents(text, source, needs)
    if others:
        several = "several documents in one file are for merges, which make a model each: one is wanted here"
        raise RecipeError(source, [Remark(others[0].at, several)])
    return first


def read_documents(text: str, source: str, needs: str = "merge_method and models") -> list[Node]:
    """Return the tree of each document of a YAML text that isn't empty. Raises RecipeError as ``read`` does."""
    reading = _Reading(source)
    try:
        composed = list(yaml.compose_all(text, Loader=yaml.SafeLoader))  # all at once: what is read goes by identity
        trees = [reading.sized(document)[0] for document in composed if not _is_empty(document)]
    except yaml.MarkedYAMLError as error:
        at = _mark(error.problem_mark or error.context_mark)
        raise reading.refusal(at, f"this is not YAML: {error.problem or error.context}") from error
    except yaml.reader.ReaderError as error:
        before = text[: error.position]
        at = Mark(before.count("\n") + 1, error.position - (before.rfind("\n") + 1) + 1)
        character = f"the character U+{ord(text[error.position]):04X} is not allowed"
        raise reading.refusal(at, f"this is not YAML: {character}") from error
    except RecursionError:
        raise reading.refusal(Mark(1, 1), "nested too deeply") from None
    if reading.problems:
        raise RecipeError(source, reading.problems)
    if not trees:
        raise reading.refusal(Mark(1, 1), f"the recipe is empty: it needs {needs}")
    return trees


def _is_empty(document: yaml.Node | None) -> bool:
    """Return whether nothing stands between two lines of dashes."""
    return document is None or (
        isinstance(document, yaml.ScalarNode) and document.tag == f"{TAG}null" and not document.value
    )


class _Writer(yaml.SafeDumper):
    """PyYAML's writer, which takes ``1e5`` for a text: such a text needs quotes to stay one here."""

    def represent_str(self, data: str) -> yaml.ScalarNode:
        """Return the node of a text."""
        return self.represent_scalar(f"{TAG}str", data, style="'" if SCIENTIFIC.fullmatch(data) else None)


_Writer.add_representer(str, _Writer.represent_str)


def dump(data: Any, width: int = 120) -> str:
    """Return the YAML text of plain data, keys in their order. Raises yaml.representer.RepresenterError for others."""
    text: str = yaml.dump(data, Dumper=_Writer, sort_keys=False, allow_unicode=True, width=width)
    return text


def _mark(mark: yaml.Mark | None) -> Mark:
    return Mark(mark.line + 1, mark.column + 1) if mark else Mark(1, 1)


@dataclass
class _Reading:
    """The walk over PyYAML's nodes. A node that several aliases name is read once, but counted each time."""

    source: str
    problems: list[Remark] = field(default_factory=list)
    done: dict[int, tuple[Node, int]] = field(default_factory=dict)  # with the number of values in it
    open: set[int] = field(default_factory=set)
    constructor: yaml.SafeLoader = field(default_factory=lambda: yaml.SafeLoader(""))

    def refusal(self, at: Mark, text: str) -> RecipeError:
        return RecipeError(self.source, [Remark(at, text)])

    def sized(self, node: yaml.Node) -> tuple[Node, int]:
        at = _mark(node.start_mark)
        if id(node) in self.open:
            raise self.refusal(at, "an alias names a value that it is itself a part of")
        if id(node) not in self.done:
            self.open.add(id(node))
            self.done[id(node)] = self.read(node, at)
            self.open.discard(id(node))
        if self.done[id(node)][1] > LIMIT:
            raise self.refusal(at, f"more than {LIMIT:,} values, those that aliases repeat among them")
        return self.done[id(node)]

    def read(self, node: yaml.Node, at: Mark) -> tuple[Node, int]:
        if isinstance(node, yaml.ScalarNode):
            return Scalar(self.value(node, at), node.value, at), 1
        if isinstance(node, yaml.SequenceNode):
            self.check_tag(node, at, "seq")
            parts = [self.sized(item) for item in node.value]
            return Items(tuple(item for item, _ in parts), at), 1 + sum(size for _, size in parts)
        self.check_tag(node, at, "map")
        return self.mapping(node, at)

    def check_tag(self, node: yaml.Node, at: Mark, *allowed: str) -> None:
        if node.tag.removeprefix(TAG) not in allowed:
            tag = node.tag.replace(TAG, "!!")
            self.problems.append(Remark(at, f"the tag {tag} is refused: a recipe is plain text, numbers and lists"))

    def check_text(self, node: yaml.ScalarNode, at: Mark) -> None:
        if not can_be_written(node.value):
            self.problems.append(Remark(at, "half a surrogate pair, which no UTF-8 can tell"))

    def value(self, node: yaml.ScalarNode, at: Mark) -> Value | None:
        tag = node.tag.removeprefix(TAG)
        self.check_text(node, at)
        if tag in ("int", "float") and len(node.value) > MAX_DIGITS:
            self.problems.append(Remark(at, f"a number of {len(node.value):,} characters is refused"))
            return None
        if tag == "str" and node.style is None and SCIENTIFIC.fullmatch(node.value):
            return float(node.value)
        if tag in ("null", "bool", "int", "float"):
            try:
                value: Value | None = self.constructor.construct_object(node)
            except (ValueError, LookupError):  # KeyError: no truth value; IndexError: an empty number
                self.problems.append(Remark(at, f"{shortened(node.value, 60)!r} is not a value of type {tag}"))
                return None
            return value
        self.check_tag(node, at, "str", "timestamp", "value", "merge")
        return str(node.value)

    def mapping(self, node: yaml.Node, at: Mark) -> tuple[Node, int]:
        own: dict[str, tuple[Scalar, Node]] = {}
        merged: dict[str, tuple[Scalar, Node]] = {}
        total = 1
        for key, value in node.value:
            place = _mark(key.start_mark)
            if not isinstance(key, yaml.ScalarNode):
                self.problems.append(Remark(place, "a key must be text"))
                continue
            self.check_text(key, place)
            child, size = self.sized(value)
            total += size + 1
            if key.tag == TAG + "merge":
                self.merge(child, merged)
            elif key.value in own:
                first = own[key.value][0].at.line
                self.problems.append(Remark(place, f"{key.value!r} is given twice, first in line {first}"))
            else:
                own[key.value] = (Scalar(key.value, key.value, place), child)
        return Fields(tuple((merged | own).values()), at), total

    def merge(self, node: Node, into: dict[str, tuple[Scalar, Node]]) -> None:
        """Add what ``<<: *defaults`` or ``<<: [*a, *b]`` names; of several, the first one wins."""
        sources: Sequence[Node] = node.items if isinstance(node, Items) else (node,)
        for part in sources:
            if isinstance(part, Fields):
                for key, value in part.entries:
                    into.setdefault(key.text, (key, value))
            else:
                self.problems.append(Remark(part.at, f"'<<' takes a mapping, got {describe(part)}"))
