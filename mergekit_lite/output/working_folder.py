"""Working folder of one output: the user's own, open to nobody else, and with nothing in it that no run put there.

    .NAME.partial/lock             held by the process that works here
    .NAME.partial/journal.jsonl    the spans that are written
    .NAME.partial/result/…         the files, complete only when every span is journalled
    .NAME.partial/factors/…        matrices that an extraction of low rank keeps for its second pass
    .NAME.partial/mark             a number by which workers on other machines know the folder
    .NAME.partial/replaced         what had the output's name before, until it is removed

Whoever may write here may write into the output. So the folder has to belong to the user and be closed to others, and
no link in it is followed. Anything foreign is an error that names it; it is neither published nor removed.
"""

from __future__ import annotations

import errno
import os
import stat
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

from mergekit_lite.errors import RunError, listing
from mergekit_lite.locks import take_lock
from mergekit_lite.output import renames
from mergekit_lite.positioned import open_file

JOURNAL, NEW_JOURNAL, LOCK = "journal.jsonl", "journal.new", "lock"
RESULT, FACTORS, REPLACED, PROBE, MARK = "result", "factors", "replaced", "probe", "mark"
NAMES = (REPLACED, RESULT, FACTORS, PROBE, MARK, NEW_JOURNAL, JOURNAL, LOCK)  # in the order in which they are removed
OTHERS_MAY_WRITE = stat.S_IWGRP | stat.S_IWOTH
OPEN_FILES_GO = os.name != "nt"  # whether an open file can be removed


def working_folder(output: Path) -> Path:
    """Return the path of the folder in which an output is made."""
    output = output.absolute()
    return output.with_name(f".{output.name}.partial")


class WorkingFolder:
    """The working folder of an output, locked for this process until it is closed; made where there is none.

    What an earlier run left is dropped where it shall start ``fresh``. Raises RunError where another process works
    here, the folder isn't the user's own, something foreign is in it, or it can't be written.
    """

    def __init__(self, output: Path, *, fresh: bool) -> None:
        self.output = output
        self.path = working_folder(output)
        self.result, self.journal, self.factors, self.replaced, self.mark = (
            self.path / name for name in (RESULT, JOURNAL, FACTORS, REPLACED, MARK)
        )
        self._is_new = False  # whether it was made here and is still there
        with as_run_errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with suppress(FileExistsError):
                self.path.mkdir(mode=0o700)
                self._is_new = True
            _check_own(self.path)
            _check_names(self.path)
            self._lock: int | None = open_own(self.path / LOCK, os.O_RDWR | os.O_CREAT)
            try:
                self._take(fresh)
            except BaseException:
                self._unlock()
                raise

    def _take(self, fresh: bool) -> None:
        if self._lock is None or not take_lock(self._lock):
            raise RunError(f"{self.path}: another process is making this output. Wait for it, or stop it.")
        if not fresh:
            return
        if os.path.lexists(self.replaced) and not os.path.lexists(self.output):
            self.replaced.rename(self.output)  # a run was killed between moving it away and putting its own there
        for name in NAMES:
            if name != LOCK:
                renames.remove(self.path / name)

    def marked(self, text: str) -> tuple[str, str]:
        """Put a text into the folder, by which workers on other machines know it; return the file's path and the text.

        Raises OSError.
        """
        with os.fdopen(open_own(self.mark, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), "w", encoding="utf-8") as file:
            file.write(text)
        return str(self.mark), text

    def __enter__(self) -> WorkingFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._is_new and not self.journal.exists():  # there is nothing to go on with
            self.remove()
        self._unlock()

    def remove(self) -> None:
        """Remove what runs put here, as far as the system lets it, and the folder if that leaves it empty.

        While there is a result there is a journal that tells whose it is.
        """
        self._is_new = False
        with suppress(OSError):
            for name in NAMES:
                if name == LOCK and not OPEN_FILES_GO:
                    self._unlock()
                renames.remove(self.path / name)
            self.path.rmdir()

    def _unlock(self) -> None:
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None

    def check_result(self, names: Collection[str]) -> None:
        """Raise RunError where the result holds anything but regular files of these names, relative to it."""
        if not _is_folder(self.result):
            raise _foreign(self.path, [RESULT])
        folders = {folder.as_posix() for name in names for folder in Path(name).parents}
        strange: list[str] = []
        for path in sorted(self.result.rglob("*")):
            name = path.relative_to(self.result).as_posix()
            is_known = name in folders if _is_folder(path) else name in names and _is_regular(path)
            if not is_known and Path(name).parent.as_posix() in folders:  # of a strange folder its own name is enough
                strange.append(f"{RESULT}/{name}")
        if strange:
            raise _foreign(self.path, strange)


def own_folder(path: Path) -> None:
    """Make a folder for this user alone, or take the one that is there. Raises RunError where it is another's."""
    with as_run_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):
            path.mkdir(mode=0o700)
        _check_own(path)


@contextmanager
def left_by_earlier_run(output: Path) -> Iterator[WorkingFolder | None]:
    """Hold the working folder that an earlier run left; yield None where there is none that this process may use."""
    if not os.path.lexists(working_folder(output)):
        yield None
        return
    try:
        folder = WorkingFolder(output, fresh=False)
    except RunError:
        yield None
        return
    with folder:
        yield folder


def open_own(path: Path, flags: int) -> int:
    """Open a file of a working folder, and return its descriptor. Raises RunError for links and irregular files."""
    try:
        descriptor = open_file(path, flags, links=False)
    except OSError as error:
        # Of a link, a folder, a FIFO or a socket; Windows has no number of its own for folders.
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO) or path.is_dir():
            raise _foreign(path.parent, [path.name]) from error
        raise
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise _foreign(path.parent, [path.name])
    return descriptor


@contextmanager
def as_run_errors(path: Path) -> Iterator[None]:
    """Turn what the system refuses into RunError; ``path`` is what it concerns."""
    try:
        yield
    except OSError as error:
        raise RunError(_described(error, path)) from error


def _check_own(folder: Path) -> None:
    """Raise RunError where a working folder is a link, or others than the user may write to it."""
    status = folder.lstat()
    if not stat.S_ISDIR(status.st_mode):
        raise RunError(f"{folder}: is in the way of the folder in which the output is made. Remove it.")
    if _is_own(status) and not status.st_mode & OTHERS_MAY_WRITE:
        return
    # Some file systems know neither owners nor permissions: there a folder of our own looks the same.
    like = None
    with suppress(OSError):
        (folder / PROBE).mkdir(mode=0o700)
        like = (folder / PROBE).lstat()
        (folder / PROBE).rmdir()
    if like is None or _access(like) != _access(status):
        raise RunError(
            f"{folder}: other users may write there, and so into the output. Remove it; if you trust what it holds, "
            "make it your own and closed to others (chown, chmod 700)."
        )


def _is_own(status: os.stat_result) -> bool:
    """Return whether a file is this user's; False where the system knows no owners by number."""
    return hasattr(os, "geteuid") and status.st_uid == os.geteuid()


def _access(status: os.stat_result) -> tuple[int, int]:
    return status.st_uid, status.st_mode & OTHERS_MAY_WRITE


def _check_names(folder: Path) -> None:
    """Raise RunError where a working folder holds what no run puts there."""
    if strange := sorted(path.name for path in folder.iterdir() if path.name not in NAMES):
        raise _foreign(folder, strange)


def _foreign(folder: Path, names: list[str]) -> RunError:
    is_dropped = all(name.partition("/")[0] in NAMES and name != LOCK for name in names)
    remedy = "move it away, or start over with --force" if is_dropped else "move it away"
    title = f"{folder}: holds what no run of this program put there; {remedy}"
    return RunError(listing(title, [ascii(name)[1:-1] for name in names]))


def _is_folder(path: Path) -> bool:
    return path.is_dir() and not path.is_symlink()


def _is_regular(path: Path) -> bool:
    return stat.S_ISREG(path.lstat().st_mode)


def _described(error: OSError, path: Path) -> str:
    kept = "What was finished is kept: make room and run again with --resume."
    match error.errno:
        case errno.ENOSPC:
            return f"{path}: the disk is full. {kept}"
        case errno.EDQUOT:
            return f"{path}: the disk quota is used up. {kept}"
        case errno.EFBIG:
            return f"{path}: the file would be larger than this system or its limits allow (see ulimit -f). {kept}"
    return f"{path}: can't be written: {error.strerror or error}. What was finished is kept; --resume goes on with it."
