"""Ranges of files elsewhere, fetched until they are whole: what fails is asked for again, what changed is an error."""

from __future__ import annotations

import io
import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lite import object_stores, store_process
from mergekit_lite.backoff import asked_wait, wait_after
from mergekit_lite.checkpoint.stores.addresses import address_of, moved
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.errors import GOES_ON, CheckpointError, RunError
from mergekit_lite.locks import ThreadLock

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.stores import http as requests

ATTEMPTS = 12  # in a row that bring no byte, or too slowly, before a range is given up
BUFFERED = 1 << 18  # bytes of a header that are fetched at once
PIECE = 1 << 18  # bytes that are read at once: as many are lost at most where an answer breaks
RANGE = re.compile(r"bytes (?P<first>\d+)-(?P<last>\d+)/(?P<size>\d+|\*)")
COMPRESSED = ("br", "compress", "deflate", "gzip", "x-gzip", "zstd")


@dataclass
class Traffic:
    """What was fetched: bytes of answers, requests, and how many of those had to be repeated."""

    nbytes: int = 0
    requests: int = 0
    repeated: int = 0

    def add(self, other: Traffic) -> None:
        """Count what another process or thread fetched."""
        with _lock:
            self.nbytes += other.nbytes
            self.requests += other.requests
            self.repeated += other.repeated

    def as_json(self) -> dict[str, int]:
        """Return the counts as plain data."""
        return {"bytes": self.nbytes, "requests": self.requests, "repeated": self.repeated}

    def taken(self) -> Traffic:
        """Return what was counted, and begin again at nothing."""
        with _lock:
            counted = Traffic(self.nbytes, self.requests, self.repeated)
            self.nbytes = self.requests = self.repeated = 0
        return counted


class _Again(Exception):
    """A request that failed in a way that may pass; ``wait`` are the seconds that the server asked for."""

    def __init__(self, why: str, wait: float = 0.0, *, anew: bool = False):
        super().__init__(why)
        self.wait = wait
        self.anew = anew


_lock = ThreadLock()
TRAFFIC = Traffic()  # of this process, and of the workers whose work it took


def fetch(file: RemoteFile, begin: int, out: memoryview) -> None:
    """Fill ``out`` with the bytes of a file from ``begin`` on.

    Raises:
        CheckpointError: it is gone, isn't the one that was opened, or may not be read.
        RunError: it can't be fetched.
    """
    done = failures = 0
    anew = False
    while done < len(out):
        before, slow = done, False
        why: _Again
        try:
            done += _fetch_some(file, begin + done, out[done:], anew=anew)
            anew = False
            if done < len(out):
                raise _Again("the answer was cut short")
        except _Partly as partly:
            done += partly.nbytes
            why, slow = _Again(partly.why), partly.slow
        except _Again as again:
            why = again
        else:
            return
        failures = 0 if done > before and not slow else failures + 1
        if anew and why.anew:
            raise CheckpointError(f"{file.url}: {object_stores.denied(file.url)} ({why})") from why
        anew = why.anew
        if failures >= ATTEMPTS:
            raise RunError(
                f"{file.url}: bytes {begin + done:,} to {begin + len(out):,} can't be fetched, after {ATTEMPTS} "
                f"attempts: {why}. {GOES_ON}"
            )
        TRAFFIC.add(Traffic(repeated=1))
        time.sleep(wait_after(failures, why.wait))


class _Partly(Exception):
    """An answer that ended before its end; ``nbytes`` of it came."""

    def __init__(self, nbytes: int, why: str, *, slow: bool = False):
        super().__init__(why)
        self.nbytes, self.why, self.slow = nbytes, why, slow


def _fetch_some(file: RemoteFile, begin: int, out: memoryview, *, anew: bool) -> int:
    """Request a range once, and return how much of it came. Raises _Again, _Partly, or what is final."""
    try:
        address = address_of(file, anew=anew)
        if not address.url:
            data = store_process.ask("read", file.url, begin, begin + len(out), file.etag)
            TRAFFIC.add(Traffic(len(data), 1))
            if len(data) > len(out):
                raise RunError(f"{file.url}: {object_stores.NO_RANGES}")
            out[: len(data)] = data
            return len(data)
    except FileNotFoundError as error:
        raise CheckpointError(f"{file.url}: was there when it was opened, and is gone.") from error
    except PermissionError as error:
        raise CheckpointError(f"{file.url}: {object_stores.denied(file.url)}") from error
    except OSError as error:
        raise _Again(str(error)) from error
    from mergekit_lite.checkpoint.stores import http as requests  # with TLS, which only requests need

    wanted = {"Range": f"bytes={begin}-{begin + len(out) - 1}", "Accept-Encoding": "identity", **address.headers}
    try:
        answer = requests.followed("GET", address.url, wanted, address.secret)
    except requests.Refused as error:
        raise RunError(f"{file.url}: {error}") from None
    except requests.Unanswered as error:
        raise _Again(str(error)) from error
    with answer:
        count = _checked(file, begin, len(out), answer)
        moved(file, answer.url)
        return _read(answer, out[:count])


def _read(answer: requests.Answer, out: memoryview) -> int:
    from mergekit_lite.checkpoint.stores import http as requests

    done = 0
    try:
        while done < len(out) and (count := answer.read_into(out[done : done + PIECE])):
            done += count
    except requests.Unanswered as error:
        raise _Partly(done, str(error), slow=error.slow) from error
    finally:
        TRAFFIC.add(Traffic(done, 1))
    if done < len(out):
        raise _Partly(done, "the answer was cut short")
    return done


def _checked(file: RemoteFile, begin: int, length: int, answer: requests.Answer) -> int:
    """Hold the head of an answer to what was asked for; return how many bytes of that it brings.

    Raises _Again where asking again may help.
    """
    status = answer.status
    if status in (408, 425, 429) or status >= 500:
        raise _Again(f"the server answered {status}", asked_wait(answer.headers.get("Retry-After")))
    if status in (404, 410):
        raise CheckpointError(f"{file.url}: was there when it was opened, and is gone (the server answered {status}).")
    if status in (412, 416):
        raise RunError(f"{file.url}: {object_stores.CHANGED}")
    if status in (400, 401, 403):
        raise _Again(f"the server answered {status}: access was refused", anew=True)
    if status not in (200, 206):
        raise RunError(f"{file.url}: the server answered {status}, which is no range of a file.")
    if (encoding := answer.headers.get("Content-Encoding", "").lower()) in COMPRESSED:
        raise RunError(
            f"{file.url}: its server sends it compressed ({encoding}), so ranges of it can't be read. Store it as it "
            "is, without Content-Encoding; or download the model, and name the folder."
        )
    etag = answer.headers.get("ETag")
    if etag and file.etag and not file.url.startswith("hf://") and bare(etag) != file.etag:
        raise RunError(f"{file.url}: {object_stores.CHANGED}")
    told = RANGE.fullmatch(answer.headers.get("Content-Range", ""))
    if told is None:
        if status == 200 and begin == 0 and answer.length == length == file.size:
            return length
        raise RunError(f"{file.url}: {object_stores.NO_RANGES}")
    if told["size"] not in ("*", str(file.size)):
        raise RunError(f"{file.url}: {object_stores.CHANGED}")
    count = int(told["last"]) - begin + 1
    if int(told["first"]) != begin or not 0 < count <= length or answer.length not in (None, count):
        raise _Again("the server sent another range than was asked for")
    return count


def bare(etag: str) -> str:
    """Return an etag without its quotes."""
    return etag.replace('"', "")


class RangeFile(io.RawIOBase):
    """A file elsewhere as an open file, for headers: what is read is fetched in blocks, of which a few are kept."""

    def __init__(self, file: RemoteFile):
        self._file = file
        self._position = 0
        self._blocks: dict[int, bytes] = {}

    def seekable(self) -> bool:
        """Return True."""
        return True

    def readable(self) -> bool:
        """Return True."""
        return True

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        """Move to a byte."""
        origin = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._file.size}[whence]
        if origin + offset < 0:
            raise OSError(22, "before the begin of the file")
        self._position = origin + offset
        return self._position

    def tell(self) -> int:
        """Return the byte that is read next."""
        return self._position

    def readinto(self, out: memoryview) -> int:  # type: ignore[override]
        """Fill ``out`` as far as the file goes."""
        data = self.read(len(out))
        memoryview(out).cast("B")[: len(data)] = data
        return len(data)

    def read(self, size: int | None = -1) -> bytes:
        """Return up to ``size`` bytes."""
        rest = max(0, self._file.size - self._position)
        count = rest if size is None or size < 0 else min(size, rest)
        if count > BUFFERED:
            data = bytearray(count)
            fetch(self._file, self._position, memoryview(data))
            self._position += count
            return bytes(data)
        pieces = []
        while count:
            number, within = divmod(self._position, BUFFERED)
            piece = self._block(number)[within : within + count]
            pieces.append(piece)
            self._position += len(piece)
            count -= len(piece)
        return b"".join(pieces)

    def _block(self, number: int) -> bytes:
        if number not in self._blocks:
            begin = number * BUFFERED
            data = bytearray(min(BUFFERED, self._file.size - begin))
            fetch(self._file, begin, memoryview(data))
            if len(self._blocks) >= 8:
                del self._blocks[next(iter(self._blocks))]
            self._blocks[number] = bytes(data)
        return self._blocks[number]
