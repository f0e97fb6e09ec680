"""What stands in an object store under an output's name and beside it, and who may write there.

    NAME/model-00001-of-00002.safetensors    a shard, whole: stores show an upload only when it is complete
    NAME/…, NAME/mergekit_lite_manifest.json  everything else, the manifest last: without it there is no output
    .NAME.partial/lock                        held by the run that works here, and renewed while it lives
    .NAME.partial/FILE.jsonl                  the journal of a finished file: its size, its tag, and its spans

A store has no renames and no locks that end with their holder. So a run that isn't heard of for a while counts as dead.
"""

from __future__ import annotations

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import suppress
from datetime import datetime
from itertools import count
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar

import xxhash

from mergekit_lite.backoff import wait_after
from mergekit_lite.errors import GOES_ON, UNFINISHED, RunError, UsageError, counted
from mergekit_lite.layout import is_single_file
from mergekit_lite.object_stores import Place, denied, is_final, no_bucket, said, store_of
from mergekit_lite.output.upload import PATIENCE, Uploaded, tag
from mergekit_lite.output.workspace import manifest_path
from mergekit_lite.plain_text import is_plain_line

if TYPE_CHECKING:
    from obstore.store import ObjectStore

LOCK = "lock"
PROBE = "probe"  # written to learn what time it is in the store
JOURNAL_ENDING = ".jsonl"
RENEWED = 10.0  # seconds between two signs of life
DEAD = 40.0  # seconds without one after which a run counts as dead
SETTLED = 2.0  # seconds after which whoever took over a dead run's lock at the same time has done so
T = TypeVar("T")


def standing(output: Place) -> dict[str, int]:
    """Return the sizes of the objects of an output, by their names in it; of a single file its own and its manifest.

    Raises RunError.
    """
    if not is_single_file(output):
        return RemoteFolder(output).sizes()
    folder = RemoteFolder(output.folder)
    found = {name: folder.head(name) for name in (output.name, manifest_path(output).name)}
    return {name: there[0].size for name, there in found.items() if there is not None}


def partial(output: Place) -> Place:
    """Return the prefix of what an unfinished output has beside it."""
    return output.with_name(f".{output.name}.partial")


class Seen(NamedTuple):
    """A small object as it was: its bytes, what tells its version to the store, and when it was written."""

    content: bytes
    version: dict[str, str]
    written: datetime


class RemoteFolder:
    """The objects under a prefix. Every method raises RunError where the store can't be reached or refuses.

    One that is ``hurried`` hardly repeats a request that failed.
    """

    def __init__(self, place: Place, *, hurried: bool = False) -> None:
        self.place = place
        self._store: ObjectStore = store_of(place, retries=2) if hurried else store_of(place)
        self._patience = 1.0 if hurried else PATIENCE

    def sizes(self) -> dict[str, int]:
        """Return the size of each object, by its name relative to the prefix."""
        import obstore

        prefix = f"{self.place.key}/" if self.place.key else ""
        pages = _asked(self.place, self._patience, lambda: list(obstore.list(self._store, self.place.key)))
        listed = [each for page in pages or () for each in page]
        return {each["path"].removeprefix(prefix): each["size"] for each in listed if each["path"].startswith(prefix)}

    def head(self, name: str) -> tuple[Uploaded, datetime] | None:
        """Return the size and tag of an object, and when it was written; None where there is none."""
        import obstore

        place = self.place / name
        there = _asked(place, self._patience, lambda: obstore.head(self._store, place.key))
        return None if there is None else (Uploaded(there["size"], tag(there["e_tag"])), there["last_modified"])

    def get(self, name: str) -> bytes | None:
        """Return the bytes of a small object; None where there is none."""
        import obstore

        place = self.place / name
        return _asked(place, self._patience, lambda: bytes(obstore.get(self._store, place.key).bytes()))

    def look(self, name: str) -> Seen | None:
        """Return a small object as it is now; None where there is none."""
        import obstore

        place = self.place / name

        def seen() -> Seen:
            found = obstore.get(self._store, place.key)
            told = {"e_tag": found.meta["e_tag"], "version": found.meta.get("version")}
            version = {name: value for name, value in told.items() if value}
            return Seen(bytes(found.bytes()), version, found.meta["last_modified"])

        return _asked(place, self._patience, seen)

    def digests(self, name: str, lengths: Sequence[int]) -> list[str]:
        """Return the xxh3-128 of an object's bytes, piece by piece, of some lengths; none where there is no object."""
        import obstore

        place = self.place / name

        def read() -> list[str]:
            found: list[str] = []
            digest, left = xxhash.xxh3_128(), lengths[0]
            for chunk in obstore.get(self._store, place.key).stream():
                rest = memoryview(chunk)
                while rest and len(found) < len(lengths):
                    digest.update(rest[:left])
                    rest, left = rest[left:], left - len(rest[:left])
                    if not left:
                        found.append(digest.hexdigest())
                        digest, left = xxhash.xxh3_128(), lengths[len(found) % len(lengths)]
            return found

        return _asked(place, self._patience, read) or []

    def put(self, name: str, content: bytes) -> None:
        """Write a small object, in place of what has its name."""
        import obstore

        place = self.place / name
        _asked(place, self._patience, lambda: obstore.put(self._store, place.key, content, use_multipart=False))

    def write_over(self, name: str, content: bytes, seen: Seen | None) -> None:
        """Write a small object if it still is what was seen of it, or where there was none, if the store looks.

        What is there afterwards tells whether it was.
        """
        import obstore
        from obstore.exceptions import AlreadyExistsError, PreconditionError

        place = self.place / name
        mode: Any = "create" if seen is None else seen.version or "overwrite"

        def write() -> None:
            with suppress(AlreadyExistsError, PreconditionError):  # it is another one
                obstore.put(self._store, place.key, content, mode=mode)

        try:
            _asked(place, self._patience, write)
        except NotImplementedError:
            self.put(name, content)

    def delete(self, *names: str) -> None:
        """Remove objects; those that don't exist are fine."""
        import obstore

        for place in (self.place / name for name in names):
            _asked(place, self._patience, lambda place=place: obstore.delete(self._store, place.key))  # type: ignore[misc]


def _asked(place: Place, patience: float, request: Callable[[], T]) -> T | None:
    """Return what a request of a store gives; None where what is asked for isn't there.

    It is repeated for ``patience`` seconds where it broke: the client repeats requests by itself, but not those whose
    answer was cut. Raises RunError; NotImplementedError where the store can't do it.
    """
    from obstore.exceptions import BaseError, NotSupportedError, PermissionDeniedError
    from obstore.exceptions import UnauthenticatedError as Unauthenticated

    until = time.monotonic() + patience
    for failures in count(1):
        try:
            return request()
        except FileNotFoundError:
            return None
        except (NotSupportedError, NotImplementedError) as error:
            raise NotImplementedError from error
        except (BaseError, PermissionError, OSError, ValueError) as error:
            if "answered 501" in said(error):
                raise NotImplementedError from error
            if lost := no_bucket(place, said(error)):
                raise RunError(lost) from None
            is_denied = isinstance(error, PermissionError | PermissionDeniedError | Unauthenticated)
            if is_denied or "answered 403" in said(error) or "answered 401" in said(error):
                raise RunError(f"{place}: {said(error)}: {denied(str(place))}") from None
            if time.monotonic() > until or is_final(error):
                raise RunError(f"{place}: can't be reached or written: {said(error)}. {GOES_ON}") from None
            time.sleep(wait_after(failures))
    raise AssertionError


class Lock:
    """The lock of an output in a store, held and renewed until it is closed.

    It is written on the condition that it still is what was read of it. Stores that look at conditions, S3, GCS, Azure,
    MinIO and R2 among them, so give it to one alone, also where it is taken over from a dead run or that one comes to
    life again. Others write in any case (rclone's server): two that come within the same moment may both believe they
    have it, until one finds the other's name in it, after a while or at its next renewal, and stops.
    Raises RunError where another run holds it, or has not been silent for long enough.
    """

    def __init__(self, folder: RemoteFolder) -> None:
        self._folder = folder
        self.text = os.urandom(16).hex()
        self._own = self.text.encode()
        self._signs = 0  # of life: each is another content, and so another tag
        self._closed = threading.Event()
        self.lost = False
        self._take()
        self._thread = threading.Thread(target=self._renew, daemon=True)
        self._thread.start()

    def check(self) -> None:
        """Raise RunError where another run has taken the lock over."""
        if self.lost:
            raise self._taken()

    def close(self) -> None:
        """Give it back, if it is still held."""
        self._closed.set()
        self._thread.join(RENEWED)  # a request to a store that is out of reach may go on for minutes
        with suppress(RunError):  # of a store that is out of reach, which is why this run ends: nobody shall wait again
            folder = RemoteFolder(self._folder.place, hurried=True)
            if self._is_own(folder.look(LOCK)):
                folder.delete(LOCK)

    def _take(self) -> None:
        first = self._folder.look(LOCK)
        if first is not None:
            left = min(DEAD, DEAD - self._silent_for(first.written))  # a store's clock may have been put back
            while left > 0:
                time.sleep(min(left, RENEWED))
                now = self._folder.look(LOCK)
                if now is not None and now.content != first.content:
                    raise self._taken()
                left -= RENEWED
                if now is None:  # it was given back: whoever is first may have it
                    first = None
                    break
        self._write(first)
        if first is not None:  # a store that looks at no conditions may have let another one take it over as well
            time.sleep(SETTLED)
        if not self._is_own(self._folder.look(LOCK)):
            raise self._taken()

    def _write(self, seen: Seen | None) -> None:
        """Write a sign of life in place of what was seen, if that is still there and the store looks."""
        self._signs += 1
        self._folder.write_over(LOCK, self._own + b" %d" % self._signs, seen)

    def _is_own(self, seen: Seen | None) -> bool:
        return seen is not None and seen.content.startswith(self._own)

    def _silent_for(self, written: datetime) -> float:
        """Return the seconds since a time of the store's, by its own clock."""
        self._folder.put(PROBE, self._own)
        probe = self._folder.head(PROBE)
        self._folder.delete(PROBE)
        return (probe[1] - written).total_seconds() if probe is not None else 0.0

    def _renew(self) -> None:
        while not self._closed.wait(RENEWED):
            with suppress(RunError):  # of a store out of reach: the uploads tell
                seen = self._folder.look(LOCK)
                self.lost |= not self._is_own(seen)  # or gone: whoever took it over has finished, and gave it back
                if self.lost or self._closed.is_set():
                    return
                self._write(seen)

    def _taken(self) -> RunError:
        return RunError(f"{self._folder.place}: another run is making this output. Wait for it, or stop it.")


class FinishedFile:
    """The journal of a finished file of an output, as text: what it belongs to, the object, and its spans' lines."""

    def __init__(self, head: dict[str, Any], uploaded: Uploaded, lines: list[bytes]) -> None:
        self.head = head
        self.uploaded = uploaded
        self.lines = lines

    def to_bytes(self) -> bytes:
        """Return the object's content."""
        first = json.dumps({**self.head, "size": self.uploaded.size, "etag": self.uploaded.etag}).encode()
        return b"".join([first, b"\n", *self.lines])

    @classmethod
    def parsed(cls, content: bytes) -> FinishedFile | None:
        """Return what an object's content tells; None where it is no such journal."""
        first, *lines = content.splitlines(keepends=True) or [b""]
        try:
            head = json.loads(first)
            uploaded = Uploaded(int(head.pop("size")), str(head.pop("etag")))
        except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
            return None
        return cls(head, uploaded, lines)


def finished_files(beside: RemoteFolder) -> Iterator[tuple[str, FinishedFile]]:
    """Yield the finished files of an unfinished output, by name, as their journals tell."""
    for name in sorted(beside.sizes()):
        if name.endswith(JOURNAL_ENDING):
            content = beside.get(name)
            finished = FinishedFile.parsed(content) if content is not None else None
            if finished is not None:
                yield name.removesuffix(JOURNAL_ENDING), finished


def check_remote_target(output: Place, inputs: Sequence[object], *, resume: bool, force: bool) -> None:
    """Refuse an output that would touch an input or something that exists. Raises UsageError and RunError."""
    if not output.key or not is_plain_line(output.name):
        raise UsageError(f"{output}: can't be an output. Name what is to be made: {output.scheme}://BUCKET/NAME.")
    for source in map(str, inputs):
        if any(a == b or a.startswith(f"{b}/") for a, b in ((source, str(output)), (str(output), source))):
            touching = f"lies in, around or at the input {source}"
            raise UsageError(f"{output}: {touching}. Inputs are never touched: choose another place.")
    is_begun = bool(RemoteFolder(partial(output)).sizes())
    if is_begun and not (force or resume):
        left = f"{output}: an earlier run was not finished, or another one is under way ({partial(output)})"
        raise UsageError(f"{left}. {UNFINISHED}.")
    there = standing(output)
    if there and not force and (not is_begun or manifest_path(output).name in there):
        what = "exists, and is not the result of this run" if resume else "exists"
        raise UsageError(f"{output}: {what} ({counted(len(there), 'object')}). --force replaces all of it.")


def remote_manifest(output: Place) -> dict[str, Any] | None:
    """Return the manifest of a finished output; None where none can be read. Raises RunError."""
    manifest = manifest_path(output)
    content = RemoteFolder(manifest.folder).get(manifest.name)
    try:
        parsed = json.loads(content or b"")
    except (ValueError, RecursionError):
        return None
    return parsed if isinstance(parsed, dict) else None


def is_published_remotely(output: Place, digest: str, files: Mapping[str, int], newest: int) -> bool:
    """Return True where an output stands that a plan of this digest made; its journals are then removed, if left.

    The manifest was put last, so what it names was whole; here objects and sizes are looked at, and ``verify`` reads.
    ``files`` are the sizes of the weights by name; ``newest`` is when an input was last changed, in ns. Raises
    RunError.
    """
    manifest = remote_manifest(output)
    if manifest is None or manifest.get("plan") != digest:
        return False
    there = standing(output)
    beside = manifest.get("beside", {})
    written = RemoteFolder(manifest_path(output).folder).head(manifest_path(output).name)
    if (
        any(there.get(name) != size for name, size in files.items())
        or not isinstance(beside, dict)
        or not beside.keys() <= there.keys()
        or written is None
        or written[1].timestamp() < newest // 1_000_000_000  # stores tell whole seconds
    ):
        return False
    left = RemoteFolder(partial(output))
    left.delete(*left.sizes())
    return True
