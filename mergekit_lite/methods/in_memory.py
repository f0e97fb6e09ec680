"""Merging tensors that are in memory already, block by block through the same passes as files."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import reduce
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.deferred import torch
from mergekit_lite.errors import UsageError
from mergekit_lite.methods.passes import (
    Block,
    Passes,
    Reduction,
    TensorInfo,
    Totals,
    joined,
    sample,
    sections,
    send_totals,
    statistics_block,
)
from mergekit_lite.methods.registry import method_named
from mergekit_lite.ops import c_ops

BLOCK = 1 << 17


def merge_tensors(
    name: str,
    base: torch.Tensor | None,
    tensors: Sequence[torch.Tensor],
    *,
    dtype: torch.dtype | None = None,
    tensor_name: str = "",
    seed: int = 0,
    block: int = BLOCK,
    **parameters: Any,
) -> torch.Tensor:
    """Merge one tensor by the method ``name``.

    Args:
        name: of the method.
        base: where the method has one, else None.
        tensors: one from each model, all of the base's shape and on its device; any float dtypes.
        dtype: of the result; by default that to which the inputs promote.
        tensor_name: enters the draws of random methods, and which group a tensor belongs to.
        seed: of random methods.
        block: elements merged at once; no bit of the result depends on it.
        **parameters: the method's; what differs by model as a list, a single number serves all.

    Returns:
        The merged tensor: computed in float32, in float64 where an input or the result has more than 16 bits, and
        rounded once.

    Raises:
        UsageError: unknown method or parameters, wrong number of inputs, inputs that don't fit together.
    """
    bases = None if base is None else {tensor_name: base}
    models = [{tensor_name: tensor} for tensor in tensors]
    return merge_states(name, bases, models, dtype=dtype, seed=seed, block=block, **parameters)[tensor_name]


def merge_states(
    name: str,
    base: Mapping[str, torch.Tensor] | None,
    models: Sequence[Mapping[str, torch.Tensor]],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    block: int = BLOCK,
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """Merge whole state dicts, so that statistics may span the model; see ``merge_tensors`` for arguments and errors.

    Args:
        models: state dicts with the same names; those of the first one, or of the base, are merged.
    """
    method = method_named(name)
    arguments = method.resolve(parameters, len(models), base is not None)
    states = [*([] if base is None else [base]), *models]
    merges: list[_Merge] = []
    offset, extent = 0, sum(tensor.numel() for tensor in states[0].values())
    for tensor in states[0]:
        if any(tensor not in state for state in states):
            raise UsageError(f"Tensor {tensor!r} is not in every model.")
        inputs = [state[tensor].detach() for state in states]
        info = TensorInfo(tensor, tuple(inputs[0].shape), len(models), base is not None, seed, offset, extent)
        _fit_together(info, inputs)
        row = method.row_length(info.shape, arguments)
        merges.append(_Merge(info, inputs, row, dtype, method.start(info, arguments)))
        offset += info.numel
    with torch.no_grad():
        while grouped := [merge for merge in merges if merge.passes.group is not None]:
            send_totals([merge.passes for merge in grouped], [merge.sums() for merge in grouped])
        return {merge.info.name: merge.result(block) for merge in merges}


class _Merge:
    """One tensor being merged in memory."""

    def __init__(self, info: TensorInfo, inputs: Block, row: int, dtype: torch.dtype | None, passes: Passes) -> None:
        self.info, self.row, self.passes = info, max(row, 1), passes
        self.flat = [tensor.reshape(-1) for tensor in inputs]
        self.columns = row  # of the blocks; 0 where they are 1-D
        self.dtype = dtype or reduce(torch.promote_types, (tensor.dtype for tensor in inputs))
        kinds = {self.dtype, *(tensor.dtype for tensor in inputs)}
        self.by_kernels = c_ops.take(*self.flat) and c_ops.serve([dtypes.name_of(self.dtype)])
        self.working = dtypes.working(map(dtypes.name_of, kinds))

    def sums(self) -> list[Totals]:
        """The requested sums over each section that contributes."""
        request = self.passes.request
        assert isinstance(request, Reduction)
        return [self._sum(request, begin, end) for begin, end in sections(request, self.info.numel, self.row)]

    def _sum(self, request: Reduction, begin: int, end: int) -> Totals:
        """The requested sums over one section."""
        if request.sampled:
            pieces = sample(begin, end)
            return self._of_block(request, 0, [torch.cat([x[s : s + n] for s, n in pieces]) for x in self.flat])
        blocks = self._blocks(statistics_block(self.row), begin, end)
        return joined(self._of_block(request, start, block) for start, block in blocks)

    def _of_block(self, request: Reduction, start: int, block: Block) -> Totals:
        if request.kernel is not None and self.by_kernels:
            return request.kernel([c_ops.run_of(tensor) for tensor in block], start)
        totals: Totals = self.passes.sum(block, start, self.working, self.columns).cpu().numpy()
        return totals

    def result(self, block: int) -> torch.Tensor:
        """Gather what statistics remain, and combine."""
        while self.passes.request is not None:
            self.passes.send(joined(self.sums()))
        out = torch.empty(self.info.numel, dtype=self.dtype, device=self.flat[0].device)
        kernel = self.passes.kernel if self.by_kernels else None
        for start, blocks in self._blocks(block, 0, self.info.numel):
            merged = out[start : start + blocks[0].numel()]
            if kernel is not None:
                kernel([c_ops.run_of(tensor) for tensor in blocks], start, c_ops.run_of(merged))
            else:
                merged.copy_(self.passes.merge(blocks, start, self.working, self.columns))
        return out.view(self.info.shape)

    def _blocks(self, length: int, begin: int, end: int) -> Iterator[tuple[int, Block]]:
        """The blocks of about ``length`` that hold the elements ``begin … end``, each with its first index."""
        length = max(1, length // self.row) * self.row
        for start in range(begin // length * length, end, length):
            yield start, [tensor[start : start + length] for tensor in self.flat]


def _fit_together(info: TensorInfo, inputs: Block) -> None:
    for number, tensor in enumerate(inputs):
        if tuple(tensor.shape) != info.shape:
            raise UsageError(
                f"Tensor {info.name!r}: expected shape {info.shape} in every input, "
                f"got {tuple(tensor.shape)} in input {number}."
            )
        if not dtypes.is_float(dtypes.name_of(tensor.dtype)):
            raise UsageError(f"Tensor {info.name!r}: {dtypes.name_of(tensor.dtype)} can't be merged, only floats.")
