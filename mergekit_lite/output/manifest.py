"""The manifest: what made an output, and the digests by which every byte of it can be told from another."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lite._version import __version__
from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.layout import OutputFile
from mergekit_lite.output.workspace import MANIFEST_NAME, is_single_file
from mergekit_lite.planning import Plan

PIECE = 1 << 20  # bytes read at once for a digest
SEAL = "manifest_xxh3_128"
NOT_SEALED = ("README.md", MANIFEST_NAME)  # a card is there to be edited


def manifest_of(
    plan: Plan, number: int, folder: Path, effect: Mapping[str, Any], digests: Mapping[str, Any]
) -> dict[str, Any]:
    """What made this output. Holds no times and no paths of this machine, so equal runs give equal manifests.

    Args:
        plan: the plan.
        number: which output.
        folder: where its files are, all but the manifest.
        effect: the report, as plain data.
        digests: for each tensor those of its output and inputs.
    """
    content = {
        "tool": "mergekit_lite",
        "version": __version__,
        "torch": metadata.version("torch"),
        "plan": plan.digest(number),
        "recipe": plan.recipes[number],
        "seed": plan.seed,
        "shard_size": plan.shard_size,
        "inputs": [
            {
                "reference": source.reference,
                "revision": source.revision,
                **_added_to(source),
                "files": [
                    {"name": file.path.name, "size": file.size, "header_xxh3_128": file.header_digest}
                    for file in source.files
                ],
            }
            for source in plan.inputs
        ],
        "files": [
            {"name": file.name, "size": file.size, "frame_xxh3_128": _frame_of(plan, folder, file)}
            for file in plan.layout.files
        ],
        "beside": {} if is_single_file(plan.outputs[number]) else _beside(plan, folder),
        "digest": "xxh3-128 of the hex xxh3-128 digests of every 8,388,608 elements",
        "tensors": digests,
        "left_out": [list(entry) for entry in plan.left_out],
        "effect": effect,
    }
    return content | {SEAL: seal(content)}


def _added_to(source: Checkpoint) -> dict[str, Any]:
    """The base of an input and the adapters and task vectors that are added to it; nothing where there are none."""
    if not source.added:
        return {}
    added = [
        {"reference": addend.path, "revision": each.revision, "scale": addend.scale, "rebase": addend.rebase}
        for each, addend in source.added
    ]
    return {"base": source.base_reference, "added": added}


def text_of(content: Mapping[str, Any]) -> str:
    """The file's text: one for each content, so that any other one was changed."""
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def seal(content: Mapping[str, Any]) -> str:
    """The digest of all that a manifest says but for this digest."""
    text = json.dumps({key: value for key, value in content.items() if key != SEAL}, sort_keys=True)
    return xxhash.xxh3_128_hexdigest(text.encode())


def file_digest(path: Path) -> str:
    """Digest of a whole file."""
    return frame_digest(path, ())


def frame_digest(path: Path, extents: Iterable[tuple[int, int]]) -> str:
    """Digest of what a file holds around its tensors, which lie at ``extents``, each from a byte to another."""
    digest = xxhash.xxh3_128()
    end = path.stat().st_size
    position = 0
    with path.open("rb") as file:
        for begin, behind in sorted([*extents, (end, end)]):
            file.seek(position)
            while position < begin and (piece := file.read(min(PIECE, begin - position))):
                digest.update(piece)
                position += len(piece)
            position = max(position, behind)
    return digest.hexdigest()


def _frame_of(plan: Plan, folder: Path, file: OutputFile) -> str:
    begins = [plan.layout.places[tensor.name][1] for tensor in file.tensors]
    return frame_digest(
        folder / file.name,
        [(begin, begin + tensor.nbytes) for begin, tensor in zip(begins, file.tensors, strict=True)],
    )


def _beside(plan: Plan, folder: Path) -> dict[str, str]:
    """The digests of the files that travel beside the weights."""
    weights = {file.name for file in plan.layout.files}
    names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if path.is_file()]
    return {name: file_digest(folder / name) for name in names if name not in weights and name not in NOT_SEALED}
