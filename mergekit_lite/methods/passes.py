"""What a method is made of: passes over one tensor that gather statistics, then one that combines.

A method that needs no statistic returns its ``Combine`` at once. One that does is a generator: it yields the
reductions it needs, is sent each one's total, and returns its ``Combine``. Reductions over a group of tensors come
before those over the tensor alone; tensors of one group ask for the same number of them, as each step follows from the
totals alone.

``Passes`` leads one tensor through this; who reads the blocks, and from where, is not the method's business.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Callable, Generator, Iterable, Sequence
from dataclasses import dataclass
from functools import reduce
from typing import TYPE_CHECKING, Any, TypeAlias

from mergekit_lite.deferred import np, torch
from mergekit_lite.ops import c_ops

if TYPE_CHECKING:
    import numpy.typing as npt

# The last bits of float64 sums depend on how they are cut: blocks are summed to sections, sections to the total.
STATISTICS_BLOCK = 1 << 17  # elements
SECTION = 1 << 23  # elements; what one worker sums at a time
SAMPLE_PIECE, SAMPLE_EVERY = 1 << 12, 32  # a sample is every 32nd piece of so many elements, the first one always

# The inputs of one block, the base's first where there is one; all of one shape and dtype.
Block: TypeAlias = list["torch.Tensor"]
Combine: TypeAlias = Callable[[Block, int], "torch.Tensor"]  # (block, index of its first element) to the merged block
Totals: TypeAlias = "npt.NDArray[Any]"  # small, on the host, float64 or int64
Kernel = Callable[[Sequence[c_ops.Run], int, c_ops.Run], None]  # the same, into the third argument


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
    """

    name: str
    shape: tuple[int, ...]
    models: int
    has_base: bool
    seed: int = 0
    offset: int = 0
    extent: int = 0

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
    """The one primitive statistic: a few numbers that are additive over blocks.

    Attributes:
        of: (block, index of its first element) to a small tensor of fixed shape, float64 or int64. Totals of float64
            depend on the cut into blocks in their last bits, so it has to be the same in every run.
        group: None for the sum over this tensor; else the sum over all tensors that ask for the same group.
        within: (begin, end), the only elements of this tensor that contribute; None for all. The others need not be
            visited.
        sampled: only a sample of the elements contributes, whose blocks begin at no index in particular.
        kernel: the same of blocks that ``kernels`` takes, where there is one.
    """

    of: Callable[[Block, int], torch.Tensor]
    group: str | None = None
    within: tuple[int, int] | None = None
    sampled: bool = False
    kernel: Callable[[Sequence[c_ops.Run], int], Totals] | None = None


Steps: TypeAlias = Generator[Reduction, "Totals", Combine]


@dataclass(frozen=True)
class Compiled:
    """A ``Combine`` with a kernel that does the same to 16-bit blocks, and rounds by itself."""

    combine: Combine
    kernel: Kernel

    def __call__(self, block: Block, start: int) -> torch.Tensor:
        """Merge one block."""
        return self.combine(block, start)


@dataclass(frozen=True)
class Weighted:
    """A ``Combine`` whose coefficients were found by statistics and are worth a report: one for each model."""

    coefficients: tuple[float, ...]
    combine: Combine

    def __call__(self, block: Block, start: int) -> torch.Tensor:
        """Merge one block."""
        return self.combine(block, start)


@dataclass(frozen=True)
class Observed:
    """Sums over a merged block and its inputs that tell what the merge did to them.

    Attributes:
        by_torch: (merged block, inputs), both 1-D as they are stored, to the sums.
        by_kernel: the same of what ``kernels`` takes.
    """

    by_torch: Callable[[torch.Tensor, Block], tuple[float, ...]]
    by_kernel: Callable[[c_ops.Run, Sequence[c_ops.Run]], tuple[float, ...]]


class Passes:
    """One tensor on its way through a method.

    Attributes:
        request: the sums it waits for, or None when it has all it needs.
        combine: what merges its blocks, once ``request`` is None.
    """

    def __init__(self, plan: Combine | Steps) -> None:
        """Go as far as the first request."""
        self.request: Reduction | None = None
        self.combine: Combine | None = None
        self._steps: Steps | None = None
        if isinstance(plan, Generator):
            self._steps = plan
            self._go_on(None)
        else:
            self.combine = plan

    @property
    def group(self) -> str | None:
        """The group of tensors whose sums it waits for."""
        return self.request.group if self.request is not None else None

    @property
    def kernel(self) -> Kernel | None:
        """What merges blocks that ``kernels`` takes, once no sums are missing, where there is such."""
        combine = self.combine.combine if isinstance(self.combine, Weighted) else self.combine
        return combine.kernel if isinstance(combine, Compiled) else None

    def send(self, total: Totals) -> None:
        """Hand over the total of the requested sums and go as far as the next request."""
        with np.errstate(all="ignore"):  # what isn't finite goes through, and is found in the output
            self._go_on(total)

    def sum(self, stored: Block, start: int, working: torch.dtype, row: int) -> torch.Tensor:
        """The requested sums over one block by torch.

        Args:
            stored: the inputs, 1-D, of any dtype, the base's first.
            start: index of the first element.
            working: the dtype to compute in.
            row: length of the rows that the method wants; 0 for none.
        """
        assert self.request is not None
        return self.request.of(_widened(stored, working, row), start)

    def merge(self, stored: Block, start: int, working: torch.dtype, row: int) -> torch.Tensor:
        """Merge one block by torch, 1-D, once no sums are missing. Arguments as of ``sum``; the working dtype comes."""
        assert self.combine is not None
        return self.combine(_widened(stored, working, row), start).reshape(-1)

    def _go_on(self, total: Totals | None) -> None:
        assert self._steps is not None
        try:
            self.request = self._steps.send(total)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as finished:
            self.request, self.combine = None, finished.value


def joined(parts: Iterable[Totals]) -> Totals:
    """The sum of some parts, in their order."""
    return reduce(operator.add, parts)


def send_totals(waiting: Sequence[Passes], parts: Sequence[Sequence[Totals]]) -> None:
    """Send each the total of its group, or its own where it has none.

    Args:
        waiting: passes with a request, in the order of the plan: it fixes the last bits.
        parts: for each the sums over its sections; none where nothing of it contributes to its group.
    """
    groups = [passes.group or number for number, passes in enumerate(waiting)]
    sums: dict[str | int, list[Totals]] = {}
    for group, of_one in zip(groups, parts, strict=True):
        if of_one:
            sums.setdefault(group, []).append(joined(of_one))
    totals = {group: joined(of_group) for group, of_group in sums.items()}
    for passes, group in zip(waiting, groups, strict=True):
        passes.send(totals[group])


def statistics_block(row: int) -> int:
    """Elements summed at once, in whole rows where blocks must not split them."""
    return max(1, STATISTICS_BLOCK // max(1, row)) * max(1, row)


def sections(request: Reduction, elements: int, row: int) -> list[tuple[int, int]]:
    """The (begin, end) of each section of a tensor that contributes to the requested sums."""
    block = statistics_block(row)
    length = max(1, SECTION // block) * block
    begin, end = request.within or (0, elements)
    end = min(end, elements)
    return [
        (max(first, begin // block * block), min(first + length, -(-end // block) * block, elements))
        for first in range(begin // length * length, end if begin < end else 0, length)
    ]


def sample(begin: int, end: int) -> list[tuple[int, int]]:
    """The (start, count) of each piece of a tensor's sample in the section ``begin … end``."""
    return [(start, min(SAMPLE_PIECE, end - start)) for start in range(begin, end, SAMPLE_PIECE * SAMPLE_EVERY)]


def deltas(block: Block) -> Block:
    """What each model of a block adds to the base: new tensors, free to be changed in place."""
    return [tensor - block[0] for tensor in block[1:]]


def weighted_sum(tensors: Block, coefficients: Sequence[float]) -> torch.Tensor:
    """Σ coefficient·tensor over at least one tensor of one shape and dtype: a new tensor.

    Products are rounded before they are added: so every device, and a kernel, comes to the same.
    """
    total = tensors[0] * coefficients[0]
    for tensor, coefficient in zip(tensors[1:], coefficients[1:], strict=True):
        total.add_(tensor * coefficient)
    return total


def sum_of_inputs(coefficients: Sequence[float], divisor: float = 1.0) -> Compiled:
    """What gives (Σ coefficient·x) / divisor, over all inputs of a block."""
    keeps = (c_ops.Keep(),) * len(coefficients)

    def combine(block: Block, _: int) -> torch.Tensor:
        total = weighted_sum(block, coefficients)
        return total if divisor == 1 else total.div_(divisor)

    def kernel(block: Sequence[c_ops.Run], start: int, out: c_ops.Run) -> None:
        c_ops.merge_sum(out, block, False, coefficients, divisor, keeps, start)

    return Compiled(combine, kernel)


def sum_of_deltas(coefficients: Sequence[float]) -> Compiled:
    """What gives base + Σ coefficient·delta."""
    keeps = (c_ops.Keep(),) * len(coefficients)
    return Compiled(
        lambda block, _: weighted_sum(deltas(block), coefficients).add_(block[0]),
        lambda block, start, out: c_ops.merge_sum(out, block, True, coefficients, 1.0, keeps, start),
    )


def moved(origin: int, share: float) -> Compiled:
    """What gives x + share·(y − x) of two inputs, x being the ``origin``-th: x itself, to the bit, where share is 0."""
    order = (origin, 1 - origin) if share else (origin,)
    way = sum_of_deltas((share,)) if share else sum_of_inputs((1.0,))
    return Compiled(
        lambda block, start: way.combine([block[i] for i in order], start),
        lambda block, start, out: way.kernel([block[i] for i in order], start, out),
    )


def _widened(stored: Block, working: torch.dtype, row: int) -> Block:
    wide = [tensor.to(working) for tensor in stored]
    return [tensor.view(-1, row) for tensor in wide] if row else wide
