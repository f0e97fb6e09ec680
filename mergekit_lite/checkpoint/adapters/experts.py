"""Which tensors of a base a LoRA on the experts of its layers is for, and what is added to each.

Experts are one tensor of three axes for each parameter, as transformers has them, or one matrix each, as most files of
the hub do. Factors don't say which parameter of a layer they are for, nor which axis is the rows': the shapes do.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import count, takewhile
from typing import NamedTuple

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.adapters.config import MERGE_IT
from mergekit_lite.checkpoint.adapters.factors import AXES_AS_MEANT, ExpertFactors
from mergekit_lite.checkpoint.adapters.names import APART
from mergekit_lite.checkpoint.encodings.low_rank import LowRank
from mergekit_lite.checkpoint.encodings.stack import StackedLowRank, matrix_of
from mergekit_lite.checkpoint.encodings.strided import strides_of, viewed
from mergekit_lite.checkpoint.encodings.sum import Term
from mergekit_lite.checkpoint.tensor import TensorSpec


class Matrix(NamedTuple):
    """A tensor of the base that holds one matrix of an expert, or some rows of it."""

    name: str
    expert: int
    first: int  # row of the expert's matrix
    rows: int


@dataclass(frozen=True)
class Stack:
    """A parameter of all experts of a layer."""

    shape: tuple[int, ...]  # (experts, rows, columns)
    name: str = ""  # of the tensor that holds it
    apart: tuple[Matrix, ...] = ()  # the tensors that hold it where it isn't one

    def terms_of(self, term: StackedLowRank) -> Iterator[tuple[str, Term]]:
        """Yield what is added to each tensor, by its name."""
        if self.name:
            yield self.name, term
        for matrix in self.apart:
            left = matrix_of(term.left, matrix.expert)
            strides = strides_of(left)
            left = viewed(left, matrix.first * strides[0], (matrix.rows, left.shape[1]), strides)
            yield matrix.name, LowRank(left, matrix_of(term.right, matrix.expert), scale=term.scale)


def terms_of_experts(
    experts: Mapping[str, Sequence[ExpertFactors]],
    name_in: Mapping[str, str],
    base: Mapping[str, TensorSpec],
    version: tuple[int, ...],
) -> tuple[dict[str, Term], list[str]]:
    """Return what a LoRA on experts adds to the tensors of a base, by name, and what is wrong.

    Args:
        experts: the factors of each layer of the adapter.
        name_in: the base's names for those of the adapter, as ``names`` finds them.
        base: the tensors of the base.
        version: of the peft that wrote the adapter.
    """
    added: dict[str, Term] = {}
    problems: list[str] = []
    matched: list[tuple[ExpertFactors, str, Stack, list[bool]]] = []
    layouts: set[bool] = set()
    for layer, parts in experts.items():
        stacks = {name: _stack(layer, name, name_in, base) for name in parts[0].ranks}
        own = {name: stack for name, stack in stacks.items() if stack is not None}
        if (layout := _is_turned(own, base)) is not None:
            layouts.add(layout)
        for factors in parts:
            fitting = {name: ways for name, stack in own.items() if (ways := factors.fits(name, stack.shape))}
            if len(fitting) != 1:
                problems.append(_misfit(factors, layer, own, list(fitting)))
                continue
            [(name, ways)] = fitting.items()
            if any(stack is own[name] for _, _, stack, _ in matched):
                problems.append(f"{factors.a.name}: another LoRA of the adapter is for {layer}.{name} too")
            matched.append((factors, name, own[name], ways))
    # All experts of a model are stored alike, so where one matrix isn't square, it says how the square ones are meant.
    said = {ways[0] for _, _, _, ways in matched if len(ways) == 1}
    if not said and len(layouts) == 1:
        said = {layouts.pop() or version < AXES_AS_MEANT}
    for factors, name, stack, ways in matched:
        if len(ways) == 1 or len(said) == 1:
            turned = ways[0] if len(ways) == 1 else next(iter(said))
            added.update(stack.terms_of(factors.term_for(name, stack.shape[0], turned)))
        else:
            problems.append(
                f"{factors.a.name}: is for square matrices, {list(stack.shape)}, and nothing says which axis is the "
                f"rows'. {MERGE_IT}"
            )
    for name in [name for name in added if not dtypes.is_float(base[name].dtype)]:
        problems.append(f"{name}: is {base[name].dtype} in the base, which is not for arithmetic")
    return added, problems


def _stack(layer: str, parameter: str, name_in: Mapping[str, str], base: Mapping[str, TensorSpec]) -> Stack | None:
    """Return where a base has a parameter of experts; None where it doesn't."""
    name = name_in[f"{layer}.{parameter}"]
    if name in base:
        return Stack(base[name].shape, name)
    for parts in APART.get(parameter, ()):
        layer_in = name_in[f"{layer}.0.{parts[0]}.weight"].removesuffix(f".0.{parts[0]}.weight")
        experts = list(takewhile(all, _apart(layer_in, parts, base)))
        shapes = {spec.shape for group in experts for spec in group if spec is not None}
        if len(shapes) == 1:
            rows, columns = shapes.pop()
            matrices = [
                Matrix(spec.name, expert, number * rows, rows)
                for expert, group in enumerate(experts)
                for number, spec in enumerate(group)
                if spec is not None
            ]
            return Stack((len(experts), len(parts) * rows, columns), apart=tuple(matrices))
    return None


def _apart(layer: str, parts: Sequence[str], base: Mapping[str, TensorSpec]) -> Iterator[list[TensorSpec | None]]:
    """Yield for the first expert, the second and so on the matrices that these parts have in a base, or None."""
    for expert in count():
        yield [base.get(f"{layer}.{expert}.{part}.weight") for part in parts]


def _is_turned(stacks: Mapping[str, Stack], base: Mapping[str, TensorSpec]) -> bool | None:
    """Return whether a layer's experts are stored as (in, out); None where their shapes don't say."""
    if any(stack.apart for stack in stacks.values()):
        return False
    up = stacks.get("gate_up_proj") or _sibling(stacks, "down_proj", "gate_up_proj", base)
    down = stacks.get("down_proj") or _sibling(stacks, "gate_up_proj", "down_proj", base)
    if up is None or down is None or len(up.shape) != 3 or len(down.shape) != 3:
        return None
    straight = up.shape[1] == 2 * down.shape[2] and up.shape[2] == down.shape[1]
    turned = up.shape[2] == 2 * down.shape[1] and up.shape[1] == down.shape[2]
    return turned if straight != turned else None


def _sibling(stacks: Mapping[str, Stack], own: str, other: str, base: Mapping[str, TensorSpec]) -> Stack | None:
    """Return the other parameter of a layer of which one has factors."""
    spec = base.get(stacks[own].name.removesuffix(own) + other) if own in stacks else None
    return None if spec is None else Stack(spec.shape, spec.name)


def _misfit(factors: ExpertFactors, layer: str, stacks: Mapping[str, Stack], fitting: Sequence[str]) -> str:
    """Return the message for factors that fit none of a layer's parameters, or several."""
    names = ", ".join(f"{name} {list(stack.shape)}" for name, stack in stacks.items())
    product = f"{factors.a.name}: {list(factors.a.shape)} and {list(factors.b.shape)}"
    if not stacks:
        names = " or ".join(factors.ranks)
        return f"{factors.a.name}: the base has no {names} of experts at {layer}. Is it the right base?"
    if fitting:
        return f"{product} fit {' and '.join(fitting)} alike, so it can't be told which is meant. {MERGE_IT}"
    return f"{product} fit no parameter of the experts of {layer} in the base: {names}. Is it the right base?"
