"""What identifies a file that lies elsewhere."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """A file elsewhere, as it was when its model was opened."""

    url: str  # what messages and manifests call it; it holds no secret
    size: int
    etag: str  # without quotes, ``W/`` before a weak one; empty where a server gives none


def is_strong(etag: str) -> bool:
    """Return whether an etag tells a file's bytes: of a weak one, others may be as good to a reader."""
    return etag != "" and not etag.startswith("W/")
