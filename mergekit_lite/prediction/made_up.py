"""Made-up weights: small tensors like those of a plan, to measure the engine on before a true weight is read.

A tensor of a plan is cut down to its first rows. What lies plainly in its file becomes noise like that of a model and
its fine-tunes, so that thresholds and ties take their usual course. Every other encoding reads its parts from bytes
that are moderate numbers in every dtype of floats.
"""

from __future__ import annotations

import math
import os
import tempfile
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO

from mergekit_lite import block_fp8, dtypes, positioned
from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import PLAIN
from mergekit_lite.deferred import np
from mergekit_lite.engine.sink import Records
from mergekit_lite.planning import Job

WEIGHT, STEP = 0.02, 1e-4  # rms of the weights of a model, and of what a fine-tune adds to them
DIFFERENT = 131_101  # elements that are made; behind them they repeat. A prime: else a sample meets the same ones, and
# all amounts are there equally often, so that no k splits those that are equal
LOW, HIGH = 0x30, 0x3E  # bytes of which floats of 8, 16 and 32 bits are finite, and neither tiny nor huge
PATTERN, WRITTEN = "pattern", "written"
LAID_OUT = 1 << 25  # bytes of all inputs, and of what is written: more than a core's caches hold


class MadeUpReader(Reader):
    """A reader that fills buffers with made-up bytes, whatever file and place it is asked for.

    They come from files, as weights do. What the system copies from a file isn't in the processor's caches, other than
    what a process copies in its own memory: arithmetic on it takes up to a quarter longer (measured).

    Attributes:
        nbytes: read so far.
        seconds: of processor time that this took, which a true reader takes in its own way.
        uncounted: seconds of what is done in the measurement alone.
    """

    def __init__(self, inputs: int) -> None:
        """Prepare to read as many inputs."""
        super().__init__()
        self.nbytes = 0
        self.seconds = self.uncounted = 0.0
        self._content: dict[str, memoryview] = {}
        self._files: dict[str, IO[bytes]] = {}
        self._laid_out = LAID_OUT // max(1, inputs)  # bytes of each file, at least
        self._turn = 0

    def __exit__(self, *_: object) -> None:
        """Close the files."""
        super().__exit__()
        for file in self._files.values():
            file.close()

    def next_job(self) -> None:
        """Let what is read next come from another place, as true tensors do."""
        self._turn += 1

    def fill(self, path: Path, offset: int, out: memoryview, tensor: str) -> None:
        """Fill ``out``, to its end."""
        content = self._content.get(path.name) or self._pattern()
        file = self._file(path.name if path.name in self._content else PATTERN, content)
        self.nbytes += len(out)
        times = -(-self._laid_out // len(content))
        offset += self._turn % times * len(content)  # whole repetitions: two inputs go on as they belong together
        started = time.thread_time()
        while out:
            count = positioned.read(file.fileno(), out, offset % (times * len(content)))
            offset, out = offset + count, out[count:]
        self.seconds += time.thread_time() - started

    def expect(self, *_: object, **__: object) -> None:
        """Do nothing: what is said to be read next is made up, too."""

    def noise(self, spec: TensorSpec, number: int) -> TensorSpec:
        """Return a plain tensor of floats as noise: of the ``number``-th fine-tune, or of the base where that is 0."""
        name = f"{number} {spec.dtype}"
        if name not in self._content:
            self._content[name] = memoryview(_noise(number, spec.dtype))
        return replace(spec, file=Path(name), offset=0)

    def sink(self) -> MadeUpSink:
        """Return a sink for what is made of them; what writing takes counts as reading does."""
        if WRITTEN not in self._files:
            self._files[WRITTEN] = _nameless()
        return MadeUpSink(self, self._files[WRITTEN])

    def _file(self, name: str, content: memoryview) -> IO[bytes]:
        """Return a file of content that repeats; it has no name in any folder."""
        if name not in self._files:
            self._files[name] = _nameless()
            for _ in range(-(-self._laid_out // len(content))):
                self._files[name].write(content)
        return self._files[name]

    def _pattern(self) -> memoryview:
        if PATTERN not in self._content:
            some = np.random.default_rng(0).integers(LOW, HIGH, DIFFERENT, np.uint8).tobytes()
            self._content[PATTERN] = memoryview(some)
        return self._content[PATTERN]


class MadeUpSink(Records):
    """A sink that writes to a nameless file, again and again."""

    def __init__(self, reader: MadeUpReader, file: IO[bytes]) -> None:
        """Write to a file; a reader counts the seconds."""
        super().__init__()
        self._reader, self._file = reader, file

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write the bytes somewhere."""
        started = time.thread_time()
        positioned.write(self._file.fileno(), data, (self._reader.nbytes + offset) % LAID_OUT)
        self._reader.seconds += time.thread_time() - started


def made_up(job: Job, elements: int, reader: MadeUpReader, *, plainly: bool = False) -> Job:
    """Return a job like this one on about ``elements`` made-up elements, or all its own where it has fewer.

    They are its first ones in row-major order, with the rows as long as they are: so encodings find them as before.
    ``plainly`` makes noise of all inputs, whatever their encoding.
    """
    shape = _cut(job.shape, elements, block_fp8.EDGE if job.scales or any(s.quantised for s in job.inputs) else 1)
    inputs = []
    for number, spec in enumerate(job.inputs):
        origin = job.has_base and number == len(job.inputs) - 1
        if (plainly or spec.is_plain) and dtypes.is_float(spec.dtype):
            spec = replace(reader.noise(spec, 0 if origin else number + 1), encoding=PLAIN)
        inputs.append(replace(spec, shape=shape))
    merged = math.prod(shape) if job.merged_elements else 0
    return replace(job, shape=shape, inputs=tuple(inputs), merged_elements=merged)


def _cut(shape: Sequence[int], elements: int, multiple: int) -> tuple[int, ...]:
    """Return a shape of about ``elements`` elements that begins a larger one; of several axes the last one stays."""
    if len(shape) < 2:
        return tuple(min(size, elements) for size in shape)
    *outer, columns = shape
    rows = max(1, elements // max(1, columns)) // multiple * multiple or multiple
    cut = [1] * len(outer)
    for axis in reversed(range(len(outer))):
        cut[axis] = min(outer[axis], max(1, rows))
        rows //= max(1, cut[axis])
    return (*cut, columns)


def _noise(number: int, dtype: str) -> bytes:
    values = np.random.default_rng(0).normal(0, WEIGHT, DIFFERENT).astype(np.float32)
    if number:
        values += np.random.default_rng(number).normal(0, STEP, DIFFERENT).astype(np.float32)
    if dtype == "bfloat16":
        return ((values.view(np.uint32) + 0x8000) >> 16).astype(np.uint16).tobytes()
    return values.astype(dtype).tobytes()


def _nameless() -> IO[bytes]:
    """Return a file without a name, in memory where the system has such files."""
    if hasattr(os, "memfd_create"):
        return os.fdopen(os.memfd_create("made up"), "w+b", buffering=0)
    return tempfile.TemporaryFile(buffering=0)
