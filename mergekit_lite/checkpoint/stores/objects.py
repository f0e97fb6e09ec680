"""Folders of object stores: the objects under a prefix."""

from __future__ import annotations

import time
from itertools import count
from typing import Any

from mergekit_lite import object_stores, store_process
from mergekit_lite.backoff import wait_after
from mergekit_lite.checkpoint.stores.ranges import bare
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.checkpoint.stores.source import Source
from mergekit_lite.errors import CheckpointError

ATTEMPTS = 3  # at least; the store's own client repeats each request as well, but for minutes
PATIENCE = 20.0  # seconds for which more are made: that client doesn't repeat what was answered, and cut short


def source(folder: str, file: str) -> Source:
    """Return a prefix in a store, or one object of it."""
    place = object_stores.parse_place(folder)

    def listed(inner: str) -> tuple[dict[str, RemoteFile], list[str]]:
        where = place / inner if inner else place
        files, folders = _asked("list", str(where))
        return {name: RemoteFile(f"{where}/{name}", size, bare(etag)) for name, (size, etag) in files.items()}, folders

    def find(name: str) -> RemoteFile | None:
        try:
            size, etag = _asked("head", f"{place}/{name}")
        except FileNotFoundError:
            return None
        return RemoteFile(f"{place}/{name}", size, bare(etag))

    advice = f", and what the environment says: {object_stores.CREDENTIALS[place.scheme]}."
    return Source(str(place), listed, find, file, advice=advice)


def _asked(verb: str, url: str) -> Any:
    until = time.monotonic() + PATIENCE
    for attempt in count(1):
        try:
            return store_process.ask(verb, url)
        except FileNotFoundError:
            raise
        except PermissionError as error:
            raise CheckpointError(f"{url}: {object_stores.denied(url)} ({error})") from None
        except OSError as error:
            if attempt >= ATTEMPTS and time.monotonic() > until:
                raise CheckpointError(f"{url}: can't be reached: {error}.") from error
            time.sleep(wait_after(attempt, first=0.5))
    raise AssertionError
