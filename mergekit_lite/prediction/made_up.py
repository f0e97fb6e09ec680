"""Made-up weights: small tensors like those of a plan, to measure the engine on before a true weight is read.

A tensor of a plan is cut down to its first rows. What lies plainly in its file becomes noise like that of a model and
its fine-tunes, so that thresholds and ties take their usual course. Every other encoding reads its parts from bytes
that are moderate numbers in every dtype of floats.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from mergekit_lite import block_fp8, dtypes
from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import PLAIN
from mergekit_lite.deferred import np
from mergekit_lite.planning import Job

WEIGHT, STEP = 0.02, 1e-4  # rms of the weights of a model, and of what a fine-tune adds to them
DIFFERENT = 131_101  # elements that are made; behind them they repeat. A prime: else a sample meets the same ones, and
# all amounts are there equally often, so that no k splits those that are equal
LOW, HIGH = 0x30, 0x3E  # bytes of which floats of 8, 16 and 32 bits are finite, and neither tiny nor huge
PATTERN = "pattern"


class MadeUpReader(Reader):
    """A reader that fills buffers with made-up bytes, whatever file and place it is asked for.

    Attributes:
        nbytes: read so far.
        seconds: of processor time that this took, which a true reader takes in its own way.
        uncounted: seconds of what is done in the measurement alone.
    """

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0
        self.seconds = self.uncounted = 0.0
        self._content: dict[str, memoryview] = {}

    def fill(self, path: Path, offset: int, out: memoryview, tensor: str) -> None:
        """Fill ``out``, to its end."""
        started = time.thread_time()
        content = self._content.get(path.name) or self._pattern()
        self.nbytes += len(out)
        while out:
            first = offset % len(content)
            count = min(len(out), len(content) - first)
            out[:count] = content[first : first + count]
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

    def _pattern(self) -> memoryview:
        if PATTERN not in self._content:
            some = np.random.default_rng(0).integers(LOW, HIGH, DIFFERENT, np.uint8).tobytes()
            self._content[PATTERN] = memoryview(some)
        return self._content[PATTERN]


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
