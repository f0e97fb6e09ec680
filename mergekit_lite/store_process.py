"""A process that asks object stores for this one: the only place where a reader's requests meet ``obstore``.

The client's threads don't survive a fork, and the workers of a merge are forked. So it lives in a fresh process of its
own, started when it is first needed and ended with this one; it lists, signs and, where a store can't sign, reads.
What it signs, this process requests by itself. No credential leaves it, and what is signed is never shown.
"""

from __future__ import annotations

import atexit
import os
import pickle
import re
import struct
import subprocess
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import timedelta
from typing import IO, Any, cast
from urllib.parse import quote

from mergekit_lite.errors import CheckpointError, MergekitLiteError, RunError, UsageError
from mergekit_lite.locks import ThreadLock
from mergekit_lite.object_stores import (
    CHANGED,
    NO_RANGES,
    PREFIXES,
    is_final,
    is_on,
    no_bucket,
    place_at,
    said,
    store_of,
    unsigned,
)

SIGNED_FOR = timedelta(hours=1)
LENGTH = struct.Struct("<Q")
ERRORS = {kind.__name__: kind for kind in (CheckpointError, RunError, UsageError)}
_lock = ThreadLock()
_process: tuple[int, subprocess.Popen[bytes]] | None = None  # whose it is, and itself


def ask(verb: str, *arguments: Any) -> Any:
    """Return what ``list``, ``head``, ``sign`` or ``read`` below returns for an object's URL, from that process.

    Raises:
        FileNotFoundError: there is no such object.
        PermissionError: the credentials don't give access.
        OSError: the store couldn't be asked; asking again may help.
        MergekitLiteError: asking again doesn't help.
    """
    with _lock:
        process = _running()
        assert process.stdin is not None and process.stdout is not None
        try:
            _send(process.stdin, (verb, arguments))
            answer, failure = _receive(process.stdout)
        except (EOFError, OSError, pickle.UnpicklingError) as error:
            end()
            raise OSError("the process that asks the store ended") from error
        except BaseException:  # Ctrl-C: an answer that is still to come would be taken for that to the next question
            end()
            raise
    if failure is None:
        return answer
    kind, message = failure
    if kind in ERRORS:
        raise ERRORS[kind](message)
    raise {"FileNotFoundError": FileNotFoundError, "PermissionError": PermissionError}.get(kind, OSError)(message)


def _running() -> subprocess.Popen[bytes]:
    """Return this process's own one: a forked child doesn't share its parent's."""
    global _process
    if _process is None or _process[0] != os.getpid() or _process[1].poll() is not None:
        code = f"import sys; sys.path[:] = {sys.path!r}; from mergekit_lite.store_process import serve; serve()"
        command = [sys.executable, "-X", "faulthandler=0", "-c", code]
        started = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
        if _process is None:
            atexit.register(end)
        _process = os.getpid(), started
    return _process[1]


def end() -> None:
    """End this process's own one, if there is one; the next question starts another."""
    global _process
    if _process is not None and _process[0] == os.getpid():
        _process[1].kill()  # first of all: a thread that reads its answer holds the pipe
        _process[1].wait()
        for pipe in (_process[1].stdin, _process[1].stdout):
            with suppress(OSError):
                if pipe is not None:
                    pipe.close()
        _process = None


def serve() -> None:
    """Answer requests until there are no more."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # whatever a library prints must not get between the answers
    while True:
        try:
            verb, arguments = _receive(sys.stdin.buffer)
        except EOFError:
            return
        try:
            answer: tuple[Any, tuple[str, str] | None] = VERBS[verb](*arguments), None
        except MergekitLiteError as error:
            answer = None, (type(error).__name__, str(error))
        except FileNotFoundError:
            answer = None, ("FileNotFoundError", "is not there")
        except BaseException as error:
            answer = None, _failure(arguments[0], error)
        _send(answers, answer)


def _failure(url: str, error: BaseException) -> tuple[str, str]:
    """Return as what ``ask`` raises a client's error, and its message."""
    kind, why = type(error).__name__, said(error)
    if lost := no_bucket(place_at(url), why):
        return "CheckpointError", lost
    if kind in ("PermissionDeniedError", "UnauthenticatedError") or re.search(r"answered 40[013]\b", why):
        return "PermissionError", why
    return ("CheckpointError", f"{url}: can't be read: {why}.") if is_final(error) else ("OSError", why)


def list_folder(url: str) -> tuple[dict[str, tuple[int, str]], list[str]]:
    """Return a folder's files by name, each with its size and etag, and the names of the folders in it."""
    import obstore

    place = place_at(url)
    prefix = f"{place.key}/" if place.key else None
    found = obstore.list_with_delimiter(store_of(place), prefix)
    files = {entry["path"].rpartition("/")[2]: (entry["size"], entry["e_tag"] or "") for entry in found["objects"]}
    return files, [path.rstrip("/").rpartition("/")[2] for path in found["common_prefixes"]]


def head(url: str) -> tuple[int, str]:
    """Return an object's size and etag."""
    import obstore

    place = place_at(url)
    entry = obstore.head(store_of(place), place.key)
    return entry["size"], entry["e_tag"] or ""


def sign(url: str) -> str | None:
    """Return a URL at which the object can be read for an hour; None where there can't be one.

    An object that everybody may read has one without a signature. Of Azure and Google obstore signs a name as it is,
    not as a URL holds it: that is refused or, where ``a%20b`` becomes "a b", is another object's URL.
    """
    import obstore

    place = place_at(url)
    if place.scheme != "s3" and quote(place.key) != place.key:
        return None
    if is_on(os.environ.get(f"{PREFIXES[place.scheme]}_SKIP_SIGNATURE", "")):
        return unsigned(place) if place.scheme == "s3" else None
    try:  # hardly repeated: some credentials can sign only by a service, which may be out of reach
        signed: str = obstore.sign(cast(Any, store_of(place, retries=1)), "GET", place.key, SIGNED_FOR)
    except Exception:
        return None
    return signed


def read(url: str, begin: int, end: int, etag: str) -> bytes:
    """Return some bytes of an object. Raises RunError where it is no longer the one with this etag."""
    import obstore

    place = place_at(url)
    options: dict[str, Any] = {"range": (begin, end)}
    if etag:
        options["if_match"] = f'"{etag}"' if not etag.startswith(('"', "W/")) else etag
    try:
        found = obstore.get(store_of(place, retries=0), place.key, options=options)  # type: ignore[arg-type]
        data = bytes(found.bytes())
    except obstore.exceptions.PreconditionError:
        raise RunError(f"{url}: {CHANGED}") from None
    except obstore.exceptions.BaseError as error:
        if "non-partial" in str(error):
            raise RunError(f"{url}: {NO_RANGES}") from None
        raise
    if etag and found.meta["e_tag"] and found.meta["e_tag"].strip('"') != etag.strip('"'):
        raise RunError(f"{url}: {CHANGED}")
    return data


VERBS: dict[str, Callable[..., Any]] = {"list": list_folder, "head": head, "sign": sign, "read": read}


def _send(pipe: IO[bytes], content: object) -> None:
    data = pickle.dumps(content)
    pipe.write(LENGTH.pack(len(data)) + data)
    pipe.flush()


def _receive(pipe: IO[bytes]) -> Any:
    start = pipe.read(LENGTH.size)
    if len(start) < LENGTH.size:
        raise EOFError
    (length,) = LENGTH.unpack(start)
    data = pipe.read(length)
    if len(data) < length:
        raise EOFError
    return pickle.loads(data)
