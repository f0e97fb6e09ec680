"""The buffers of one worker.

On the CPU they are a few buffers that stay in cache. For a GPU they are pinned, and the worker has a stream of its own:
copies to the device, arithmetic and copies back are queued there without waiting, so that while one worker's block is
on its way, another's is computed and a third is read or written. Streams know nothing of each other: what is made on
one of them is not for the others.
"""

from __future__ import annotations

import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from mergekit_lite import dtypes, positioned
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch
from mergekit_lite.engine.devices import explained
from mergekit_lite.ops import CPU

__all__ = ["CPU", "WorkerBuffers"]


class WorkerBuffers:
    """Host buffers of ``nbytes`` each for ``inputs`` tensors and one output, and the device to compute on."""

    def __init__(self, device: str, inputs: int, nbytes: int) -> None:
        self.device = device
        self.nbytes = nbytes
        self._inputs = [_buffer(nbytes) for _ in range(inputs)]
        self._output = _buffer(nbytes)
        self._stream: torch.cuda.Stream | None = None

    @contextmanager
    def working(self) -> Iterator[None]:
        """Give the context in which the worker's tensors are made and used; at its end all of them are finished.

        Raises RunError where the device fails, is out of memory or can't pin the buffers.
        """
        if self.device == CPU:
            yield
            return
        # Memory is pinned in the context of this very device: no other GPU gets one.
        with explained(self.device), torch.cuda.device(self.device), _pinned([*self._inputs, self._output]):
            self._stream = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
            try:
                with torch.cuda.stream(self._stream):
                    yield
            finally:
                self.wait()

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


def _buffer(nbytes: int) -> memoryview:
    """Return memory that begins at a page's begin, with room for a chunk that begins anywhere in the page."""
    return positioned.pages(nbytes + mmap.PAGESIZE)


@contextmanager
def _pinned(buffers: Sequence[memoryview]) -> Iterator[None]:
    """Pin some buffers for a while: their very bytes.

    What torch pins by itself it rounds up to a power of two, and keeps until the process ends.
    """
    cuda = torch.cuda.cudart()  # type: ignore[no-untyped-call]
    pinned: list[int] = []
    try:
        for buffer in buffers:
            address = torch.frombuffer(buffer, dtype=torch.uint8).data_ptr()
            if int(cuda.cudaHostRegister(address, len(buffer), 0)) != 0:
                raise RuntimeError(f"CUDA can't pin {len(buffer):,} bytes of the host's memory: out of memory")
            pinned.append(address)
        yield
    finally:
        for address in pinned:
            cuda.cudaHostUnregister(address)
