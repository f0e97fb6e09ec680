"""One streaming read of some models' weights: sums over every element, and a fixed sample for what costs more.

Each tensor is cut into sections, always at the same places, and each section is read once by one lane. Sums over
sections are added in their order, so no figure depends on the number of threads. The sample is a grid of rows and
columns, evenly spaced; a tensor that is no larger than the sample is looked at whole.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable, Mapping, Sequence
from typing import Generic, Protocol, TypeVar

import torch

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.engine.lane import Lane
from mergekit_lite.engine.pool import Pool, available_cores, tuned_process
from mergekit_lite.engine.spans import CHUNK, cut
from mergekit_lite.methods.passes import SECTION, STATISTICS_BLOCK
from mergekit_lite.vectors.matching import Match

SAMPLE_ROWS, SAMPLE_COLUMNS = 256, 512  # of the largest sample of a tensor
SAMPLED = 32  # in large models a sample is one element in so many
LEAST_SAMPLE = 1 << 14  # but not fewer than these
SMALL_MODEL = 1 << 23  # elements up to which every tensor has the largest sample
WIDEST_ROW = CHUNK  # longer rows are not kept together

LARGEST = "largest"  # the one that is no sum: of two parts the larger one counts
Sums = Mapping[str, torch.Tensor]  # each additive over blocks, on the CPU
Finding = TypeVar("Finding")
Result = TypeVar("Result", covariant=True)
Progress = Callable[[int, int], None]


class Study(Protocol[Result]):
    """What is looked for in a tensor."""

    sampled: bool  # whether ``conclude`` wants a sample

    def look(self, match: Match, block: torch.Tensor) -> Sums:
        """The sums over one block: (models, elements) in the working dtype; whole rows unless they are very long."""
        ...

    def conclude(self, match: Match, sums: Sums, sample: torch.Tensor) -> Result:
        """What was found in a tensor, from its sums and its sample (models, rows, columns)."""
        ...


def survey(
    matches: Sequence[Match], study: Study[Finding], threads: int | None = None, progress: Progress | None = None
) -> list[Finding]:
    """Look at every tensor once.

    Args:
        matches: the tensors; all of the same number of models.
        study: what is looked for.
        threads: workers, one for each core by default.
        progress: called with (bytes read, bytes in all).

    Returns:
        What was found in each.

    Raises:
        RunError: a file can't be read.
    """
    small = sum(match.numel for match in matches) <= SMALL_MODEL
    under_way = [_UnderWay(match, study, grid(match, small)) for match in matches]
    tasks = [(tensor, begin, end) for tensor in under_way for begin, end in tensor.sections]
    widest = max((dtypes.size(spec.dtype) for match in matches for spec in match.specs), default=1)
    inputs = max((len(match.specs) for match in matches), default=0)
    total = sum(match.nbytes for match in matches)
    done = 0

    def look(lane: Lane, reader: Reader, task: tuple[_UnderWay[Finding], int, int]) -> int:
        tensor, begin, end = task
        tensor.read(lane, reader, begin, end)
        return tensor.match.nbytes * (end - begin) // tensor.match.numel

    room = max((tensor.chunk for tensor in under_way), default=0) * widest
    with tuned_process():
        for nbytes in Pool(threads or available_cores(), torch.device("cpu"), inputs, room).run(tasks, look):
            done += nbytes
            if progress is not None:
                progress(done, total)
    found = [tensor.finding for tensor in under_way]
    return [one for one in found if one is not None]


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


class _UnderWay(Generic[Finding]):
    """One tensor of which some sections are read. The lane that reads the last one draws the conclusion."""

    def __init__(self, match: Match, study: Study[Finding], sample: tuple[range, range]) -> None:
        self.match, self.study, self._sample = match, study, sample
        self.finding: Finding | None = None
        row = match.row if 0 < match.row <= WIDEST_ROW else 1
        self._block = max(1, STATISTICS_BLOCK // row) * row
        self.chunk = min(max(self._block, CHUNK // self._block * self._block), match.numel)
        section = max(1, SECTION // self._block) * self._block
        self.sections = [(begin, begin + count) for begin, count in cut(0, match.numel, section)]
        self.working = dtypes.working([dtypes.torch_dtype(spec.dtype) for spec in match.specs], torch.bfloat16)
        self._parts: dict[int, tuple[dict[str, torch.Tensor], torch.Tensor]] = {}
        self._turn = threading.Lock()

    def read(self, lane: Lane, reader: Reader, begin: int, end: int) -> None:
        """Look at one section."""
        sums: dict[str, torch.Tensor] = {}
        picked: list[torch.Tensor] = []
        for start, count in cut(begin, end, self.chunk):
            chunks = [lane.read(reader, n, spec, start, count) for n, spec in enumerate(self.match.specs)]
            if self.study.sampled:
                picked.append(self._picked(chunks, start, count))
            for first, length in cut(0, count, self._block):
                block = torch.empty(len(chunks), length, dtype=self.working)
                for wide, chunk in zip(block, chunks, strict=True):
                    wide.copy_(chunk[first : first + length])
                for name, part in self.study.look(self.match, block).items():
                    sums[name] = part.clone() if name not in sums else _joined(name, sums[name], part)
        sample = torch.cat(picked, 1) if picked else torch.empty(0)
        with self._turn:
            self._parts[begin] = sums, sample
            if len(self._parts) < len(self.sections):
                return
        self._conclude()

    def _picked(self, chunks: Sequence[torch.Tensor], start: int, count: int) -> torch.Tensor:
        """The sample's elements in a chunk: (models, elements)."""
        rows, columns = self._sample
        row = self.match.row
        first = -(-(start // row) // rows.step) * rows.step
        near = torch.arange(first, max(first, -(-(start + count) // row)), rows.step)
        index = (near[:, None] * row + torch.arange(0, row, columns.step)).flatten() - start
        inside = index[torch.searchsorted(index, 0) : torch.searchsorted(index, count)]
        return torch.stack([chunk.index_select(0, inside).to(self.working) for chunk in chunks])

    def _conclude(self) -> None:
        parts = [self._parts[begin] for begin in sorted(self._parts)]
        self._parts.clear()
        sums = parts[0][0]
        for others, _ in parts[1:]:
            for name, part in others.items():
                sums[name] = _joined(name, sums[name], part)
        rows, columns = self._sample
        sample = parts[0][1]
        if self.study.sampled:
            sample = torch.cat([part for _, part in parts], 1).view(-1, len(rows), len(columns))
        self.finding = self.study.conclude(self.match, sums, sample)


def _joined(name: str, one: torch.Tensor, other: torch.Tensor) -> torch.Tensor:
    return torch.maximum(one, other) if name == LARGEST else one.add_(other)
