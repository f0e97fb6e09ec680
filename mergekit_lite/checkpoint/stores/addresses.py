"""Where the bytes of a file elsewhere are requested: by its URL, one that is signed, or the hub's.

Addresses may hold signatures. They stay in this process's memory: no message, file or log names one.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import quote, urlsplit, urlunsplit

from mergekit_lite import object_stores, store_process
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile, is_strong
from mergekit_lite.errors import CheckpointError

HUB = "hf://"
GOOD_FOR = 45 * 60  # seconds for which a signature is used; it holds for an hour


class Address(NamedTuple):
    """What is requested for a file."""

    url: str  # empty where only the store's own client can read it
    headers: Mapping[str, str]
    secret: Mapping[str, str]  # headers for this server alone, not for where it sends
    since: float


_known: dict[RemoteFile, Address] = {}  # a file that changed is another one, with another etag to ask for


def is_elsewhere(reference: str) -> bool:
    """Return whether a reference is a URL whose weights are read by range."""
    return reference.startswith(HUB) or object_stores.is_url(reference)


def check_elsewhere(reference: str) -> None:
    """Raise UsageError where a URL may hold a secret."""
    if not reference.startswith(HUB):
        object_stores.check_url(reference)


def address_of(file: RemoteFile, *, anew: bool = False) -> Address:
    """Return where a file's bytes are; ``anew`` where the last address is refused, as signatures end.

    Raises OSError where it can't be found out for now, CheckpointError where it can't at all.
    """
    known = _known.get(file)
    if known is None or anew or time.monotonic() - known.since > GOOD_FOR:
        known = _known[file] = _found(file)
    return known


def moved(file: RemoteFile, url: str) -> None:
    """Keep where a server sent for a file."""
    known = _known[file]
    if known.url != url and urlsplit(known.url).netloc != urlsplit(url).netloc:
        _known[file] = known._replace(url=url, secret={})


def web_url(url: str) -> str:
    """Return the URL of a web server as it is requested: what a URL can't hold is escaped."""
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc, quote(parts.path, safe="/%:@!$&'()*+,;=~-._"), "", ""))


def _found(file: RemoteFile) -> Address:
    now = time.monotonic()
    if object_stores.is_object(file.url):
        return Address(store_process.ask("sign", file.url) or "", _if_match(file), {}, now)
    if file.url.startswith(HUB):
        repository, _, name = file.url.removeprefix(HUB).partition("@")
        commit, _, name = name.partition("/")
        return Address(hub_url(repository, commit, name), {}, hub_headers(), now)
    return Address(web_url(file.url), _if_match(file), {}, now)


def _if_match(file: RemoteFile) -> Mapping[str, str]:
    return {"If-Match": f'"{file.etag}"'} if is_strong(file.etag) else {}


def hub_url(repository: str, commit: str, name: str) -> str:
    """Return where the hub has a file, by its own library."""
    from huggingface_hub import hf_hub_url

    url: str = hf_hub_url(repository, name, revision=commit)
    return url


def hub_headers() -> Mapping[str, str]:
    """Return the headers of the user's token, if there is one."""
    from huggingface_hub import constants, utils

    if constants.HF_HUB_OFFLINE:
        raise CheckpointError("HF_HUB_OFFLINE is set, and this model is read from the hub as it is needed. Unset it.")
    headers: dict[str, str] = utils.build_hf_headers()  # type: ignore[attr-defined]
    return {name: value for name, value in headers.items() if name.lower() == "authorization"}
