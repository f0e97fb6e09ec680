"""A lane: the buffers of one worker, and the arithmetic on one block.

On the CPU a lane is a few buffers that stay in cache. On a GPU its host buffers are pinned and it has a stream of its
own: copies to the device, arithmetic and copies back are queued there without waiting, so that while one lane's block
is on its way, another's is computed and a third is read or written.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

import torch

from mergekit_lite import draws, dtypes, kernels, rounding
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.checkpoint.tensor import TensorSpec


class Lane:
    """Host buffers for ``inputs`` tensors and one output, and the device to compute on."""

    def __init__(self, device: torch.device, inputs: int, nbytes: int) -> None:
        """Allocate the buffers, ``nbytes`` each."""
        self.device = device
        pinned = device.type == "cuda"
        self._inputs = [torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned) for _ in range(inputs)]
        self._output = torch.empty(nbytes, dtype=torch.uint8, pin_memory=pinned)
        self._stream = torch.cuda.Stream(device) if pinned else None  # type: ignore[no-untyped-call]

    def working(self) -> AbstractContextManager[object]:
        """The context in which the lane's tensors are made and used."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def read(self, reader: Reader, index: int, spec: TensorSpec, start: int, count: int) -> torch.Tensor:
        """Read elements of the ``index``-th input: 1-D host tensor of the input's dtype, valid until the next read."""
        chunk = _view(self._inputs[index], spec.dtype, count)
        reader.read(spec, start, chunk)
        return chunk

    def gather(self, reader: Reader, index: int, spec: TensorSpec, pieces: Sequence[tuple[int, int]]) -> torch.Tensor:
        """Read some pieces, each (start, count), of the ``index``-th input, side by side; otherwise as ``read``."""
        picked = _view(self._inputs[index], spec.dtype, sum(count for _, count in pieces))
        place = 0
        for start, count in pieces:
            reader.read(spec, start, picked[place : place + count])
            place += count
        return picked

    def output(self, dtype: str, count: int) -> torch.Tensor:
        """Room for a chunk of the output: 1-D host tensor, valid until the next call."""
        return _view(self._output, dtype, count)

    def scratch(self, nbytes: int) -> memoryview:
        """Room for reading bytes back, shared with the first input."""
        return bytes_of(self._inputs[0][:nbytes])

    def fetch(self, block: torch.Tensor) -> torch.Tensor:
        """The block on the lane's device."""
        return block.to(self.device, non_blocking=True)

    def wait(self) -> None:
        """Wait until what was queued on the device is done."""
        if self._stream is not None:
            self._stream.synchronize()


def store(result: torch.Tensor, out: torch.Tensor, how: str, seed: int, tensor: str, start: int) -> None:
    """Put a block's result into its place in the output chunk, rounded to the output dtype as the recipe asks."""
    if how == "stochastic":
        result = rounding.stochastic(result, out.dtype, draws.stream_key(seed, tensor), start)
    out.copy_(result, non_blocking=True)


def all_finite(block: torch.Tensor) -> bool:
    """Whether a block holds neither NaN nor infinity. One fast sum answers for almost every block."""
    if kernels.take(block):
        return kernels.all_finite(block)
    if not block.is_floating_point():
        return True
    total = block.sum(dtype=torch.float32 if block.dtype == torch.float16 else None)
    return math.isfinite(total.item()) or bool(torch.isfinite(block).all())


def _view(buffer: torch.Tensor, dtype: str, count: int) -> torch.Tensor:
    return buffer[: count * dtypes.size(dtype)].view(dtypes.torch_dtype(dtype))
