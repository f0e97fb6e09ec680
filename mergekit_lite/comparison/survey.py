"""Survey: one streaming read of the weights of some models, with sums over every element and a fixed sample.

Each tensor is cut into sections, always at the same places, and each section is read once by one worker. Sums over
sections are added in their order, so no figure depends on the number of workers. The sample, for figures that cost more
than a sum, is a grid of evenly spaced rows and columns. Of a tensor no larger than the sample it is every element.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader, tensor_of
from mergekit_lite.comparison.shared_tensors import SharedTensor
from mergekit_lite.deferred import torch
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.pool import Crew, Pool, available_cores, tuned_process
from mergekit_lite.engine.schedule import Progress, expect_elements
from mergekit_lite.engine.tiling import CHUNK, cut
from mergekit_lite.methods.tensor_merge import SECTION, STATISTICS_BLOCK

SAMPLE_ROWS, SAMPLE_COLUMNS = 256, 512  # of the largest sample that is taken of a tensor
SAMPLING_RATIO = 32  # in large models one element in 32 is in the sample
LEAST_SAMPLE = 1 << 14  # elements; a sample is no smaller
SMALL_MODEL = 1 << 23  # elements of a model up to which every tensor has the largest sample
WIDEST_ROW = CHUNK  # elements; longer rows are cut
FULL_WIDTH = 16  # models; of more, samples are shorter, so that memory doesn't grow with them
PIECES_OF = 2  # models: of more than FULL_WIDTH, pieces are so short that all take the memory of so many
MAX_UNSHARED_SECTIONS = 8  # a tensor of more sections is shared by the workers

LARGEST = "largest"  # name of the one figure that is a maximum, not a sum
FloatArray = npt.NDArray[np.float64]
Sums = Mapping[str, FloatArray]  # by name; each additive over blocks, but for LARGEST
ElementRange = tuple[int, int]  # first element, and the one after the last
Measured = TypeVar("Measured")
Measured_co = TypeVar("Measured_co", covariant=True)


class Measurement(Protocol[Measured_co]):
    """What a survey computes for each tensor. Results may come from another process: they hold plain data only."""

    needs_sample: bool  # False: ``result`` gets an empty sample

    def block_sums(self, tensor: SharedTensor, block: torch.Tensor) -> Sums:
        """Return the sums over one block: (models, elements), of the working dtype; whole rows up to WIDEST_ROW."""
        ...

    def result(self, tensor: SharedTensor, totals: Sums, sample: torch.Tensor) -> Measured_co:
        """Return the result for a tensor from the sums over all blocks and its sample (models, rows, columns)."""
        ...


class SectionSums(NamedTuple):
    """Sums over one section of a tensor, and the elements of the sample in it: (models, elements)."""

    begin: int
    sums: Sums
    sample: npt.NDArray[np.floating]


def survey(
    tensors: Sequence[SharedTensor],
    measurement: Measurement[Measured],
    threads: int | None = None,
    progress: Progress | None = None,
    processes: bool = False,
    crew: Crew | None = None,
) -> Iterator[tuple[int, Measured]]:
    """Read every tensor once and measure it.

    Args:
        tensors: all of the same number of models.
        measurement: what to compute for each.
        threads: number of workers, one for each core by default.
        progress: called with (bytes read, bytes in all).
        processes: fork the workers, as for ``engine.run``.
        crew: workers elsewhere, who do it instead.

    Yields:
        The number of a tensor and its result, in the order in which they are done.

    Raises:
        RunError: a file can't be read.
    """
    small = sum(tensor.numel for tensor in tensors) <= SMALL_MODEL
    scans = [_TensorScan(tensor, measurement, grid(tensor, small)) for tensor in tensors]
    tasks = [(number, sections) for number, scan in enumerate(scans) for sections in scan.tasks]
    widest = max((dtypes.size(spec.dtype) for tensor in tensors for spec in tensor.specs), default=1)
    inputs = max((len(tensor.specs) for tensor in tensors), default=0)
    total = sum(tensor.nbytes for tensor in tensors)
    done = 0

    def work(
        buffers: WorkerBuffers, reader: Reader, task: tuple[int, list[ElementRange]]
    ) -> tuple[int, list[SectionSums], Measured | None]:
        number, sections = task
        scan = scans[number]
        with torch.inference_mode():
            parts = [scan.read(buffers, reader, begin, end) for begin, end in sections]
            return (number, parts, None) if len(scan.tasks) > 1 else (number, [], scan.result(parts))

    def expect(reader: Reader, task: tuple[int, list[ElementRange]]) -> None:
        number, sections = task
        expect_elements(reader, [(scans[number].tensor.specs, begin, end) for begin, end in sections])

    room = max((scan.chunk for scan in scans), default=0) * widest
    pool = Pool(threads or available_cores(), [CPU], inputs, room, processes=processes, crew=crew)
    unfinished: dict[int, list[SectionSums]] = {}  # of tensors that several workers share
    with tuned_process():
        results = pool.run(tasks, work, expect, size=lambda task: scans[task[0]].bytes_of(task[1]))
        for number, parts, result in results:
            scan = scans[number]
            done += scan.tensor.nbytes // len(scan.tasks)
            if progress is not None:
                progress(done, total)
            if result is None:
                sections = unfinished.setdefault(number, [])
                sections += parts
                if len(sections) < len(scan.tasks):
                    continue
                with torch.inference_mode():
                    result = scan.result(unfinished.pop(number))
            yield number, result


def grid(tensor: SharedTensor, small: bool) -> tuple[range, range]:
    """Return the rows and columns of a tensor's sample; with ``small`` those of the largest sample.

    A vector is one row. Of a tensor with more than two dimensions all but the last one count as rows.
    """
    most = SAMPLE_ROWS * SAMPLE_COLUMNS // -(-len(tensor.specs) // FULL_WIDTH)
    wanted = most if small else min(most, max(LEAST_SAMPLE, tensor.numel // SAMPLING_RATIO))
    rows, columns = (1, tensor.numel) if len(tensor.shape) < 2 else (tensor.numel // tensor.row, tensor.row)
    height = math.isqrt(wanted // 2)  # twice as many columns as rows, unless the tensor is shorter or narrower
    sampled = _spread(rows, max(height, wanted // columns))
    return sampled, _spread(columns, max(2 * height, wanted // len(sampled)))


def _spread(count: int, most: int) -> range:
    """Return at most ``most`` evenly spaced numbers below ``count``."""
    step = -(-count // most)
    return range(0, count, step)


class _TensorScan(Generic[Measured]):
    """One tensor of a survey: its sections, and how they are read."""

    def __init__(self, tensor: SharedTensor, measurement: Measurement[Measured], sample: tuple[range, range]) -> None:
        self.tensor, self.measurement, self._sample = tensor, measurement, sample
        row = tensor.row if 0 < tensor.row <= WIDEST_ROW else 1
        times = 1 if len(tensor.specs) <= FULL_WIDTH else -(-len(tensor.specs) // PIECES_OF)
        self._block = max(1, STATISTICS_BLOCK // times // row) * row
        self.chunk = min(max(self._block, CHUNK // times // self._block * self._block), tensor.numel)
        section = max(1, SECTION // self._block) * self._block
        sections = [(begin, begin + count) for begin, count in cut(0, tensor.numel, section)]
        self.tasks = [sections] if len(sections) <= MAX_UNSHARED_SECTIONS else [[one] for one in sections]
        self._working = dtypes.working(spec.dtype for spec in tensor.specs)

    def bytes_of(self, sections: Sequence[ElementRange]) -> int:
        """Return the number of bytes that are read for some sections."""
        elements = sum(end - begin for begin, end in sections)
        return sum(spec.stored_bytes(elements) for spec in self.tensor.specs)

    def read(self, buffers: WorkerBuffers, reader: Reader, begin: int, end: int) -> SectionSums:
        """Read one section, chunk by chunk, and add up its sums block by block."""
        sums: dict[str, FloatArray] = {}
        sampled: list[torch.Tensor] = []
        for start, count in cut(begin, end, self.chunk):
            chunks = [
                tensor_of(buffers.read(reader, n, spec, start, count), spec.dtype)
                for n, spec in enumerate(self.tensor.specs)
            ]
            if self.measurement.needs_sample:
                sampled.append(self._sampled(chunks, start, count))
            for first, length in cut(0, count, self._block):
                block = torch.empty(len(chunks), length, dtype=self._working)
                for wide, chunk in zip(block, chunks, strict=True):
                    wide.copy_(chunk[first : first + length])
                for name, part in self.measurement.block_sums(self.tensor, block).items():
                    sums[name] = _combined(name, sums.get(name), part)
        return SectionSums(begin, sums, (torch.cat(sampled, 1) if sampled else torch.empty(0)).numpy())

    def _sampled(self, chunks: Sequence[torch.Tensor], start: int, count: int) -> torch.Tensor:
        """Return the elements of the sample in a chunk that begins at element ``start``: (models, elements)."""
        rows, columns = self._sample
        row = self.tensor.row
        first = -(-(start // row) // rows.step) * rows.step  # the first sampled row that the chunk touches
        near = torch.arange(first, max(first, -(-(start + count) // row)), rows.step)
        index = (near[:, None] * row + torch.arange(0, row, columns.step)).flatten() - start
        inside = index[torch.searchsorted(index, 0) : torch.searchsorted(index, count)]
        return torch.stack([chunk.index_select(0, inside).to(self._working) for chunk in chunks])

    def result(self, parts: Sequence[SectionSums]) -> Measured:
        """Return the result from the sums of all sections, in any order."""
        parts = sorted(parts, key=lambda part: part.begin)
        sums: dict[str, FloatArray] = {}
        for part in parts:
            for name, total in part.sums.items():
                sums[name] = _combined(name, sums.get(name), total)
        rows, columns = self._sample
        samples = [part.sample for part in parts]
        sample = torch.from_numpy(samples[0] if len(samples) == 1 else np.concatenate(samples, -1))
        if self.measurement.needs_sample:
            sample = sample.view(-1, len(rows), len(columns))
        return self.measurement.result(self.tensor, sums, sample)


def _combined(name: str, one: FloatArray | None, other: FloatArray) -> FloatArray:
    """Add two sums of a name, or take the maximum; ``one`` is None before the first block."""
    if one is None:
        return other
    return np.maximum(one, other) if name == LARGEST else np.add(one, other)
