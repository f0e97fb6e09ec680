"""One tensor on its way through its method: statistics, then the merge."""

from __future__ import annotations

import operator
from collections.abc import Callable, Generator, Iterable, Mapping, Sequence
from functools import reduce
from typing import Any

from mergekit_lite.deferred import np, torch
from mergekit_lite.methods.contract import Explained, Merge, Reduction, Steps, TensorInfo, Totals, WithCoefficients
from mergekit_lite.methods.registry import Method
from mergekit_lite.ops import Ops, TensorKind, ops_for
from mergekit_lite.ops.operations import Cast

# The last bits of float64 sums depend on how they are cut: blocks are summed to sections, sections to the total.
STATISTICS_BLOCK = 1 << 17  # elements
SECTION = 1 << 23  # elements; what one worker sums at a time
SAMPLE_PIECE, SAMPLE_EVERY = 1 << 12, 32  # a sample is every 32nd piece of so many elements, the first one always


class TensorMerge:
    """One tensor on its way through a method.

    Attributes:
        info: the tensor.
        row: the length of the rows that blocks don't split, 0 where it may be cut anywhere.
        request: the reduction it waits for, or None when it has all it needs.
        coefficients: one for each model, where statistics gave some that are worth a report.
        explained: how much of the models' changes the method takes in, where it tells.
    """

    def __init__(
        self,
        method: Method,
        info: TensorInfo,
        arguments: Mapping[str, Any],
        dtypes: Sequence[str],
        rounding_key: int | None = None,
    ) -> None:
        """Go as far as the method's first request; ``arguments`` are from ``Method.resolve``."""
        self.info = info
        self.row = method.rows(info.shape, **arguments) if method.rows is not None else 0
        self.request: Reduction | None = None
        self.coefficients: tuple[float, ...] = ()
        self.explained: Explained | None = None
        self._kind = TensorKind(tuple(dtypes), info.numel, self.row, rounding_key)
        self._steps: Steps | None = None
        self._merge: Merge | None = None
        self._has_float_sums = False
        begun = method.function(info, **arguments) if info.numel else Cast()  # there is nothing in an empty tensor
        if isinstance(begun, Generator):
            self._steps = begun
            self._advance(None)
        else:
            self._finish(begun)

    @property
    def group(self) -> str | None:
        """The group of tensors whose sums it waits for."""
        return self.request.group if self.request is not None else None

    @property
    def merge(self) -> Merge:
        """What merges a block, once nothing is requested."""
        assert self._merge is not None
        return self._merge

    @property
    def depends_on_device(self) -> bool:
        """Whether the last bits may differ between kinds of devices, as far as is known before the merge is.

        Operations give the same bits everywhere, and so do counts. Sums of floats depend on the order in which a device
        adds, and a function of a method may do what it likes.
        """
        return self._has_float_sums or callable(self._merge)

    def ops(self, device: str) -> Ops:
        """Return the backend for what is to be done to blocks now: the requested reduction, or the merge."""
        return ops_for(self.merge if self.request is None else self.request.of, self._kind, device)

    def send(self, total: Totals) -> None:
        """Hand over the total of the requested reduction and go as far as the next request."""
        assert self.request is not None
        self._has_float_sums |= self.request.held > 0 or total.dtype.kind == "f"
        with np.errstate(all="ignore"):  # what isn't finite goes through, and is found in the output
            self._advance(total)

    def send_whole(self, take: Callable[[int], torch.Tensor]) -> None:
        """Answer a request for the whole tensor, whose inputs ``take`` returns by number, 1-D.

        The base's is the first one; Gram matrices come last.
        """
        assert self.request is not None and callable(self.request.of)
        with torch.inference_mode():
            self.send(self.request.of(_Taken(take, self.info), 0))  # type: ignore[arg-type]  # lazy, and large

    def sections(self) -> list[tuple[int, int]]:
        """Return the (begin, end) of each section of the tensor that contributes to the requested reduction."""
        assert self.request is not None
        block, numel = self.statistics_block, self.info.numel
        length = max(1, SECTION // block) * block
        begin, end = self.request.within or (0, numel)
        end = min(end, numel)
        first_block, stop = begin // block * block, min(-(-end // block) * block, numel)
        sections = range(begin // length * length, end if begin < end else 0, length)
        return [(max(first, first_block), min(first + length, stop)) for first in sections]

    @property
    def statistics_block(self) -> int:
        """Elements summed at once, in whole rows where blocks must not split them."""
        row = max(1, self.row)
        return max(1, STATISTICS_BLOCK // row) * row

    def _advance(self, total: Totals | None) -> None:
        assert self._steps is not None
        try:
            self.request = self._steps.send(total)  # type: ignore[arg-type]  # None starts a generator
        except StopIteration as finished:
            self.request = None
            self._finish(finished.value)

    def _finish(self, merge: Merge | WithCoefficients) -> None:
        if isinstance(merge, WithCoefficients):
            self.coefficients, self.explained, merge = merge.coefficients, merge.explained, merge.merge
        self._merge = merge


class _Taken(Sequence["torch.Tensor"]):
    """The inputs of a whole tensor, then Gram matrices, each taken when it is asked for: float64, in its shape."""

    def __init__(self, take: Callable[[int], torch.Tensor], info: TensorInfo) -> None:
        self._take = take
        self._info = info

    def __len__(self) -> int:
        return self._info.inputs + (self._info.models if self._info.gram_axis is not None else 0)

    def __getitem__(self, number: Any) -> Any:
        if not 0 <= number < len(self):
            raise IndexError(number)
        shape = self._info.shape
        if number >= self._info.inputs and self._info.gram_axis is not None:
            shape = (shape[self._info.gram_axis],) * 2
        return self._take(number).double().view(shape)


def joined(parts: Iterable[Totals]) -> Totals:
    """Return the sum of some parts, in their order."""
    return reduce(operator.add, parts)


def send_totals(waiting: Sequence[TensorMerge], parts: Sequence[Sequence[Totals]]) -> None:
    """Send each merge the total of its group, or its own where it has none.

    Args:
        waiting: merges with a request, in the order of the plan: it fixes the last bits.
        parts: for each the sums over its sections; none where nothing of it contributes to its group.
    """
    groups = [merge.group or number for number, merge in enumerate(waiting)]
    sums: dict[str | int, list[Totals]] = {}
    for group, of_one in zip(groups, parts, strict=True):
        if of_one:
            sums.setdefault(group, []).append(joined(of_one))
    totals = {group: joined(of_group) for group, of_group in sums.items()}
    for merge, group in zip(waiting, groups, strict=True):
        merge.send(totals[group])


def sample(begin: int, end: int) -> list[tuple[int, int]]:
    """Return the (start, count) of each piece of a tensor's sample in the section ``begin … end``."""
    return [(start, min(SAMPLE_PIECE, end - start)) for start in range(begin, end, SAMPLE_PIECE * SAMPLE_EVERY)]
