"""Manifest of an output: what made it, and digests of all its bytes."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lite._version import __version__
from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.input_files import opened, size_of
from mergekit_lite.layout import Layout, OutputFile, is_single_file
from mergekit_lite.output.workspace import MANIFEST_NAME
from mergekit_lite.planning import Plan

READ_BYTES = 1 << 20  # bytes read at once for a digest
SEAL = "manifest_xxh3_128"
WRITTEN = json.JSONEncoder(indent=1, ensure_ascii=False)
SEALED = json.JSONEncoder(sort_keys=True)
LEVELS = 3  # of nested mappings and lists that may be long
NOT_SEALED = ("README.md", MANIFEST_NAME)  # users edit the card


def manifest_of(
    plan: Plan, number: int, folder: Path, device: str, effect: Mapping[str, Any], digests: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the manifest of the plan's output ``number``, whose other files are in ``folder``.

    ``device`` is the kind of device that computed; ``effect`` is the report, as plain data; ``digests`` are those of
    each tensor's output and inputs, by its name.
    It has no times and paths of this machine: equal runs give equal manifests.
    """
    content = {
        "tool": "mergekit_lite",
        "version": __version__,
        "torch": metadata.version("torch"),
        "device": device,
        "plan": plan.digest(number),
        "recipe": plan.recipes[number],
        "seed": plan.seed,
        "shard_size": plan.shard_size,
        "copy_code": plan.copy_code,
        "inputs": [_input(source) for source in plan.inputs],
        "files": [
            {"name": file.name, "size": file.size, "frame_xxh3_128": frame_of(plan.layout, folder / file.name, file)}
            for file in plan.layout.files
        ],
        "beside": {} if is_single_file(plan.outputs[number]) else _beside(plan, folder),
        "digest": "xxh3-128 of the hex xxh3-128 digests of every 8,388,608 elements, or of all in FP8",
        "tensors": digests,
        "left_out": [list(entry) for entry in plan.left_out],
        "effect": effect,
    }
    return content | {SEAL: seal(content)}


def _input(source: Checkpoint) -> dict[str, Any]:
    """Return one input; of a document's result also what that is made of."""
    recorded: dict[str, Any] = {
        "reference": source.reference,
        "revision": source.revision,
        **_added_to(source),
        "files": [
            {"name": file.name, "size": file.size, "header_xxh3_128": file.header_digest}
            | ({"etag": file.etag} if file.etag else {})
            for file in source.files
        ],
    }
    if source.made_of:
        recorded |= {
            "made_while_read": list(source.made_while_read),
            "made_of": [_input(each) for each in source.made_of],
        }
    return recorded


def files_read(recorded: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Return the recorded files that an input's tensors were read from, as ``Checkpoint.files_read``."""
    if not recorded.get("made_while_read"):
        return list(recorded["files"])
    own: list[Mapping[str, Any]] = recorded["files"]
    added = own[len(own) - len(recorded.get("added", ())) :]
    return [*(file for model in recorded["made_of"] for file in model["files"]), *added]


def _added_to(source: Checkpoint) -> dict[str, Any]:
    """Return the base of an input and the adapters and task vectors added to it; empty for a plain model."""
    if not source.added:
        return {}
    added = [
        {"reference": addition.path, "revision": each.revision, "scale": addition.scale, "rebase": addition.rebase}
        for each, addition in source.added
    ]
    return {"base": source.base_reference, "added": added}


def text_of(content: Mapping[str, Any]) -> str:
    """Return the text of the file. A content has one text, so any other text was changed by somebody."""
    return "".join(text_pieces(content))


def text_pieces(content: Mapping[str, Any]) -> Iterator[str]:
    """Yield the text of the file piece by piece: for very many tensors it is long."""
    yield from _pieces(content, WRITTEN)
    yield "\n"


def seal(content: Mapping[str, Any]) -> str:
    """Return the digest of a manifest's content without this digest."""
    digest = xxhash.xxh3_128()
    for piece in _pieces({key: value for key, value in content.items() if key != SEAL}, SEALED):
        digest.update(piece.encode())
    return digest.hexdigest()


def _pieces(value: object, encoder: json.JSONEncoder, depth: int = 0) -> Iterator[str]:
    """Yield what an encoder returns for a value, member by member in its upper levels, which may be of any mappings."""
    if depth == LEVELS or not value or not isinstance(value, Mapping | list | tuple):
        yield encoder.encode(value).replace("\n", "\n" + " " * depth)
        return
    end = "" if encoder.indent is None else "\n" + " " * depth
    separator = f"{end} " if end else ""
    if isinstance(value, Mapping):
        yield "{"
        for key in sorted(value) if encoder.sort_keys else value:
            yield f"{separator}{encoder.encode(key)}: "
            yield from _pieces(value[key], encoder, depth + 1)
            separator = f",{end} "
        yield f"{end}}}"
    else:
        yield "["
        for member in value:
            yield separator
            yield from _pieces(member, encoder, depth + 1)
            separator = f",{end} "
        yield f"{end}]"


def file_digest(path: Path) -> str:
    """Return the digest of a whole file."""
    return frame_digest(path, ())


def frame_digest(path: Path, extents: Iterable[tuple[int, int]]) -> str:
    """Return the digest of a file's bytes around its tensors, which lie at ``extents``: (first byte, end) of each."""
    digest = xxhash.xxh3_128()
    position = 0
    with opened(path) as file:
        end = size_of(file)
        for begin, after in sorted([*extents, (end, end)]):
            file.seek(position)
            while position < begin and (piece := file.read(min(READ_BYTES, begin - position))):
                digest.update(piece)
                position += len(piece)
            position = max(position, after)
    return digest.hexdigest()


def frame_of(layout: Layout, path: Path, file: OutputFile) -> str:
    """Return the digest of what lies around the tensors of an output's file. Raises OSError or UnreadableError."""
    places = [(layout.place(tensor.name)[1], tensor.nbytes) for tensor in file.tensors]
    return frame_digest(path, [(begin, begin + length) for begin, length in places])


def _beside(plan: Plan, folder: Path) -> dict[str, str]:
    weights = {file.name for file in plan.layout.files}
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: file_digest(folder / name) for name in names if name not in weights and name not in NOT_SEALED}
