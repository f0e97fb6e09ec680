"""A contradiction in a YAML recipe with the key it is reported at, and what several sections are checked for alike."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from mergekit_lite.answers.asking import Sampling, urls_of
from mergekit_lite.answers.data_files import Data
from mergekit_lite.answers.prompts import Prompts
from mergekit_lite.answers.requests import OURS
from mergekit_lite.errors import nearest
from mergekit_lite.file_names import unfit_on_windows

KeyPath = tuple[int | str, ...]  # keys and list indices from the recipe's root


class Problem(NamedTuple):
    """A contradiction, and the key it is reported at."""

    at: KeyPath
    text: str


def clashing_names(key: str, names: Sequence[str]) -> Iterator[Problem]:
    """Yield the names of a section that files can't be called by."""
    for number, name in enumerate(names):
        at: KeyPath = (key, number, "name")
        if name.lower() in (earlier.lower() for earlier in names[:number]):
            yield Problem(at, f"the name {name!r} is taken by another of the {key}: files are called by it")
        if name.lower().endswith(".partial"):
            yield Problem(at, f"the name {name!r} ends like a file that is not finished: choose another one")
        if why := unfit_on_windows(f"{name}.jsonl"):
            yield Problem(at, f"the name {name!r} {why} on Windows, and files are called by it: choose another one")


def wrong_urls(at: KeyPath, server: str | tuple[str, ...] | None) -> Iterator[Problem]:
    """Yield what is wrong with a ``server``, one URL or several, at its key."""
    if server is None:
        return
    urls = urls_of(server)
    if not urls:
        yield Problem(at, "'server' is an empty list: expected a URL, or several")
    for place, url in enumerate(urls):
        where: KeyPath = at if isinstance(server, str) else (*at, place)
        if not url.startswith(("http://", "https://")):
            yield Problem(where, f"{url!r} is no URL: expected for instance http://localhost:8000/v1")
        if "@" in url:
            yield Problem(where, "URLs are shown and logged: put the key into the variable of 'api_key_variable'")
        if url in urls[:place]:
            yield Problem(where, f"{url!r} is listed twice")


def wrong_sampling(at: KeyPath, sampling: Sampling) -> Iterator[Problem]:
    """Yield the keys of ``extra_body`` that are said elsewhere."""
    for key in sampling.extra_body or ():
        if key in Sampling.model_fields:
            yield Problem((*at, "extra_body", key), f"{key!r} is a key of 'sampling' itself: say it there")
        elif key in OURS:
            yield Problem((*at, "extra_body", key), f"{key!r} is what each request sets by itself: leave it out")


def one_origin(at: KeyPath, data: Data) -> Iterator[Problem]:
    """Yield what is wrong with where data come from."""
    if (data.path is None) == (data.dataset is None):
        what = "prompts" if isinstance(data, Prompts) else "data"
        yield Problem(at, f"{what} are given by exactly one of 'path' and 'dataset'")
    if data.path is not None:
        for key in ("config", "split"):
            if key in data.model_fields_set:
                yield Problem((*at, key), f"{key!r} has no effect on a file: it is for a 'dataset'")


def not_named(name: str, known: Sequence[str], kind: str) -> str:
    """Return that no ``kind`` has a name, with the nearest one, or all."""
    hint = nearest(name, known) or (f" There are: {', '.join(known)}." if known else " The recipe has none.")
    return f"no {kind} is named {name!r}.{hint}"
