"""Folders of web servers: by the page that lists them, or, where there is none, by the names that models have."""

from __future__ import annotations

import re
import time
from html import unescape
from urllib.parse import quote, unquote, urljoin, urlsplit

from mergekit_lite.backoff import asked_wait, wait_after
from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint import formats
from mergekit_lite.checkpoint.companion_patterns import IN_FOLDERS
from mergekit_lite.checkpoint.stores import http as requests
from mergekit_lite.checkpoint.stores.addresses import web_url
from mergekit_lite.checkpoint.stores.ranges import bare
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.checkpoint.stores.source import AT_ONCE, Source, check_count, is_name
from mergekit_lite.errors import CheckpointError
from mergekit_lite.side_by_side import side_by_side

LINK = re.compile(r"""href\s*=\s*["']?([^"'>\s]+)""", re.IGNORECASE)
MAX_PAGE = 10_000_000  # bytes of a page that lists a folder
ATTEMPTS = 8
KNOWN = (
    *(name for name in IN_FOLDERS if not set(name) & {*"[*?"}),
    "README.md",
    folders.ADAPTER_CONFIG,
    *(name + ending for each in formats.FORMATS for name in each.MODEL_NAMES for ending in ("", folders.INDEX_ENDING)),
    *(name for each in formats.FORMATS for name in each.ADAPTER_NAMES),
    *folders.VALUE_HEADS,
)


def source(folder: str, file: str) -> Source:
    """Return a folder of a web server, or one file of it: both as a URL has them. Names are told and kept unescaped."""
    name = unquote(file)
    if file and not is_name(name):
        raise CheckpointError(f"{folder}/{file}: is not the name of a file.")

    def find(name: str) -> RemoteFile | None:
        return _head(f"{folder}/{quote(name)}")

    made = Source(folder, lambda inner: ({}, []), find, name)

    def listed(inner: str) -> tuple[dict[str, RemoteFile], list[str]]:
        where = f"{folder}/{quote(inner)}" if inner else folder
        names, inner_folders = _links(f"{where}/")
        if not names:
            made.lists = False
            names = list(KNOWN)
        check_count(where, len(names))
        found = side_by_side(lambda name: _head(f"{where}/{quote(name)}"), names, AT_ONCE)
        return {name: each for name, each in zip(names, found, strict=True) if each is not None}, inner_folders

    made.list = listed
    return made


def _links(url: str) -> tuple[list[str], list[str]]:
    """Return the names of the files and folders that a page links to in its own folder; none where it is no page."""
    status, headers, page = _answer("GET", url, MAX_PAGE)
    if status != 200 or "html" not in headers.get("content-type", ""):
        return [], []
    if len(page) == MAX_PAGE:  # names that are cut off would be weights that are left out
        raise CheckpointError(f"{url}: the page that lists this folder is longer than {MAX_PAGE:,} bytes.")
    base = web_url(url)
    names: dict[str, None] = {}
    for link in LINK.findall(page.decode("utf-8", "replace")):
        try:
            target = urljoin(base, unescape(link))
        except ValueError:
            continue
        if target.startswith(base) and "?" not in target and "#" not in target and len(target) > len(base):
            names[unquote(urlsplit(target).path[len(urlsplit(base).path) :])] = None
    folders_in_it = [name.rstrip("/") for name in names if name.endswith("/") and name.count("/") == 1]
    return [name for name in names if is_name(name)], folders_in_it


def _head(url: str) -> RemoteFile | None:
    """Return a file with its size and etag; None where there is none. Raises CheckpointError."""
    status, headers, _ = _answer("HEAD", url)
    if status in (404, 410):
        return None
    if status in (401, 403):
        raise CheckpointError(f"{url}: access was refused (the server answered {status}).")
    if status != 200 or not headers.get("content-length", "").isdecimal():
        raise CheckpointError(
            f"{url}: the server answered {status} and no size, so nothing can be read from it in parts."
        )
    return RemoteFile(url, int(headers["content-length"]), bare(headers.get("etag", "")))


def _answer(verb: str, url: str, most: int = 0) -> tuple[int, dict[str, str], bytes]:
    """Return the status, the headers and up to ``most`` bytes of an answer. Raises CheckpointError where none comes."""
    why, asked = "", 0.0
    for attempt in range(ATTEMPTS):
        if attempt:
            time.sleep(wait_after(attempt, asked))
        try:
            with requests.followed(verb, web_url(url), {"Accept-Encoding": "identity"}) as answer:
                content = answer.read(most) if most and answer.status == 200 else b""
                headers = {name.lower(): value for name, value in answer.headers.items()}
        except requests.Refused as error:
            raise CheckpointError(f"{url}: {error}") from None
        except requests.Unanswered as error:
            why, asked = str(error), 0.0
            continue
        if answer.status != 429 and answer.status < 500:
            return answer.status, headers, content
        why, asked = f"the server answered {answer.status}", asked_wait(headers.get("retry-after"))
    raise CheckpointError(f"{url}: can't be reached: {why}.")
