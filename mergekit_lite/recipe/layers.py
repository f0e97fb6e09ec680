"""Layers of models by the names of their tensors, and what the layers of the output are made of.

Layers are found from the tensors' names, not from a table of architectures. The first component of a name that is a
number counts the layers: ``model.layers.7.mlp.up_proj.weight``, ``transformer.h.7.ln_1.bias``, ``blocks.7.ln1.weight``.
Numbers further behind (experts, modules of a sequence) are part of the tensor's name within its layer. What stands
before the numbers 0 to n − 1 is a *stack* of n layers; a model may have several (an encoder and a decoder, a vision
tower). A number right before the last component (``classifier.0.weight``) counts no layers unless other names of the
stack go deeper.

In a frankenmerge the tensors before the layers (embeddings) come from the first slice and those behind them (the last
norm, the head) from the last one.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from fractions import Fraction
from functools import lru_cache
from types import MappingProxyType
from typing import NamedTuple

from mergekit_lite.errors import counted
from mergekit_lite.recipe.recipe import Slice, Source
from mergekit_lite.recipe.rules import Spot

FIRST_NUMBER = re.compile(r"(?:(.*?)\.)??(0|[1-9][0-9]{0,6})\.(.*)", re.DOTALL)
# Behind the layers. Embeddings have norms too (emb.norm), and a head may be called embed_out.
HEAD = re.compile(r"embed_out|lm_head|(^|\.)(head|output|output_layer|score|classifier|logits?)(\.|$)")
EMBEDDING = re.compile(r"emb|wte|wpe", re.IGNORECASE)
LAST_NORM = re.compile(r"norm|ln_f|ln_out|final")


class Place(NamedTuple):
    """A tensor's place within a stack: ``{stack}.{layer}.{rest}``."""

    stack: str
    layer: int
    rest: str


class Output(NamedTuple):
    """A tensor of the output, and the tensors of its slice's sources that it is made of."""

    spot: Spot  # its name and layer in the output
    part: int  # which slice it is from
    t: Fraction  # where it stands along the gradients of its slice
    sources: tuple[int, ...]  # those that have such a tensor, in their order
    spots: tuple[Spot, ...]  # name and layer of each source's tensor

    @property
    def inputs(self) -> tuple[tuple[int, Spot], ...]:
        """Each source with the name and the layer of its tensor."""
        return tuple(zip(self.sources, self.spots, strict=True))


class Outputs(NamedTuple):
    """The tensors of the output, how many layers they have (None for as many as before), and what is wrong."""

    tensors: tuple[Output, ...]
    layers: int | None
    problems: tuple[str, ...]


def place(name: str) -> Place | None:
    """Return the place of a tensor by the first number in its name; None where its name has none."""
    match = FIRST_NUMBER.fullmatch(name)
    return Place(match[1] or "", int(match[2]), match[3]) if match else None


def stacks(names: Iterable[str]) -> dict[str, int]:
    """Return the stacks of layers in a model, with their lengths.

    >>> stacks(["embed.weight", "h.0.mlp.weight", "h.1.mlp.weight", "score.0.weight"])
    {'h': 2}
    """
    return _stacks(map(place, names))


def _stacks(places: Iterable[Place | None]) -> dict[str, int]:
    """Return the stacks of layers, with their lengths, by the places of a model's tensors."""
    numbers: dict[str, set[int]] = {}
    deep = set()
    for at in filter(None, places):
        numbers.setdefault(at.stack, set()).add(at.layer)
        if "." in at.rest:
            deep.add(at.stack)
    return {stack: len(own) for stack, own in numbers.items() if stack in deep and max(own) == len(own) - 1}


@lru_cache(maxsize=1 << 10)
def depth(layer: int, layers: int) -> Fraction:
    """Return t of one layer of ``layers``."""
    return Fraction(layer, layers - 1) if layers > 1 else Fraction(1)


def outputs(
    slices: Sequence[Slice],
    names: Mapping[str, Sequence[str]],
    first: str | None = None,
    promised: Mapping[str, int | None] = MappingProxyType({}),
) -> Outputs:
    """Return what each tensor of the output of a recipe's slices is made of.

    Args:
        slices: of the recipe.
        names: each model's tensors, by its reference.
        first: the model whose tensors come first where layers are not moved; by default the base, else the first one.
        promised: how many layers each model's config promises; those behind them (multi-token prediction) are not
            counted where other models lack them.
    """
    if len(slices) == 1 and (slices[0].is_whole or _takes_all(slices[0], names)):
        return _merged(slices[0], names, first or slices[0].sources[slices[0].base or 0].model, promised)
    return _stacked(slices, names)


def _takes_all(part: Slice, names: Mapping[str, Sequence[str]]) -> bool:
    """Return whether a slice takes all layers of models that have several stacks, as ``models:`` does.

    A vision-language model's tower is no part of what mergekit's ranges count, and is merged with the rest.
    """
    depths = [(source.layers, stacks(names[source.model])) for source in part.sources]
    several = any(len(lengths) > 1 for _, lengths in depths)
    return several and all(layers in [(0, length) for length in lengths.values()] for layers, lengths in depths)


def _merged(part: Slice, names: Mapping[str, Sequence[str]], first: str, promised: Mapping[str, int | None]) -> Outputs:
    """Return what ``models:`` makes: every name of every model."""
    places = {name: place(name) for source in part.sources for name in names[source.model]}
    own = {source.model: _stacks(map(places.__getitem__, names[source.model])) for source in part.sources}
    depths = _counted(own, promised)
    order = sorted(range(len(part.sources)), key=lambda index: part.sources[index].model != first)
    lengths: dict[str, dict[int, str]] = {}
    for index in order:
        for stack, length in depths[part.sources[index].model].items():
            lengths.setdefault(stack, {}).setdefault(length, part.sources[index].model)
    problems = [
        f"{stack} has {' and '.join(f'{length} layers in {model}' for length, model in seen.items())}: "
        "models with different numbers of layers are merged by 'slices', each with its layer_range"
        for stack, seen in lengths.items()
        if len(seen) > 1
    ]
    one: dict[tuple[int, ...], tuple[int, ...]] = {}  # the same tuple for the same sources: most tensors are in all
    having: dict[str, tuple[int, ...]] = {}
    for index in order:
        for name in names[part.sources[index].model]:
            sources = tuple(sorted((*having.get(name, ()), index)))
            having[name] = one.setdefault(sources, sources)
    tensors = []
    for name, sources in having.items():
        at = places.pop(name)
        length = next(iter(lengths[at.stack])) if at and at.stack in lengths else 0
        if at and length and len(lengths[at.stack]) > 1 and at.layer >= min(lengths[at.stack]):
            continue  # a layer that some models lack: that is one problem, not one of each tensor
        spot = Spot(name, at.layer if at and length else None)
        t = depth(spot.layer, max(length, spot.layer + 1)) if spot.layer is not None else Fraction(0)
        tensors.append(Output(spot, 0, t, sources, (spot,) * len(sources)))
    return Outputs(tuple(tensors), None, tuple(problems))


def _counted(depths: Mapping[str, dict[str, int]], promised: Mapping[str, int | None]) -> dict[str, dict[str, int]]:
    """Return the lengths of each model's stacks; where models differ, without layers behind those promised."""
    differing = {stack for own in depths.values() for stack in own if len({d.get(stack) for d in depths.values()}) > 1}
    return {
        model: {
            stack: min(length, promised.get(model) or length) if stack in differing else length
            for stack, length in own.items()
        }
        for model, own in depths.items()
    }


class _Layered(NamedTuple):
    """A model's tensors by layer."""

    stack: str
    layers: tuple[tuple[str, ...], ...]  # the rests of the names
    others: tuple[str, ...]


def _stacked(slices: Sequence[Slice], names: Mapping[str, Sequence[str]]) -> Outputs:
    problems: list[str] = []
    models = dict.fromkeys(source.model for part in slices for source in part.sources)
    layered = {model: _layered(model, names[model], problems) for model in models}
    known = {model: each for model, each in layered.items() if each is not None}
    for part in slices:
        problems += filter(None, [part.uneven])
        for source in part.sources:
            if source.model in known:
                problems += _beyond(source, known[source.model])
    named = {each.stack for each in known.values()}
    if len(named) > 1:
        listed = ", ".join(f"{each.stack} in {model}" for model, each in known.items())
        problems.append(f"the layers have different names, so they can't stand behind each other: {listed}")
    if problems:
        return Outputs((), None, tuple(problems))
    stack = named.pop()
    tensors = _outside(slices[0], 0, known, behind=False)
    total = 0
    for number, part in enumerate(slices):
        ranges = [_range(source, known[source.model]) for source in part.sources]
        length = ranges[0][1] - ranges[0][0]
        for layer in range(length):
            rests: dict[str, dict[int, Spot]] = {}
            for index, source in enumerate(part.sources):
                at = ranges[index][0] + layer
                for rest in known[source.model].layers[at]:
                    rests.setdefault(rest, {})[index] = Spot(_name(stack, at, rest), at)
            t, at = depth(layer, length), total + layer
            tensors += [
                Output(Spot(_name(stack, at, rest), at), number, t, tuple(of), tuple(of.values()))
                for rest, of in rests.items()
            ]
        total += length
    tensors += _outside(slices[-1], len(slices) - 1, known, behind=True)
    return Outputs(tuple(tensors), total, ())


def _name(stack: str, layer: int, rest: str) -> str:
    return f"{stack}.{layer}.{rest}" if stack else f"{layer}.{rest}"


def _range(source: Source, layered: _Layered) -> tuple[int, int]:
    return source.layers or (0, len(layered.layers))


def _layered(model: str, names: Sequence[str], problems: list[str]) -> _Layered | None:
    depths = stacks(names)
    if len(depths) != 1:
        listed = ", ".join(f"{stack} ({counted(length, 'layer')})" for stack, length in depths.items())
        got = f"has several: {listed}" if depths else "has none whose numbers run from 0 to n − 1"
        whole = "; to merge all its layers list it under 'models', without a layer_range" if depths else ""
        problems.append(f"slices need a model with one stack of layers, and {model} {got}{whole}")
        return None
    [(stack, length)] = depths.items()
    layers: list[list[str]] = [[] for _ in range(length)]
    others = []
    for name in names:
        at = place(name)
        if at and at.stack == stack:
            layers[at.layer].append(at.rest)
        else:
            others.append(name)
    return _Layered(stack, tuple(map(tuple, layers)), tuple(others))


def _beyond(source: Source, layered: _Layered) -> list[str]:
    start, end = _range(source, layered)
    layer_range = f"line {source.at.line}: layer_range [{start}, {end}]"
    if start >= end:
        return [f"{layer_range} of {source.model} is empty"]
    number = len(layered.layers)
    return [f"{layer_range} goes too far, {source.model} has {counted(number, 'layer')}"] if end > number else []


def _outside(part: Slice, number: int, known: Mapping[str, _Layered], behind: bool) -> list[Output]:
    having: dict[str, dict[int, Spot]] = {}
    for index, source in enumerate(part.sources):
        for name in known[source.model].others:
            if is_behind(name) == behind:
                having.setdefault(name, {})[index] = Spot(name)
    return [Output(Spot(name), number, Fraction(0), tuple(of), tuple(of.values())) for name, of in having.items()]


def is_behind(name: str) -> bool:
    """Return whether a tensor outside the layers stands behind them."""
    return bool(HEAD.search(name)) or (not EMBEDDING.search(name) and bool(LAST_NORM.search(name)))
