"""The gradients of a recipe as a picture: the value that each layer gets, a line for each list of numbers."""

from __future__ import annotations

from fractions import Fraction
from itertools import cycle, groupby

from mergekit_lite.commands.app.numbers import Number, numbers
from mergekit_lite.commands.app.planned import Planned
from mergekit_lite.pages.drawing import COLOURS
from mergekit_lite.pages.html import Markup, element
from mergekit_lite.recipe.layers import place
from mergekit_lite.recipe.rules import along
from mergekit_lite.yaml_document import Fields, Items, Node

LEFT, TOP, WIDTH, HEIGHT = 36.0, 8.0, 276.0, 130.0  # of the plot in its picture, in the picture's units
MOST_DOTS = 100  # layers of which each gets a dot
MOST_CURVES = 24
DASHES = ("none", "6 3", "2 2", "8 2 2 2")  # lines differ without their colours, too


def curves(result: Planned) -> Markup:
    """Return the gradients of a recipe over the layers of its plan as HTML; empty where it has none."""
    points = [number for number in numbers(result.tree) if number.gradient is not None]
    found = [list(group) for _, group in groupby(points, key=lambda number: number.gradient)][:MOST_CURVES]
    if not found:
        return Markup()
    layers = None if _is_cut(result.tree) else _layers(result)
    values = [number.value for group in found for number in group]
    low, high = min(0.0, *values), max(1.0, *values)
    styles = list(zip(cycle(COLOURS), [dash for dash in DASHES for _ in COLOURS], found, strict=False))
    lines = [_line(group, colour, dash, layers, low, high) for colour, dash, group in styles]
    said = [f"{_called(group)}: {', '.join(f'{number.value:g}' for number in group)}" for group in found]
    title = "Gradients over the layers"
    picture = element(
        "svg", *_axes(layers, low, high), *lines, role="img", viewBox="0 0 320 172", class_="curves",
        aria_label=f"{title}. {'; '.join(said)}",
    )  # fmt: skip
    keys = [
        element("li", _key(colour, dash), element("span", text))
        for (colour, dash, _), text in zip(styles, said, strict=True)
    ]
    return element("figure", element("figcaption", title), picture, element("ul", *keys), class_="gradients")


def _layers(result: Planned) -> int | None:
    """Return how many layers the model that is made has; None where that isn't known."""
    places = [place(job.name) for job in result.plan.jobs] if result.plan is not None else []
    return max((each.layer + 1 for each in places if each is not None), default=None)


def _is_cut(tree: Node | None) -> bool:
    """Whether gradients run along slices, modules or the layers of several models, not of one."""
    keys = [key.text for key, _ in tree.entries] if isinstance(tree, Fields) else []
    return isinstance(tree, Items) or "slices" in keys or "modules" in keys


def _called(group: list[Number]) -> str:
    return group[0].label.partition(" (")[0]


def _x(t: float) -> float:
    return LEFT + WIDTH * t


def _y(value: float, low: float, high: float) -> float:
    return TOP + HEIGHT * (high - value) / (high - low)


def _line(group: list[Number], colour: str, dash: str, layers: int | None, low: float, high: float) -> Markup:
    """Return a gradient: straight lines between its numbers, and a dot at each layer."""
    values = [number.value for number in group]
    steps = max(len(values) - 1, 1)
    corners = [(_x(n / steps), _y(value, low, high)) for n, value in enumerate(values)]
    text = " ".join(f"{x:.1f},{y:.1f}" for x, y in corners)
    line = element("polyline", points=text, fill="none", stroke=colour, stroke_width="2", stroke_dasharray=dash)
    dots = []
    if layers is not None and 1 < layers <= MOST_DOTS:
        for layer in range(layers):
            t = Fraction(layer, layers - 1)
            x, y = _x(float(t)), _y(float(along(values, t)), low, high)
            dots.append(element("circle", cx=f"{x:.1f}", cy=f"{y:.1f}", r="2", fill=colour))
    return element("g", element("title", group[0].label.partition(" (")[0]), line, *dots)


def _axes(layers: int | None, low: float, high: float) -> list[Markup]:
    """Return both axes with their numbers and names."""
    parts = []
    for value in sorted({low, 0.0, (low + high) / 2, high}):
        y = f"{_y(value, low, high):.1f}"
        grid = {"x1": f"{LEFT:g}", "x2": f"{LEFT + WIDTH:g}", "y1": y, "y2": y}
        parts.append(element("line", **grid, stroke="currentColor", stroke_opacity="0.25"))
        parts.append(_text(f"{value:g}", LEFT - 4, float(y) + 3, "end"))
    last = "last layer" if layers is None else str(layers - 1)
    bottom = TOP + HEIGHT + 12
    parts.append(_text("first layer" if layers is None else "0", LEFT, bottom, "start"))
    parts.append(_text(last, LEFT + WIDTH, bottom, "end"))
    parts.append(_text("layer", LEFT + WIDTH / 2, bottom + 10, "middle"))
    middle = TOP + HEIGHT / 2
    parts.append(_text("value", 9, middle, "middle", transform=f"rotate(-90 9 {middle:g})"))
    return parts


def _text(text: str, x: float, y: float, anchor: str, **more: str) -> Markup:
    place_of = {"x": f"{x:g}", "y": f"{y:g}"}
    return element("text", text, **place_of, text_anchor=anchor, font_size="9", fill="currentColor", **more)


def _key(colour: str, dash: str) -> Markup:
    line = element(
        "line", x1="0", x2="22", y1="5", y2="5", stroke=colour, stroke_width="3", stroke_dasharray=dash
    )  # fmt: skip
    return element("svg", line, viewBox="0 0 22 10", class_="key", aria_hidden="true")
