"""A hub repository whose weights are read by range, at one commit: addresses and metadata by the hub's own library.

Where the hub keeps a file in Xet, the address that it resolves to is that of Xet's bridge, which sends ranges too.
"""

from __future__ import annotations

from mergekit_lite.checkpoint import hub
from mergekit_lite.checkpoint.stores.addresses import HUB, hub_url
from mergekit_lite.checkpoint.stores.ranges import bare
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.checkpoint.stores.source import AT_ONCE, Source
from mergekit_lite.side_by_side import side_by_side


def source(reference: str) -> Source:
    """Return a repository, ``hf://org/name`` or ``hf://org/name@revision``. Raises CheckpointError as ``hub.fetch``."""
    name = reference.removeprefix(HUB).rstrip("/")
    repo, commit, sizes = hub.listed(name)
    url = f"{HUB}{repo}@{commit}"

    def file(path: str) -> RemoteFile | None:
        if path not in sizes:
            return None
        size, etag = sizes[path] or hub.metadata(name, hub_url(repo, commit, path))
        return RemoteFile(f"{url}/{path}", size, bare(etag))

    def listed(inner: str) -> tuple[dict[str, RemoteFile], list[str]]:
        start = f"{inner}/" if inner else ""
        paths = [path for path in sizes if path.startswith(start)]
        own = [path for path in paths if "/" not in path[len(start) :]]
        files = side_by_side(file, own, AT_ONCE)
        found = {path[len(start) :]: each for path, each in zip(own, files, strict=True) if each is not None}
        return found, sorted({path[len(start) :].partition("/")[0] for path in paths if "/" in path[len(start) :]})

    return Source(url, listed, file, revision=commit)
