"""Upload of one file of an output to an object store, from its first byte to its last, while it is still being made.

Spans are made in any order. The upload follows the front: the end of what is there without a gap. It lives in a thread
of its own, in whatever process makes the spans.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Iterator
from typing import NamedTuple

import xxhash

from mergekit_lite.backoff import wait_after
from mergekit_lite.errors import GOES_ON, RunError
from mergekit_lite.object_stores import Place, is_final, said, store_of
from mergekit_lite.output.spool import Spool

PART = 1 << 23  # bytes of a part of an upload
MOST_PARTS = 9_000  # of one upload; stores take 10,000
TIMEOUT = "600s"  # of the request of a part, which shares a slow line with the others
PATIENCE = 60.0  # seconds for which a request that broke is repeated
PIECE = 1 << 20  # bytes read from the spool at once
LONGEST_STOP = 10.0  # seconds that a store gets to answer, once nobody needs what is sent
IN_FLIGHT = 1 << 25  # bytes of the parts that an output has under way


class Extent(NamedTuple):
    """Bytes of a file that are made: where they begin and end, and their xxh3-128; no digest for what is no tensor."""

    begin: int
    end: int
    digest: str = ""


class Uploaded(NamedTuple):
    """An object that is complete: its size, and the store's tag of it, by which a change would be seen."""

    size: int
    etag: str


class Upload:
    """A file of ``size`` bytes on its way from a spool to a place.

    ``done`` is called in the upload's thread when the object is complete; what it raises, too, ends the upload.
    ``in_flight`` bounds the bytes of parts under way. Where it is ``held``, the last piece waits for ``complete``.
    """

    def __init__(
        self,
        place: Place,
        spool: Spool,
        size: int,
        done: Callable[[Uploaded], None],
        *,
        in_flight: int = IN_FLIGHT,
        held: bool = False,
    ) -> None:
        self.place = place
        self.size = size
        self.front = 0
        self.sent = 0
        self.failure: Exception | None = None
        self._spool = spool
        self._done = done
        self._part = max(PART, -(-size // MOST_PARTS))
        self._at_once = max(2, in_flight // self._part)
        self._held = held
        self._stopped = False
        self._is_begun = False  # whether bytes were asked for
        self._reason: Exception | None = None  # why there are no more pieces: obstore may tell of what follows from it
        self._made: dict[int, Extent] = {}  # by their first byte: those that are not sent yet
        self._changed = threading.Condition()
        self._thread: threading.Thread | None = None

    def made(self, extent: Extent) -> None:
        """Take note that an extent is made; the first one that can be sent starts the upload."""
        if extent.begin == extent.end:
            return
        with self._changed:
            self._made[extent.begin] = extent
            while (following := self._made.get(self.front)) is not None:
                self.front = following.end
            if self._thread is None and self.front > 0 and not self._stopped:
                self._thread = threading.Thread(target=self._run, daemon=True)
                self._thread.start()
            self._changed.notify_all()

    def wait(self, most: int) -> None:
        """Wait until at most ``most`` bytes before the front are not sent yet. Raises what ended the upload."""
        with self._changed:
            self._changed.wait_for(lambda: self.failure is not None or self.front - self.sent <= most)
        if self.failure is not None:
            raise self.failure

    def complete(self) -> None:
        """Wait until the object is complete. Raises what ended the upload."""
        with self._changed:
            self._held = False
            self._changed.notify_all()
        if self._thread is not None:
            self._thread.join()
        if self.failure is not None:
            raise self.failure
        if self._thread is None or self.sent < self.size:
            raise RunError(f"{self.place}: not all of it was made. {GOES_ON}")

    def stop(self) -> None:
        """Ask for no more bytes, unless it is complete; see ``stop_all``."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()

    def join(self, seconds: float) -> None:
        """Wait until it has ended, for a while."""
        if self._thread is not None:
            self._thread.join(seconds)

    def _run(self) -> None:
        try:
            uploaded = self._put()
            self._spool.clear()
            self._done(uploaded)
        except Exception as error:
            failure = error
            if not isinstance(error, RunError):
                failure = RunError(f"{self.place}: can't be written: {said(error)}. {GOES_ON}")
                failure.__cause__ = error
            with self._changed:
                self.failure = failure
                self._changed.notify_all()

    def _put(self) -> Uploaded:
        """Send all of it, and return what the store has then. Raises what obstore raises, and RunError."""
        import obstore

        store = store_of(self.place, timeout=TIMEOUT)
        broken: Exception | None = None
        until, failures = time.monotonic() + PATIENCE, 0
        while not self.sent:
            try:
                obstore.put(store, self.place.key, self._pieces(), chunk_size=self._part, max_concurrency=self._at_once)
            except Exception as error:
                if self.sent == self.size:
                    broken = error  # the answer to the last request may have got lost, and the object be complete
                elif self._is_begun or self._reason or is_final(error) or time.monotonic() > until:
                    raise self._reason or error from None
                else:  # the client doesn't repeat the first request where its answer was cut
                    failures += 1
                    time.sleep(wait_after(failures))
        try:
            there = obstore.head(store, self.place.key)
        except Exception as error:
            raise broken or error from None
        if there["size"] != self.size:
            raise RunError(f"{self.place}: has {there['size']:,} bytes, {self.size:,} were sent. {GOES_ON}")
        return Uploaded(there["size"], tag(there["e_tag"]))

    def _pieces(self) -> Iterator[bytearray]:
        self._is_begun = True
        try:
            while self.sent < self.size:
                yield from self._of_extent(self._next())
        except Exception as error:
            self._reason = error
            raise

    def _next(self) -> Extent:
        """Wait for the extent that is to be sent next."""
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or self.sent in self._made)
            if self._stopped:
                raise RunError(f"{self.place}: its upload was stopped. {GOES_ON}")
            return self._made.pop(self.sent)

    def _of_extent(self, extent: Extent) -> Iterator[bytearray]:
        """Yield an extent's bytes, and hold them to their digest before the last of them are sent."""
        digest = xxhash.xxh3_128()
        for begin in range(extent.begin, extent.end, PIECE):
            end = min(begin + PIECE, extent.end)
            piece = bytearray(end - begin)
            if not self._spool.read(begin, memoryview(piece)):
                raise RunError(f"{self.place}: its spool was cut short at byte {begin:,}. {GOES_ON}")
            digest.update(piece)
            if end == extent.end and extent.digest not in ("", digest.hexdigest()):
                raise RunError(
                    f"{self.place}: bytes {extent.begin:,} to {extent.end:,} are not what was written to the disk "
                    f"under {self.place.name}. Look for faulty memory or a faulty disk. {GOES_ON}"
                )
            if end == self.size:
                self._wait_to_complete()
            yield piece
            with self._changed:
                self.sent = end
                self._changed.notify_all()
            if end == extent.end or end % PART == 0:
                self._spool.release(end)

    def _wait_to_complete(self) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._stopped or not self._held)
            if self._stopped:
                raise RunError(f"{self.place}: its upload was stopped. {GOES_ON}")


def stop_all(uploads: Collection[Upload]) -> None:
    """End the uploads that aren't complete; the store is told to drop the parts that it has, if it answers soon."""
    until = time.monotonic() + LONGEST_STOP
    for upload in uploads:
        upload.stop()
    for upload in uploads:
        upload.join(max(0.0, until - time.monotonic()))


def tag(etag: str | None) -> str:
    """Return a store's tag of an object without the quotes that some requests give it."""
    return (etag or "").strip('"')
