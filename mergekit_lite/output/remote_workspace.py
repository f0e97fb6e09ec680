"""Workspace of an output in an object store: spools that are uploaded while they are filled, and what is put beside.

The working folder is on this machine, for the journal and the small files; it goes when the run ends, however it ends.
What a later run goes on with lies in the store: the finished files of weights, and their journals beside them.
"""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from functools import partial as bound
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lite.errors import OF_ANOTHER_PLAN, RunError, listing
from mergekit_lite.layout import Layout, OutputFile, indexed_files, is_single_file
from mergekit_lite.object_stores import Place
from mergekit_lite.output.by_workers import Parcel, RemoteFiles, Written, around, send_around, write_skeleton
from mergekit_lite.output.journal import Record
from mergekit_lite.output.remote_target import (
    JOURNAL_ENDING,
    LOCK,
    FinishedFile,
    Lock,
    RemoteFolder,
    finished_files,
    partial,
    standing,
)
from mergekit_lite.output.spool import Spool
from mergekit_lite.output.upload import IN_FLIGHT, Extent, Upload, Uploaded, stop_all
from mergekit_lite.output.working_folder import WorkingFolder
from mergekit_lite.output.workspace import OutputWorkspace, manifest_path
from mergekit_lite.side_by_side import side_by_side

WINDOW = 1 << 28  # bytes that are made and could be sent, but aren't yet: whoever makes more waits
HEADS = 8  # requests at once for what the store has
LONGEST = 80  # characters of an output's name in the name of its working folder
Part = tuple[str, int, int, str]  # of a record: a tensor, the first byte and the end in it, the digest of the bytes
Parts = Callable[[Record], Sequence[Part]]


def spool_folder() -> Path:
    """Return the folder in which spools and working folders of remote outputs are made."""
    return Path(tempfile.gettempdir())


def local_name(output: Place) -> Path:
    """Return the path that a remote output's working folder on this machine is named after."""
    digest = xxhash.xxh3_64_hexdigest(str(output).encode())
    return spool_folder() / f"mergekit-lite-{digest}-{output.name[:LONGEST]}"


class RemoteWorkspace(OutputWorkspace):
    """Files of one output of an object store while they are made; see ``OutputWorkspace``.

    It takes the lock of the output. With ``resume`` it goes on with the finished files that an earlier run of the same
    plan left; what else is there is removed, with ``force`` even what no run of this program put there. ``parts``
    returns which bytes a record tells of. ``together`` is the number of outputs that are made at once: they share the
    bytes in flight. ``crew`` says that workers in other processes make it, which get a copy that stands for it
    (``by_workers``).

    Attributes:
        settled: numbers of the files that an earlier run finished.
        changed_sources: paths of the inputs that are not, by size and time, those of the earlier run.
        by_file: whether workers make its files whole, and send them; else they send back what they make.
    """

    def __init__(
        self,
        place: Place,
        layout: Layout,
        digest: str,
        sources: Sequence[tuple[str, int, int]],
        companions: Collection[str],
        parts: Parts,
        *,
        resume: bool,
        force: bool,
        together: int = 1,
        crew: bool = False,
    ) -> None:
        self.place = place
        self.by_file = crew and len(layout.files) > 1
        self.settled: set[int] = set()
        self.changed_sources: set[str] = set()
        self._parts = parts
        self._uploaded: dict[int, Uploaded] = {}  # what the store had when a file was complete
        self._in_flight, self._window = IN_FLIGHT // together, WINDOW // together
        self._head = {"plan": digest, "sources": [list(source) for source in sources]}
        self._uploads: dict[int, Upload] = {}  # by the file's number
        # In the store; a single file's own is the output's, and a plan has one layout for all its outputs.
        self._stored = [place.name if is_single_file(place) else file.name for file in layout.files]
        self._keys: list[list[tuple[int, int]]] = [[] for _ in layout.files]  # of each file's records
        self._files = RemoteFolder(place if not is_single_file(place) else place.folder)
        self._beside = RemoteFolder(partial(place))
        self._lock = Lock(self._beside)
        self._local: WorkingFolder | None = None
        self._targets = []
        try:
            earlier = self._earlier(layout, {*companions}, resume=resume, force=force)
            self._uploaded = {n: earlier[name].uploaded for n, name in enumerate(self._stored) if name in earlier}
            self.settled = {*self._uploaded}
            self._local = WorkingFolder(local_name(place), fresh=True)
            super().__init__(self._local, layout, digest, sources, companions)
            self._take_over(earlier)
        except BaseException:
            stop_all(self._uploads.values())
            self._leave()
            raise

    def _earlier(
        self, layout: Layout, companions: set[str], *, resume: bool, force: bool
    ) -> Mapping[str, FinishedFile]:
        """Return the finished files to go on with, and remove all else that is there of an earlier run or output."""
        files = {name: file.size for name, file in zip(self._stored, layout.files, strict=True)}
        there = standing(self.place)
        manifest = manifest_path(self.place).name
        if not force and manifest in there:  # none was there when this run was let in
            raise RunError(f"{self.place}: another run has finished it meanwhile. --resume looks whose it is.")
        if not force and (strange := sorted(there.keys() - companions - files.keys())):
            title = f"{self.place}: holds what no run of this program put there; move it away, or --force removes it"
            raise RunError(listing(title, [ascii(name)[1:-1] for name in strange]))
        kept: dict[str, FinishedFile] = {}
        for name, finished in finished_files(self._beside) if resume else ():
            if finished.head.get("plan") != self._head["plan"]:
                raise RunError(f"{partial(self.place)}: {OF_ANOTHER_PLAN}")
            now = self._files.head(name) if name in there else None
            if now is not None and now[0] == finished.uploaded and now[0].size == files.get(name):
                kept[name] = finished
                self.changed_sources |= _changed(self._head["sources"], finished.head.get("sources"))
        journals = {name + JOURNAL_ENDING for name in kept}
        self._beside.delete(*(name for name in self._beside.sizes() if name not in journals and name != LOCK))
        # The manifest goes first: without it nothing that is left is an output.
        self._files.delete(*sorted(there.keys() - kept.keys(), key=lambda name: name != manifest))
        return kept

    def _take_over(self, earlier: Mapping[str, FinishedFile]) -> None:
        """Journal what an earlier run finished."""
        for number in sorted(self.settled):
            for line in earlier[self._stored[number]].lines:
                if (record := self.journal.take_over(line)) is None:
                    raise RunError(f"{partial(self.place)}: a journal there is damaged. --force starts over.")
                self._keys[number].append((record.job, record.begin))

    def _open(self, file: OutputFile) -> Spool:
        """Make a file's spool; beside it lies a sparse file with all but the tensors, which manifests describe."""
        number = len(self._targets)
        path = self.result / file.name
        path.parent.mkdir(exist_ok=True, parents=True)
        with path.open("xb") as skeleton:
            write_skeleton(self.layout, file, skeleton)
        spool = Spool(self.folder.path)
        if number not in self.settled and not self.by_file:
            done = bound(self._journal_file, number)
            held = is_single_file(self.place)  # nothing else tells whether it is sound
            place = self._files.place / self._stored[number]
            upload = Upload(place, spool, file.size, done, in_flight=self._in_flight, held=held)
            with path.open("rb") as skeleton:
                send_around(self.layout, file, skeleton, spool, upload)
            self._uploads[number] = upload
        return spool

    def __reduce__(self) -> tuple[Any, ...]:
        """Return what stands for it where a worker makes it, in another process."""
        if not self.by_file:
            return Parcel, ()
        return RemoteFiles, (self._files.place, self.layout, self._stored, self.settled, self._in_flight)

    @property
    def mark(self) -> tuple[str, str]:
        """The URL of an object that this run has put beside the output, and the text in it: others know it by them."""
        return str(self._beside.place / LOCK), self._lock.text

    def write_all(self, written: Sequence[Written]) -> None:
        """Write what a worker sent back. Raises RunError."""
        for tensor, offset, data in written:
            self.write(tensor, offset, memoryview(data))

    def file_done(self, number: int, uploaded: Uploaded, records: Sequence[Record]) -> None:
        """Record that a worker made and sent a file; ``records`` are those of all spans that it made for that.

        Raises RunError.
        """
        for record in records:
            if any(self.layout.place(tensor)[0] == number for tensor, *_ in self._parts(record)):
                self.done(record)
        self._journal_file(number, uploaded)

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes of a tensor, from its byte ``offset`` on, unless its file is finished already."""
        if self.layout.place(tensor)[0] not in self.settled:
            super().write(tensor, offset, data)

    def done(self, record: Record) -> None:
        """Record that a span's bytes are written, and send them when it is their turn.

        Waits while the upload is far behind. Raises RunError where an upload failed, or another run took over.
        """
        self._lock.check()
        super().done(record)
        parts = self._parts(record)
        for number in {self.layout.place(tensor)[0] for tensor, *_ in parts}:
            self._keys[number].append((record.job, record.begin))
        for tensor, begin, end, digest in parts:
            number, start = self.layout.place(tensor)
            if (upload := self._uploads.get(number)) is not None:
                upload.made(Extent(start + begin, start + end, digest))
                upload.wait(self._window)

    def _journal_file(self, number: int, uploaded: Uploaded) -> None:
        """Put the journal of a finished file beside the output. Called by its upload."""
        self._lock.check()
        self._uploaded[number] = uploaded
        lines = [self.journal.line(key) for key in self._keys[number]]
        self._beside.put(self._stored[number] + JOURNAL_ENDING, FinishedFile(self._head, uploaded, lines).to_bytes())

    def publish(self, *, force: bool, sync: bool) -> None:
        """Complete the uploads, put what belongs beside the weights, the manifest last, and remove the journals.

        Raises RunError where that fails, or something else appeared under the name that may not be replaced.
        """
        for upload in self._uploads.values():
            upload.complete()
        assert len(self._uploaded) == len(self._stored)
        self._lock.check()
        self.folder.check_result(self._names)
        weights = {file.name for file in self.layout.files}
        if strange := sorted(standing(self.place).keys() - {*self._stored}):
            if not force:
                title = f"{self.place}: appeared while this output was made; --resume --force replaces it"
                raise RunError(listing(title, [ascii(name)[1:-1] for name in strange]))
            self._files.delete(*strange)
        self._check_uploaded()
        manifest, indexes = manifest_path(self.place).name, indexed_files(weights)
        names = [path.relative_to(self.result).as_posix() for path in self.result.rglob("*") if path.is_file()]
        for name in sorted(set(names) - weights, key=lambda name: (name == manifest, name in indexes, name)):
            self._files.put(name, (self.result / name).read_bytes())
        self._beside.delete(*(name for name in self._beside.sizes() if name != LOCK))

    def _check_uploaded(self) -> None:
        """Raise RunError where a file isn't the one that was sent: a run that counted as dead may still write.

        A worker that counted as dead may, too, but the same bytes.
        """
        heads = side_by_side(lambda number: self._files.head(self._stored[number]), self._uploaded, HEADS)
        others = [
            self._stored[n]
            for n, head in zip(self._uploaded, heads, strict=True)
            if head is None or (head[0] != self._uploaded[n] and not self._has_our_bytes(n, head[0]))
        ]
        if others:
            title = f"{self.place}: another run wrote there meanwhile, and its manifest is withheld; --resume goes on"
            raise RunError(listing(title, sorted(others)))

    def _has_our_bytes(self, number: int, there: Uploaded) -> bool:
        """Return whether an object holds what was made of a file: all of it is read. Raises RunError."""
        file = self.layout.files[number]
        pieces: set[Extent] = set()
        with (self.result / file.name).open("rb") as skeleton:
            for begin, end in around(self.layout, file):
                skeleton.seek(begin)
                pieces.add(Extent(begin, end, xxhash.xxh3_128_hexdigest(skeleton.read(end - begin))))
        for tensor, begin, end, digest in (
            part for key in self._keys[number] for part in self._parts(self.journal[key])
        ):
            start = self.layout.place(tensor)[1]
            pieces.add(Extent(start + begin, start + end, digest))
        known = sorted(piece for piece in pieces if piece.begin < piece.end)
        if [piece.begin for piece in known] + [there.size] != [0, *(piece.end for piece in known)]:
            return False
        digests = self._files.digests(self._stored[number], [piece.end - piece.begin for piece in known])
        return digests == [piece.digest for piece in known]

    def close(self) -> None:
        """End the uploads that aren't complete, give the lock back, and remove the working folder."""
        stop_all(self._uploads.values())
        super().close()
        self._leave()

    def _leave(self) -> None:
        self._lock.close()
        if self._local is not None:
            self._local.remove()
            with suppress(OSError):
                self._local.__exit__(None, None, None)
            self._local = None


def _changed(now: Sequence[Sequence[object]], then: object) -> set[str]:
    """Return the paths of the sources that aren't among those of an earlier run."""
    return {str(source[0]) for source in now if not isinstance(then, list) or list(source) not in then}
