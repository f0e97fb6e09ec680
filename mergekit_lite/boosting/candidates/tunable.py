"""The tuned parameters: alpha of a pair, or any numbers of a merge recipe, each named by its path.

    parameters.weight=0:1.5                     a number of the recipe, from 0 to 1.5
    models.1.parameters.weight=0:1              of the second model: lists are counted from 0
    parameters.t[filter=mlp]=0:1                only for tensors that the filter matches
    parameters.t[layers=0-7]=0:1                only in layers 0 to 7, both included
    parameters.t[filter=mlp,layers=0-7]=0:1     both
    parameters.t[gradient=3]=0:1                three numbers: a gradient along the layers
    parameters.t[groups=4]=0:1                  four numbers: one for each of four runs of layers, as equal as can be
    parameters.t=0:1:0.05                       in steps of 0.05

A filter is written as in recipes, ``regex:`` too. A tensor that no filter matches keeps the recipe's number. A pair has
``alpha=0:2`` and ``alpha[filter=mlp]=0:2``, a training run ``to_step=75:1000``; anything else takes a recipe
(``merge_method: expo``, ``relex``).
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

from mergekit_lite.boosting.candidates.ranges import Range, read_range
from mergekit_lite.errors import UsageError, listing, nearest
from mergekit_lite.methods import METHODS
from mergekit_lite.recipe.rules import REGEX
from mergekit_lite.yaml_document import Fields, Items, Node, Scalar, Value, dump, read

Tree = Any  # of dicts, lists and values
SHAPE = re.compile(r"(?P<path>[^\[\]=]+)(?:\[(?P<where>.+)\])?=(?P<range>[^=\]]+)")
CONDITION = re.compile(r",(?=(?:filter|layers|gradient|groups)=)")
LAYERS = re.compile(r"(\d+)-(\d+)")
SPREAD = ("gradient", "groups")
TO_STEP = "to_step"
MOST_SPREAD = 64


@dataclass(frozen=True)
class Tunable:
    """One ``--tune``."""

    text: str  # the part before the equals sign
    path: tuple[str, ...]  # keys and, in lists, numbers
    range: Range  # of each number
    filter: str | None = None  # which tensors, by name; None for all
    layers: tuple[int, int] | None = None  # the first, and the one after the last; None for all
    gradient: int = 0  # how many numbers a gradient along the layers has; 0 for no gradient
    groups: int = 0  # how many runs of layers have a number each; 0 for no groups

    @property
    def names(self) -> list[str]:
        """The names of the parameters to search for."""
        count = self.gradient or self.groups
        return [f"{self.text}.{number}" for number in range(count)] if count else [self.text]


def parse(texts: Sequence[str]) -> tuple[Tunable, ...]:
    """Read every ``--tune``.

    Raises:
        UsageError: with every text that can't be read.
    """
    tunables: list[Tunable] = []
    problems: list[str] = []
    for text in texts:
        try:
            tunables.append(_tunable(text))
        except (ValueError, UsageError) as error:
            problems.append(f"{text!r}: {error}")
    names = [tunable.text for tunable in tunables]
    problems += [f"{name!r} is tuned twice" for name in dict.fromkeys(names) if names.count(name) > 1]
    if problems:
        raise UsageError(listing("What is to be tuned can't be read", problems))
    return tuple(tunables)


def _tunable(text: str) -> Tunable:
    shape = SHAPE.fullmatch(text)
    if shape is None:
        raise ValueError("expected PATH=LOW:HIGH, for instance parameters.weight=0:1.5 or alpha[filter=mlp]=0:1")
    where = _conditions(shape["where"])
    layers = None
    if "layers" in where:
        ends = LAYERS.fullmatch(where["layers"])
        if ends is None or int(ends[1]) > int(ends[2]):
            raise ValueError(f"layers={where['layers']}: expected the first and the last one, for instance layers=0-7")
        layers = int(ends[1]), int(ends[2]) + 1
    spread = {name: _count(name, where[name]) for name in SPREAD if name in where}
    if "groups" in where and len(where) > 1:
        others = ", ".join(name for name in where if name != "groups")
        raise ValueError(f"groups can't be combined with {others}: write a --tune with layers= for each run")
    path = tuple(shape["path"].split("."))
    name = text[: shape.start("range") - 1]
    return Tunable(name, path, read_range(shape["range"]), where.get("filter"), layers, **spread)


def _conditions(text: str | None) -> dict[str, str]:
    conditions: dict[str, str] = {}
    for part in CONDITION.split(text) if text else ():
        name, _, value = part.partition("=")
        known = ("filter", "layers", *SPREAD)
        if name not in known or not value:
            raise ValueError(f"[{part}]: expected one of {', '.join(f'{each}=…' for each in known)}")
        if name in conditions:
            raise ValueError(f"{name} is given twice")
        conditions[name] = value
    return conditions


def _count(name: str, text: str) -> int:
    if not text.isdecimal() or not 2 <= int(text) <= MOST_SPREAD:
        raise ValueError(f"{name}={text}: expected a whole number from 2 to {MOST_SPREAD}")
    return int(text)


def check_pair_tunables(tunables: Sequence[Tunable]) -> None:
    """Refuse what can't be tuned of two models: all but alpha and alphas of filters.

    Raises:
        UsageError: some isn't an alpha; the message has each of them.
    """
    problems = []
    for each in tunables:
        if each.path != ("alpha",):
            problems.append(f"{each.text!r}: two models have an alpha only")
        elif each.layers or each.gradient or each.groups:
            problems.append(f"{each.text!r}: layers, gradient and groups take a recipe (merge_method: expo)")
    if problems:
        raise UsageError(listing("Not to be tuned without a --recipe", problems))


def check_run_tunables(tunables: Sequence[Tunable]) -> None:
    """Refuse what can't be tuned of a training run: all but the step to go on to. Raises UsageError, naming each."""
    if others := [f"{each.text!r}: a run has one to_step" for each in tunables if each.text != TO_STEP]:
        raise UsageError(listing("Not to be tuned without a --recipe (merge_method: relex)", others))


def alphas_of(tunables: Sequence[Tunable], params: Mapping[str, float]) -> dict[str, Any]:
    """Return ``alpha`` and ``alpha_for`` of ``plan_extrapolation``; alpha is 0 where only filters are tuned."""
    rules = {_pattern(each.filter): params[each.text] for each in tunables if each.filter is not None}
    return {"alpha": params.get("alpha", 0.0), "alpha_for": rules}


def _pattern(text: str) -> str:
    return text[len(REGEX) :] if text.startswith(REGEX) else "" if text == "*" else re.escape(text)


class RecipeTuning:
    """A merge recipe as a tree in which some numbers are replaced."""

    def __init__(self, content: str, source: str, tunables: Sequence[Tunable], layers: int | None) -> None:
        """Read the recipe; ``layers`` is the models' number of them, for groups, or None where it isn't known.

        Raises:
            RecipeError: the text is no YAML.
            UsageError: the recipe has no number at some paths; the message has all of them.
        """
        self.tree = plain(read(content, source))
        self.tunables = tuple(tunables)
        self.layers = layers
        problems = []
        for each in self.tunables:
            try:
                self._put(deepcopy(self.tree), each, [each.range.low] * len(each.names))
            except LookupError as error:
                problems.append(f"{each.text!r}: {error.args[0]}")
        if problems:
            raise UsageError(listing(f"Not to be tuned in {source}", problems))

    @property
    def as_written(self) -> dict[str, float]:
        """The numbers that hold in the recipe: written there or further out, else defaults; else the low bound."""
        return {
            name: number
            for each in self.tunables
            for name, number in zip(each.names, self._holding(each) or [each.range.low] * len(each.names), strict=True)
        }

    @property
    def notes(self) -> tuple[str, ...]:
        """What the baseline has where no one number holds in the recipe."""
        unwritten = (each for each in self.tunables if self._holding(each) is None)
        return tuple(
            f"{each.text}: no one number of the recipe holds there: the baseline has the low end, {each.range.low:g}"
            for each in unwritten
        )

    def _holding(self, tunable: Tunable) -> list[float] | None:
        """Return the numbers that hold for a tunable; None where there are none, or others for some tensors."""
        held = _held(self.tree, tunable.path)
        if held is None and tunable.path[-2:-1] == ("parameters",):
            held = self._default(tunable.path)
        entries = self._entries(tunable, [0.0] * len(tunable.names))
        numbers = [_value_for(entry, held) for entry in entries]
        if tunable.gradient:
            numbers = numbers[0] if isinstance(numbers[0], list) else numbers * len(tunable.names)
        known = [number for number in numbers if isinstance(number, int | float) and not isinstance(number, bool)]
        if len(known) < len(numbers) or len(numbers) != len(tunable.names):
            return None
        return list(map(float, numbers))

    def _default(self, path: Sequence[str]) -> Tree:
        """Return what the method takes for a parameter that is given nowhere, if it does without."""
        name = self.tree.get("merge_method")
        if path[0] == "overrides":
            name = self.tree["overrides"][int(path[1])].get("merge_method", name)
        known = METHODS[name].parameters if name in METHODS else {}
        return known[path[-1]].default if path[-1] in known else None

    def text(self, params: Mapping[str, float]) -> str:
        """Return the recipe with these params, as YAML."""
        tree = deepcopy(self.tree)
        for each in self.tunables:
            self._put(tree, each, [params[name] for name in each.names])
        return dump(tree)

    def _put(self, tree: Tree, tunable: Tunable, numbers: Sequence[float]) -> None:
        """Put numbers at a tunable's path. Raises LookupError where that leads to no number."""
        within, last = _parent(tree, tunable.path)
        old = within.get(last) if isinstance(within, dict) else within[last]
        if isinstance(old, str) or (isinstance(old, dict) and "value" not in old):
            raise LookupError(f"{last!r} is no number")
        entries = list(self._entries(tunable, numbers))
        within[last] = entries[0]["value"] if list(entries[0]) == ["value"] else [*entries, *_beyond(old, entries)]

    def _entries(self, tunable: Tunable, numbers: Sequence[float]) -> Iterator[dict[str, Any]]:
        if tunable.groups:
            if self.layers is None or self.layers < tunable.groups:
                many = "are not known" if self.layers is None else f"are only {self.layers}"
                raise LookupError(f"the layers of the models {many}: write a --tune with layers= for each run")
            ends = [self.layers * number // tunable.groups for number in range(tunable.groups + 1)]
            for run, number in zip(pairwise(ends), numbers, strict=True):
                yield {"layers": list(run), "value": number}
            return
        entry: dict[str, Any] = {}
        if tunable.filter is not None:
            entry["filter"] = tunable.filter
        if tunable.layers is not None:
            entry["layers"] = list(tunable.layers)
        yield entry | {"value": list(numbers) if tunable.gradient else numbers[0]}


def _held(tree: Tree, path: Sequence[str]) -> Tree:
    """Return the value at a path; where it isn't written, that of the same parameter at the next level further out."""
    *outer, last = path
    levels = [tree]
    for key in outer:
        tree = tree[int(key)] if isinstance(tree, list) else tree.get(key)
        levels.append({} if tree is None else tree)
    if isinstance(levels[-1], list):
        return levels[-1][int(last)]
    within = [levels[-1], *(each.get("parameters") for each in reversed(levels[:-2]) if isinstance(each, dict))]
    found = (each.get(last) for each in within if isinstance(each, dict))
    return next((value for value in found if value is not None), None)


def _beyond(old: Tree, entries: Sequence[Mapping[str, Any]]) -> list[Tree]:
    replaced = [_condition(entry) for entry in entries]
    return [part for part in _parts(old) if _condition(part) not in replaced]


def _value_for(entry: Mapping[str, Any], held: Tree) -> Tree:
    """Return the value that holds under an entry's condition: that of the same one, else of none; None without both."""
    held_by = [(_condition(part), part.get("value")) for part in _parts(held)]
    wanted = (_condition(entry), _condition({}))
    return next((value for each in wanted for condition, value in held_by if condition == each), None)


def _parts(value: Tree) -> list[dict[str, Any]]:
    """Return the entries with conditions that a value consists of, or the one without."""
    if value is None:
        return []
    parts = value if isinstance(value, list) and value and isinstance(value[0], dict) else [value]
    return [part if isinstance(part, dict) else {"value": part} for part in parts]


def _condition(entry: Mapping[str, Any]) -> tuple[object, object]:
    return entry.get("filter", "*"), entry.get("layers") or None


def _parent(tree: Tree, path: Sequence[str]) -> tuple[Tree, Any]:
    """Return the mapping or list that holds the value at a path, and the key. A missing ``parameters`` is added.

    Raises LookupError.
    """
    for place, key in enumerate(path):
        where = ".".join(path[:place]) or "the recipe"
        last = place == len(path) - 1
        if isinstance(tree, list):
            if not key.isdecimal() or int(key) >= len(tree):
                raise LookupError(f"{where} is a list of {len(tree)}, counted from 0; got {key!r}")
            step: Any = int(key)
        elif not isinstance(tree, dict):
            raise LookupError(f"{where} is neither a mapping nor a list")
        elif key == "parameters" and not last:
            tree.setdefault(key, {})
            step = key
        elif key not in tree and (not last or place == 0 or path[place - 1] != "parameters"):
            hint = nearest(key, map(str, tree)) or f" There are: {', '.join(map(str, tree))}."
            raise LookupError(f"{where} has no {key!r}.{hint}")
        else:
            step = key
        if last:
            return tree, step
        tree = tree[step]
    raise LookupError("the path is empty")


def plain(node: Node) -> Tree:
    """Return a recipe's tree as dicts, lists and values, without its places in the text."""
    if isinstance(node, Fields):
        # A revision is text: 1e5 is one, though YAML reads a number.
        return {
            key.text: value.text if key.text == "revision" and isinstance(value, Scalar) else plain(value)
            for key, value in node.entries
        }
    if isinstance(node, Items):
        return [plain(item) for item in node.items]
    assert isinstance(node, Scalar)
    value: Value | None = node.value
    return value
