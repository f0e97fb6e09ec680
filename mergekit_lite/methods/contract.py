"""What a method is: a function of a tensor's facts and its parameters that says how the tensor's blocks are merged.

A method that needs no statistic returns at once what merges a block: an operation (``ops.operations``), or a function
of torch tensors. One that needs statistics is a generator: it yields the reductions it needs, is sent each one's total,
and returns what merges a block. Reductions over a group of tensors come before those over the tensor alone; tensors of
one group ask for the same number of them, as each step follows from the totals alone.

``TensorMerge`` leads one tensor through this; who reads the blocks, and from where, is not the method's business.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Generator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypeVar

from mergekit_lite.ops.operations import Block as Block
from mergekit_lite.ops.operations import Merge as Merge
from mergekit_lite.ops.operations import Statistic, WeightedSum

if TYPE_CHECKING:
    import numpy.typing as npt

Totals: TypeAlias = "npt.NDArray[Any]"  # small, on the host, float64 or int64
Answer = TypeVar("Answer")


@dataclass(frozen=True)
class TensorInfo:
    """What a method may know of the tensor it merges.

    Attributes:
        name: of the output tensor.
        shape: of the output tensor and of every input.
        models: number of inputs without the base.
        has_base: whether a block begins with the base.
        seed: of everything random.
        offset: elements in the tensors before this one, in the order of the plan: an element's place in the model.
        extent: elements in all tensors of the plan.
        fisher: whether a block ends with the Fisher information of each model, in the order of the models.
        gram_axis: where a Gram matrix of the inputs of each model's layer is there, the tensor's axis that meets those
            inputs; else None. The matrices follow the inputs of a whole tensor: float64, square, of that axis's size.
    """

    name: str
    shape: tuple[int, ...]
    models: int
    has_base: bool
    seed: int = 0
    offset: int = 0
    extent: int = 0
    fisher: bool = False
    gram_axis: int | None = None

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return math.prod(self.shape)

    @property
    def inputs(self) -> int:
        """Number of inputs, the base included."""
        return self.models + self.has_base


@dataclass(frozen=True)
class Reduction:
    """The one primitive statistic: a few figures that are additive over blocks, or what follows from a whole tensor.

    Attributes:
        of: what gives the figures of a block. Totals of float64 depend on the cut into blocks in their last bits, so it
            has to be the same in every run.
        group: None for the sum over this tensor; else the sum over all tensors that ask for the same group.
        within: (begin, end), the only elements of this tensor that contribute; None for all. The others need not be
            visited.
        sampled: only a sample of the elements contributes, whose blocks begin at no index in particular.
        held: 0, or of what can't be had block by block the most float64 numbers that are in memory for it at once. The
            one block is then the whole tensor: its inputs in float64 and in the tensor's shape, each of them read anew
            where the function takes it by its index. The total is what the function returns, on its device, however
            large.
    """

    of: Statistic
    group: str | None = None
    within: tuple[int, int] | None = None
    sampled: bool = False
    held: int = 0


@dataclass(frozen=True)
class Explained:
    """How much of the models' squared distances from the base lies along what a method takes for them.

    Attributes:
        along: the part of it.
        total: the sum of the squared distances.
        bound: the share below which a method that relies on it should not be trusted.
    """

    along: float
    total: float
    bound: float


@dataclass(frozen=True)
class WithCoefficients:
    """What merges a block, with what statistics gave and the report tells: one coefficient for each model, and more."""

    coefficients: tuple[float, ...]
    merge: Merge
    explained: Explained | None = None


Gathering: TypeAlias = Generator[Reduction, "Totals", Answer]  # yields reductions, is sent their totals
Steps: TypeAlias = Gathering[Merge | WithCoefficients]


def answered(steps: Gathering[Answer], total: Callable[[Reduction], Totals]) -> Answer:
    """Lead a generator of reductions to its end: ``total`` gives each one's. Returns what it returns."""
    try:
        reduction = next(steps)
        while True:
            reduction = steps.send(total(reduction))
    except StopIteration as finished:
        answer: Answer = finished.value
        return answer


def step_from(origin: int, share: float) -> WeightedSum:
    """Return what gives x + share·(y − x) of two inputs, x being the ``origin``-th: x to the bit where share is 0."""
    if share == 0:
        return WeightedSum((1.0,), order=(origin,))
    return WeightedSum((share,), from_base=True, order=(origin, 1 - origin))
