"""The buffers of one worker.

On the CPU they are a few buffers that stay in cache. For a GPU they are pinned, and the worker has a stream of its own:
copies to the device, arithmetic and copies back are queued there without waiting, so that while one worker's block is
on its way, another's is computed and a third is read or written.
"""

from __future__ import annotations

import mmap
from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch
from mergekit_lite.ops import CPU

__all__ = ["CPU", "WorkerBuffers"]


class WorkerBuffers:
    """Host buffers of ``nbytes`` each for ``inputs`` tensors and one output, and the device to compute on."""

    def __init__(self, device: str, inputs: int, nbytes: int) -> None:
        self.device = device
        self._inputs = [_buffer(device, nbytes) for _ in range(inputs)]
        self._output = _buffer(device, nbytes)
        self._stream = None if device == CPU else torch.cuda.Stream(device)  # type: ignore[no-untyped-call]

    def working(self) -> AbstractContextManager[object]:
        """Return the context in which the worker's tensors are made and used."""
        return torch.cuda.stream(self._stream) if self._stream is not None else nullcontext()

    def read(self, reader: Reader, index: int, spec: TensorSpec, start: int, count: int, skew: int = 0) -> memoryview:
        """Read elements of the ``index``-th input, and return their bytes, valid until the next read of that input.

        ``skew`` bytes lie between the begin of a page of memory and the first element.
        """
        chunk = self._inputs[index][skew : skew + count * dtypes.size(spec.dtype)]
        spec.fill(reader, start, chunk)
        return chunk

    def gather(self, reader: Reader, index: int, spec: TensorSpec, pieces: Sequence[tuple[int, int]]) -> memoryview:
        """Read some pieces, each (start, count), of the ``index``-th input, side by side; otherwise as ``read``."""
        size = dtypes.size(spec.dtype)
        end = 0
        for start, count in pieces:
            begin, end = end, end + count * size
            spec.fill(reader, start, self._inputs[index][begin:end])
        return self._inputs[index][:end]

    def output(self, nbytes: int, skew: int = 0) -> memoryview:
        """Return room for a chunk of the output, valid until the next call; ``skew`` as in ``read``."""
        return self._output[skew : skew + nbytes]

    def wait(self) -> None:
        """Wait until what was queued on the device is done."""
        if self._stream is not None:
            self._stream.synchronize()


def _buffer(device: str, nbytes: int) -> memoryview:
    """Return memory that begins at a page's begin, with room for a chunk that begins anywhere in the page."""
    nbytes += mmap.PAGESIZE
    if device == CPU:
        return memoryview(mmap.mmap(-1, nbytes, mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS))
    return bytes_of(torch.empty(nbytes, dtype=torch.uint8, pin_memory=True))
