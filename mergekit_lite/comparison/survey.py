"""One streaming read of some models' weights: sums over every element, and a fixed sample for what costs more.

Each tensor is cut into sections, always at the same places, and each section is read once by one worker. Sums over
sections are added in their order, so no figure depends on the number of workers. The sample is a grid of rows and
columns, evenly spaced; a tensor that is no larger than the sample is looked at whole.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Generic, NamedTuple, Protocol, TypeVar

import numpy as np
import numpy.typing as npt

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader, tensor_of
from mergekit_lite.deferred import torch
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.pool import Pool, available_cores, tuned_process
from mergekit_lite.engine.tiling import CHUNK, cut
from mergekit_lite.methods.tensor_merge import SECTION, STATISTICS_BLOCK
from mergekit_lite.vectors.matching import Match

SAMPLE_ROWS, SAMPLE_COLUMNS = 256, 512  # of the largest sample of a tensor
SAMPLED = 32  # in large models a sample is one element in so many
LEAST_SAMPLE = 1 << 14  # but not fewer than these
SMALL_MODEL = 1 << 23  # elements up to which every tensor has the largest sample
WIDEST_ROW = CHUNK  # longer rows are not kept together
SHARED = 8  # sections up to which a tensor is one worker's; the workers share larger ones

LARGEST = "largest"  # the one that is no sum: of two parts the larger one counts
Numbers = npt.NDArray[np.float64]
Reduction = Mapping[str, Numbers]  # each additive over blocks
Section = tuple[int, int]  # first element, and the one after the last
Finding = TypeVar("Finding")
Result = TypeVar("Result", covariant=True)
Progress = Callable[[int, int], None]


class Study(Protocol[Result]):
    """What is looked for in a tensor. Results may come from another process: small and plain, without their tensor."""

    sampled: bool  # whether ``conclude`` wants a sample

    def look(self, match: Match, block: torch.Tensor) -> Reduction:
        """The sums over one block: (models, elements) in the working dtype; whole rows unless they are very long."""
        ...

    def conclude(self, match: Match, sums: Reduction, sample: torch.Tensor) -> Result:
        """What was found in a tensor, from its sums and its sample (models, rows, columns)."""
        ...


class Part(NamedTuple):
    """What was read of a tensor in one section: its sums, and the sample's elements (models, elements)."""

    begin: int
    sums: Reduction
    sample: npt.NDArray[np.floating]


def survey(
    matches: Sequence[Match],
    study: Study[Finding],
    threads: int | None = None,
    progress: Progress | None = None,
    processes: bool = False,
) -> Iterator[tuple[int, Finding]]:
    """Look at every tensor once.

    Args:
        matches: the tensors; all of the same number of models.
        study: what is looked for.
        threads: workers, one for each core by default.
        progress: called with (bytes read, bytes in all).
        processes: fork the workers, as for ``engine.run``.

    Yields:
        The number of a tensor and what was found in it, as they get done.

    Raises:
        RunError: a file can't be read.
    """
    small = sum(match.numel for match in matches) <= SMALL_MODEL
    tensors = [_Tensor(match, study, grid(match, small)) for match in matches]
    tasks = [(number, sections) for number, tensor in enumerate(tensors) for sections in tensor.tasks]
    widest = max((dtypes.size(spec.dtype) for match in matches for spec in match.specs), default=1)
    inputs = max((len(match.specs) for match in matches), default=0)
    total = sum(match.nbytes for match in matches)
    done = 0

    def look(
        buffers: WorkerBuffers, reader: Reader, task: tuple[int, list[Section]]
    ) -> tuple[int, list[Part], Finding | None]:
        number, sections = task
        tensor = tensors[number]
        with torch.inference_mode():
            parts = [tensor.read(buffers, reader, begin, end) for begin, end in sections]
            return (number, parts, None) if len(tensor.tasks) > 1 else (number, [], tensor.conclude(parts))

    room = max((tensor.chunk for tensor in tensors), default=0) * widest
    pool = Pool(threads or available_cores(), CPU, inputs, room, processes=processes)
    shared: dict[int, list[Part]] = {}
    with tuned_process():
        for number, parts, finding in pool.run(tasks, look):
            tensor = tensors[number]
            done += tensor.match.nbytes // len(tensor.tasks)
            if progress is not None:
                progress(done, total)
            if finding is None:
                together = shared.setdefault(number, [])
                together += parts
                if len(together) < len(tensor.tasks):
                    continue
                with torch.inference_mode():
                    finding = tensor.conclude(shared.pop(number))
            yield number, finding


def grid(match: Match, small: bool) -> tuple[range, range]:
    """The rows and columns of a tensor's sample; ``small`` for the largest sample, as in small models.

    A vector is one row. What has more than two dimensions is rows one below the other.
    """
    most = SAMPLE_ROWS * SAMPLE_COLUMNS
    wanted = most if small else min(most, max(LEAST_SAMPLE, match.numel // SAMPLED))
    rows, columns = (1, match.numel) if len(match.shape) < 2 else (match.numel // match.row, match.row)
    square = math.isqrt(wanted // 2)  # twice as many columns as rows, or all there are of one of them
    taken = _spread(rows, max(square, wanted // columns))
    return taken, _spread(columns, max(2 * square, wanted // len(taken)))


def _spread(count: int, most: int) -> range:
    step = -(-count // most)
    return range(0, count, step)


class _Tensor(Generic[Finding]):
    """How one tensor is cut and looked at."""

    def __init__(self, match: Match, study: Study[Finding], sample: tuple[range, range]) -> None:
        self.match, self.study, self._sample = match, study, sample
        row = match.row if 0 < match.row <= WIDEST_ROW else 1
        self._block = max(1, STATISTICS_BLOCK // row) * row
        self.chunk = min(max(self._block, CHUNK // self._block * self._block), match.numel)
        section = max(1, SECTION // self._block) * self._block
        sections = [(begin, begin + count) for begin, count in cut(0, match.numel, section)]
        self.tasks = [sections] if len(sections) <= SHARED else [[one] for one in sections]
        self._working = dtypes.working(spec.dtype for spec in match.specs)

    def read(self, buffers: WorkerBuffers, reader: Reader, begin: int, end: int) -> Part:
        """Look at one section."""
        sums: dict[str, Numbers] = {}
        picked: list[torch.Tensor] = []
        for start, count in cut(begin, end, self.chunk):
            chunks = [
                tensor_of(buffers.read(reader, n, spec, start, count), spec.dtype)
                for n, spec in enumerate(self.match.specs)
            ]
            if self.study.sampled:
                picked.append(self._picked(chunks, start, count))
            for first, length in cut(0, count, self._block):
                block = torch.empty(len(chunks), length, dtype=self._working)
                for wide, chunk in zip(block, chunks, strict=True):
                    wide.copy_(chunk[first : first + length])
                for name, part in self.study.look(self.match, block).items():
                    sums[name] = _joined(name, sums.get(name), part)
        return Part(begin, sums, (torch.cat(picked, 1) if picked else torch.empty(0)).numpy())

    def _picked(self, chunks: Sequence[torch.Tensor], start: int, count: int) -> torch.Tensor:
        """The sample's elements in a chunk: (models, elements)."""
        rows, columns = self._sample
        row = self.match.row
        first = -(-(start // row) // rows.step) * rows.step
        near = torch.arange(first, max(first, -(-(start + count) // row)), rows.step)
        index = (near[:, None] * row + torch.arange(0, row, columns.step)).flatten() - start
        inside = index[torch.searchsorted(index, 0) : torch.searchsorted(index, count)]
        return torch.stack([chunk.index_select(0, inside).to(self._working) for chunk in chunks])

    def conclude(self, parts: Sequence[Part]) -> Finding:
        """What was found, from the parts of all sections."""
        parts = sorted(parts, key=lambda part: part.begin)
        sums: dict[str, Numbers] = {}
        for part in parts:
            for name, own in part.sums.items():
                sums[name] = _joined(name, sums.get(name), own)
        rows, columns = self._sample
        sample = torch.from_numpy(np.concatenate([part.sample for part in parts], -1))
        if self.study.sampled:
            sample = sample.view(-1, len(rows), len(columns))
        return self.study.conclude(self.match, sums, sample)


def _joined(name: str, one: Numbers | None, other: Numbers) -> Numbers:
    if one is None:
        return other
    return np.maximum(one, other) if name == LARGEST else np.add(one, other)
