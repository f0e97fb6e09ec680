"""Merging tensors that are in memory already, block by block like those of files."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.deferred import torch
from mergekit_lite.errors import UsageError
from mergekit_lite.methods.contract import Block, TensorInfo, Totals
from mergekit_lite.methods.registry import Method, method_named
from mergekit_lite.methods.tensor_merge import TensorMerge, joined, sample, send_totals

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
    statistics: Sequence[torch.Tensor] | None = None,
    gram_axis: int = 1,
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
        statistics: for methods that need some (``fisher``, ``regmean`` …) what is known of each model: its Fisher
            information, of the tensor's shape; or a Gram matrix of its layer's inputs. Without, models are averaged.
        gram_axis: the tensor's axis that meets the inputs of the Gram matrices; 0 where it is stored transposed.
        **parameters: the method's; what differs by model as a list, a single number serves all.

    Returns:
        The merged tensor: computed in float32, in float64 where an input or the result has more than 16 bits, and
        rounded once.

    Raises:
        UsageError: unknown method or parameters, wrong number of inputs, inputs that don't fit together.
    """
    bases = None if base is None else {tensor_name: base}
    models = [{tensor_name: tensor} for tensor in tensors]
    beside = None if statistics is None else [{tensor_name: each} for each in statistics]
    options: dict[str, Any] = {"dtype": dtype, "seed": seed, "block": block}
    options |= {"statistics": beside, "gram_axis": gram_axis}
    return merge_states(name, bases, models, **options, **parameters)[tensor_name]


def merge_states(
    name: str,
    base: Mapping[str, torch.Tensor] | None,
    models: Sequence[Mapping[str, torch.Tensor]],
    *,
    dtype: torch.dtype | None = None,
    seed: int = 0,
    block: int = BLOCK,
    statistics: Sequence[Mapping[str, torch.Tensor]] | None = None,
    gram_axis: int = 1,
    **parameters: Any,
) -> dict[str, torch.Tensor]:
    """Merge whole state dicts, so that statistics may span the model; see ``merge_tensors`` for arguments and errors.

    Args:
        models: state dicts with the same names; those of the first one, or of the base, are merged.
        statistics: for each model by the names of tensors; tensors that some lack are averaged.
    """
    method = method_named(name)
    arguments = method.resolve(parameters, len(models), base is not None)
    states = [*([] if base is None else [base]), *models]
    merges: list[_InMemory] = []
    offset, extent = 0, sum(tensor.numel() for tensor in states[0].values())
    for tensor in states[0]:
        if any(tensor not in state for state in states):
            raise UsageError(f"Tensor {tensor!r} is not in every model.")
        inputs = [state[tensor].detach() for state in states]
        info = TensorInfo(tensor, tuple(inputs[0].shape), len(models), base is not None, seed, offset, extent)
        _fit_together(info, inputs)
        info, fishers, grams = _with_statistics(method, info, statistics, gram_axis)
        merges.append(_InMemory(method, info, arguments, [*inputs, *fishers], dtype, grams))
        offset += info.numel
    while grouped := [merge for merge in merges if merge.group is not None]:
        send_totals(grouped, [merge.sums() for merge in grouped])
    return {merge.info.name: merge.result(block) for merge in merges}


class _InMemory(TensorMerge):
    """One tensor being merged in memory."""

    def __init__(
        self,
        method: Method,
        info: TensorInfo,
        arguments: dict[str, Any],
        inputs: Block,
        dtype: torch.dtype | None,
        grams: Block,
    ) -> None:
        kinds = [tensor.dtype for tensor in inputs]
        self.grams = grams
        self.dtype = dtype or reduce(torch.promote_types, kinds[: info.inputs])
        self.flat = [tensor.reshape(-1).contiguous() for tensor in inputs]
        self.device = str(self.flat[0].device)
        super().__init__(method, info, arguments, [dtypes.name_of(kind) for kind in (*kinds, self.dtype)])

    def sums(self) -> list[Totals]:
        """Return the requested figures over each section that contributes."""
        return [self._sum(begin, end) for begin, end in self.sections()]

    def _sum(self, begin: int, end: int) -> Totals:
        assert self.request is not None
        of, ops = self.request.of, self.ops(self.device)
        if self.request.sampled:
            pieces = [torch.cat([x[start : start + count] for start, count in sample(begin, end)]) for x in self.flat]
            return ops.sum(of, [ops.of_tensor(piece) for piece in pieces], 0, pieces[0].numel())
        return ops.sum(of, [ops.of_tensor(x[begin:end]) for x in self.flat], begin, self.statistics_block)

    def result(self, length: int) -> torch.Tensor:
        """Gather what statistics are missing, and merge ``length`` elements at a time, in whole rows."""
        while self.request is not None:
            if self.request.held:
                self.send_whole([*self.flat, *(gram.reshape(-1) for gram in self.grams)].__getitem__)
            else:
                self.send(joined(self.sums()))
        out = torch.empty(self.info.numel, dtype=self.dtype, device=self.flat[0].device)
        ops, row = self.ops(self.device), max(1, self.row)
        length = max(1, length // row) * row
        for start in range(0, out.numel(), length):
            block = [ops.of_tensor(x[start : start + length]) for x in self.flat]
            ops.merge(self.merge, block, start, ops.of_tensor(out[start : start + length]), length)
        return out.view(self.info.shape)


def _with_statistics(
    method: Method, info: TensorInfo, statistics: Sequence[Mapping[str, torch.Tensor]] | None, gram_axis: int
) -> tuple[TensorInfo, Block, Block]:
    """Return what a method may know of a tensor with statistics; the Fisher information and the Gram matrices of it."""
    if statistics is None or not method.statistics:
        return info, [], []
    if len(statistics) != info.models:
        raise UsageError(f"{method.name} needs the statistics of each of {info.models} models, got {len(statistics)}.")
    beside = [each[info.name].detach() for each in statistics if info.name in each]
    if len(beside) < info.models:
        return info, [], []
    is_fisher = method.statistics == "fisher"
    wanted = info.shape if is_fisher else (info.shape[gram_axis],) * 2
    for each in beside:
        if tuple(each.shape) != wanted:
            raise UsageError(f"Tensor {info.name!r}: expected statistics of shape {wanted}, got {tuple(each.shape)}.")
    if is_fisher:
        return replace(info, fisher=True), beside, []
    return replace(info, gram_axis=gram_axis), [], [each.clone() for each in beside]


def _fit_together(info: TensorInfo, inputs: Block) -> None:
    for number, tensor in enumerate(inputs):
        if tuple(tensor.shape) != info.shape:
            raise UsageError(
                f"Tensor {info.name!r}: expected shape {info.shape} in every input, "
                f"got {tuple(tensor.shape)} in input {number}."
            )
        if not dtypes.is_float(dtypes.name_of(tensor.dtype)):
            raise UsageError(f"Tensor {info.name!r}: {dtypes.name_of(tensor.dtype)} can't be merged, only floats.")
