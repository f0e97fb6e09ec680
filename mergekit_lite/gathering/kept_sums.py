"""Sums of a pass as they stood some batches ago, in a file beside the unfinished one, so that a kill loses little.

They are in the precision in which they are summed, so that whoever goes on with them comes to the same bytes. A pass is
known by a digest of what it does: sums of another pass, and damaged ones, are none.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path

import torch
import xxhash

from mergekit_lite import positioned
from mergekit_lite.checkpoint.reader import bytes_of

EVERY = 120.0  # seconds between two times of keeping, at least
SHARE = 20  # times as long as keeping took: so it takes a twentieth of the time at most
HEAD = 32 + 20 + 32  # bytes: the pass, how many batches are in the sums, a digest of both and of the data


class KeptSums:
    """The sums of one pass, kept in the file ``path``."""

    def __init__(self, path: Path, what: object) -> None:
        """Take the place of the file, and what tells this pass from all others by its ``repr``."""
        self._path, self._new = path, path.with_name(f"{path.name}.new")
        self._pass = xxhash.xxh3_128_hexdigest(repr(what).encode())
        self._due = time.monotonic() + EVERY

    def take_up(self, sums: Sequence[torch.Tensor]) -> int:
        """Fill tensors of zeros with what was kept; return how many batches are in it, else 0."""
        size = HEAD + sum(each.nbytes for each in sums)
        with suppress(OSError, ValueError):
            descriptor = positioned.open_file(self._path, os.O_RDONLY, links=False)
            try:
                head = bytes(positioned.read_bytes(descriptor, HEAD, 0)).decode("ascii")
                if head[:32] == self._pass and os.fstat(descriptor).st_size == size:
                    digest = xxhash.xxh3_128(head[:52].encode())
                    for data, begin, target in _on_cpu(sums):
                        _read(descriptor, data, begin)
                        digest.update(data)
                        if data:
                            target.copy_(torch.frombuffer(data, dtype=target.dtype).view(target.shape))
                    if digest.hexdigest() == head[52:]:
                        return int(head[32:52])
            finally:
                os.close(descriptor)
        for each in sums:
            each.zero_()
        return 0

    def keep(self, sums: Sequence[torch.Tensor], batches: int) -> None:
        """Keep the sums of some batches, if it is time. Where the disk has no room a kill loses more, but no result."""
        started = time.monotonic()
        if started < self._due:
            return
        try:
            self._write(sums, f"{self._pass}{batches:020}")
            self._new.replace(self._path)
        except OSError:
            _removed(self._new)  # the results need the room
        now = time.monotonic()
        self._due = now + max(EVERY, SHARE * (now - started))

    def discard(self) -> None:
        """Remove what was kept."""
        _removed(self._new)
        _removed(self._path)

    def _write(self, sums: Sequence[torch.Tensor], what: str) -> None:
        descriptor = positioned.open_file(self._new, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, links=False)
        try:
            digest = xxhash.xxh3_128(what.encode())
            for data, begin, _ in _on_cpu(sums):
                digest.update(data)
                _write(descriptor, data, begin)
            _write(descriptor, memoryview(f"{what}{digest.hexdigest()}".encode()), 0)
        finally:
            os.close(descriptor)


def _on_cpu(sums: Sequence[torch.Tensor]) -> Iterator[tuple[memoryview, int, torch.Tensor]]:
    """Yield the bytes of each tensor on the CPU, where they lie in the file, and the tensor."""
    begin = HEAD
    for each in sums:
        yield bytes_of(each.cpu().reshape(-1)), begin, each
        begin += each.nbytes


def _read(descriptor: int, data: memoryview, place: int) -> None:
    """Fill ``data``. Raises ValueError where the file ends before."""
    done = 0
    while done < len(data):
        if not (came := positioned.read(descriptor, data[done:], place + done)):
            raise ValueError(place)
        done += came


def _write(descriptor: int, data: memoryview, place: int) -> None:
    done = 0
    while done < len(data):
        done += positioned.write(descriptor, data[done:], place + done)


def _removed(path: Path) -> None:
    with suppress(OSError):
        path.unlink()
