"""A folder on this machine that stands in for a model elsewhere: its small files in full, its weights as empty files.

An empty file is sparse: it has the size of what it stands for, and a time made of its etag, so that whoever compares
sizes and times sees that a file changed. A stand-in is private, is named after all sizes and etags in it, and is never
changed: what another process made of the same files serves as well.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_lite import input_files, object_stores
from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint import formats
from mergekit_lite.checkpoint.companion_patterns import travels
from mergekit_lite.checkpoint.parts import LISTS, in_folder, listed_folders
from mergekit_lite.checkpoint.stores import hub_files, objects, web
from mergekit_lite.checkpoint.stores.addresses import HUB
from mergekit_lite.checkpoint.stores.files import Mirror, StorePath, know
from mergekit_lite.checkpoint.stores.private_folder import hold, private_folder
from mergekit_lite.checkpoint.stores.ranges import fetch
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.checkpoint.stores.source import AT_ONCE, DESCRIPTION, Source, is_name
from mergekit_lite.errors import CheckpointError, RunError
from mergekit_lite.side_by_side import side_by_side

TEMPLATES = "additional_chat_templates"  # a folder that is no part of the model's own lists
WHOLE = ("config.json", "README.md", folders.ADAPTER_CONFIG)
MOST_SMALL = 10 * input_files.MAX_BYTES  # of all small files together: they are in memory at once


def stand_up(reference: str) -> tuple[StorePath, str | None]:
    """Return the folder, or the file, that stands in for a URL, and the commit of a hub repository.

    Raises:
        UsageError: the URL may hold a secret.
        CheckpointError: nothing is there, it may not be read, or the library that reads it isn't installed.
    """
    source = _source(reference)
    try:
        files = _files(source)
        names = _small_names(files)
        if (nbytes := sum(files[name].size for name in names)) > MOST_SMALL:
            raise CheckpointError(
                f"{source.url}: has {nbytes:,} bytes in small files; more than {MOST_SMALL:,} is refused."
            )
        contents = side_by_side(lambda name: _content(files[name]), names, AT_ONCE)
    except RunError as error:
        raise CheckpointError(str(error)) from error
    small = dict(zip(names, contents, strict=True))
    root = _made(source, files, small)
    know(str(root), Mirror(source.url, {name: file for name, file in files.items() if name not in small}))
    path = StorePath(root / _name(source.url))
    return (path / source.file if source.file else path), source.revision


def _source(reference: str) -> Source:
    if reference.startswith(HUB):
        return hub_files.source(reference)
    object_stores.check_url(reference)
    folder, _, name = reference.rstrip("/").rpartition("/")
    is_file = name.endswith(formats.SUFFIXES) and not folder.endswith(":/")
    where = (folder, name) if is_file else (reference.rstrip("/"), "")
    return objects.source(*where) if object_stores.is_object(reference) else web.source(*where)


def _files(source: Source) -> dict[str, RemoteFile]:
    """Return the files of a model, by their paths in its folder: those in it, and in the folders that it lists."""
    if source.file:
        wanted = {path.name for path in _siblings(source.file)}
        return source.some(wanted) if len(wanted) > 1 else source.some({source.file})
    files = source.listed("")
    inner: Mapping[str, str] = {}
    read: dict[str, Any] = {}
    for _ in LISTS[1:]:  # a router's modules are known once its own folder is
        inner = listed_folders(source.url, files, partial(_json_of, files, read))
        for folder in inner:
            if folder and not any(name.startswith(f"{folder}/") for name in files):
                files |= {in_folder(folder, name): file for name, file in source.listed(folder).items()}
    if TEMPLATES in source.folders:
        files |= {in_folder(TEMPLATES, name): file for name, file in source.listed(TEMPLATES).items()}
    if not source.lists:  # a server without listings: what its index names is looked for by name
        for name in [each for each in files if each.endswith(folders.INDEX_ENDING)]:
            content = _json(files[name], read)
            weights = content.get("weight_map") if isinstance(content, dict) else None
            wanted = {each for each in (weights or {}).values() if folders.is_weight_name(each)}
            named = {in_folder(name.rpartition("/")[0], each) for each in wanted}
            files |= source.some(named - files.keys(), may_lack=True)
    if not files:
        raise CheckpointError(f"{source.url}: nothing is there. Check the URL{source.advice}")
    return files


def _siblings(name: str) -> list[Path]:
    """Return the names of all parts of a split GGUF of which one is named, else the name alone."""
    shard = folders.SHARD.fullmatch(name)
    if shard is None or shard["suffix"] not in formats.gguf.SUFFIXES:
        return [Path(name)]
    return [Path(each) for each in folders.shard_names(shard)]


def _small_names(files: Mapping[str, RemoteFile]) -> list[str]:
    """Return the files that are kept in full: what the model consists of beside its weights."""
    inner = {name.rpartition("/")[0] for name in files if "/" in name} - {TEMPLATES}
    return [
        name
        for name, file in files.items()
        if file.size <= input_files.MAX_BYTES and not name.endswith(formats.SUFFIXES)
        if name.rpartition("/")[2] in WHOLE or name.endswith(folders.INDEX_ENDING) or travels(name, inner)
    ]


def _content(file: RemoteFile) -> bytes:
    data = bytearray(file.size)
    fetch(file, 0, memoryview(data))
    return bytes(data)


def _json(file: RemoteFile, read: dict[str, Any]) -> Any:
    """Return the content of a JSON file, which is fetched once."""
    if file.url not in read:
        if file.size > input_files.MAX_BYTES:
            raise CheckpointError(f"{file.url}: is {file.size:,} bytes long; more is refused than a small file has.")
        try:
            read[file.url] = input_files.parse_json(_content(file).decode("utf-8-sig"))
        except ValueError as error:
            raise CheckpointError(f"{file.url}: is not valid JSON ({error})") from error
    return read[file.url]


def _json_of(files: Mapping[str, RemoteFile], read: dict[str, Any], name: str) -> Any:
    return _json(files[name], read)


def _name(url: str) -> str:
    """Return what a stand-in is called: the last part of the URL, as a file can have it."""
    last = url.rstrip("/").rpartition("/")[2].partition("@")[0]
    return last if is_name(last) else "model"


def _made(source: Source, files: Mapping[str, RemoteFile], small: Mapping[str, bytes]) -> Path:
    """Return the folder that holds the stand-in, made if no process made it before."""
    described = {
        "url": source.url,
        "files": {name: [file.url, file.size, file.etag] for name, file in files.items() if name not in small},
    }
    contents = {name: hashlib.sha256(content).hexdigest() for name, content in small.items()}
    key = hashlib.sha256(json.dumps([described, contents], sort_keys=True).encode()).hexdigest()[:32]
    with private_folder() as home:
        root = home / key
        try:
            if not root.is_dir():
                made = Path(tempfile.mkdtemp(prefix=".new-", dir=home))
                try:
                    _fill(made, source, files, small, described)
                    made.rename(root)
                finally:
                    shutil.rmtree(made, ignore_errors=True)
            hold(root)
        except OSError as error:
            raise CheckpointError(f"{home}: can't hold what stands in for {source.url}: {error.strerror}") from error
    return root


def _fill(
    made: Path,
    source: Source,
    files: Mapping[str, RemoteFile],
    small: Mapping[str, bytes],
    described: Mapping[str, Any],
) -> None:
    """Write the files of a stand-in, and what it stands for, into a new folder. Raises OSError."""
    folder = made / _name(source.url)
    folder.mkdir()
    for name in files:
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("wb") as file:
            file.write(small.get(name, b""))
            file.truncate(files[name].size)
        _set_time(path, files[name])
    (made / DESCRIPTION).write_text(json.dumps(described), encoding="utf-8")


def _set_time(path: Path, file: RemoteFile) -> None:
    """Give a stand-in a time that tells its etag: another one for another etag, and always one that is long past."""
    digest = hashlib.sha256(f"{file.size} {file.etag}".encode()).digest()
    made_up = int.from_bytes(digest[:4], "little") // 4 * 1_000_000_000
    os.utime(path, ns=(made_up, made_up))
