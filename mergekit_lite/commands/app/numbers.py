"""The numbers of a recipe that sliders move: found in the text, and written back into it where they stand.

The text is the one state. A slider shows a number of it, and moving one changes these characters and no other.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

from mergekit_lite.yaml_document import Fields, Items, Mark, Node, Scalar

# How far sliders go, as far as the number itself isn't beyond: their keys are those that recipes tune most.
RANGES = {"weight": (-1.0, 2.0), "density": (0.0, 1.0), "alpha": (0.0, 1.0), "t": (0.0, 1.0), "lambda": (0.0, 2.0),
          "epsilon": (0.0, 1.0), "gamma": (0.0, 1.0)}  # fmt: skip


class Number(NamedTuple):
    """One number of a recipe: what it is, its value, where it stands, and how it is written there.

    ``gradient`` is the place of the list that it is in, if it is a point of one.
    """

    label: str
    value: float
    at: Mark
    written: str
    least: float
    most: float
    gradient: Mark | None = None


def numbers(tree: Node | None) -> list[Number]:
    """Return the numbers that sliders move, in the order of the text; one that aliases repeat stands there once."""
    found = {} if tree is None else {number.at: number for number in _numbers(tree, "", "")}
    return [found[at] for at in sorted(found)]


def with_number(text: str, number: Number, value: float) -> str:
    """Return the text with another value of one of its numbers; the text as it is where that isn't there any more."""
    lines = text.splitlines(keepends=True)
    line, column = number.at.line - 1, number.at.column - 1
    if line >= len(lines) or not lines[line].startswith(number.written, column):
        return text
    rest = lines[line][column + len(number.written) :]
    lines[line] = f"{lines[line][:column]}{value:g}{rest}"
    return "".join(lines)


def _numbers(node: Node, key: str, whose: str) -> Iterator[Number]:
    """Yield the numbers below a node that has a key, in the entry of a model or for the tensors of a filter."""
    if isinstance(node, Fields):
        told = {name.text: value.text for name, value in node.entries if isinstance(value, Scalar)}
        inner_whose = f" of {told['model']}" if "model" in told else whose
        inner_whose += f" in {told['filter']}" if "filter" in told else ""
        for name, value in node.entries:
            inner = key if key in RANGES and name.text == "value" else name.text
            yield from _numbers(value, inner, inner_whose)
    elif isinstance(node, Items):
        for count, item in enumerate(node.items, 1):
            for number in _numbers(item, key, whose):
                if isinstance(item, Scalar):
                    place = f" ({count} of {len(node.items)} along the layers)"
                    number = number._replace(label=number.label + place, gradient=node.at)
                yield number
    elif key in RANGES and isinstance(node.value, int | float) and not isinstance(node.value, bool):
        stands = float(node.value)
        least, most = RANGES[key]
        yield Number(
            f"{key}{whose}, line {node.at.line}", stands, node.at, node.text, min(least, stands), max(most, stands)
        )
