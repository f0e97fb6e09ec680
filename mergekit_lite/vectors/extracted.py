"""Result of an extraction, and the manifest that keeps it beside the vector."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lite._version import __version__
from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.formats import safetensors
from mergekit_lite.checkpoint.tied_weights import is_vocabulary
from mergekit_lite.checkpoint.tokenizer_file import Tokenizer
from mergekit_lite.checkpoint.vector_tokens import metadata_of
from mergekit_lite.errors import CheckpointError
from mergekit_lite.output.manifest import READ_BYTES, frame_digest
from mergekit_lite.vectors.extract_settings import ExtractSettings


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a vector.

    Attributes:
        name: of the tensor.
        encoder: name of the encoder that stored it.
        nbytes: number of bytes stored.
        square, lost: ‖difference‖² and ‖what is thrown away‖².
        intruders: how many of an adapter's directions were scaled as such (see ``intruders``).
    """

    name: str
    encoder: str
    nbytes: int
    square: float
    lost: float
    intruders: int | None = None

    @property
    def error(self) -> float:
        """‖what is thrown away‖ / ‖difference‖."""
        return math.sqrt(self.lost / self.square) if self.square else 0.0


@dataclass(frozen=True)
class Extracted:
    """Result of an extraction.

    Attributes:
        output: path of the vector, or its URL in an object store.
        nbytes: number of bytes of its file of weights.
        tensors: the tensors that differ.
        unchanged: number of tensors that don't.
        notes: facts that the user should know.
    """

    output: Path | str
    nbytes: int
    tensors: tuple[StoredTensor, ...]
    unchanged: int
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """‖what is thrown away‖ / ‖difference‖ over all tensors."""
        square = math.fsum(tensor.square for tensor in self.tensors)
        return math.sqrt(math.fsum(tensor.lost for tensor in self.tensors) / square) if square else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        tensors = {
            tensor.name: {
                "stored": tensor.encoder,
                "bytes": tensor.nbytes,
                "norm": math.sqrt(tensor.square),
                "error": tensor.error,
                **({} if tensor.intruders is None else {"intruders": tensor.intruders}),
            }
            for tensor in self.tensors
        }
        return {
            "path": str(self.output),
            "bytes": self.nbytes,
            "error": self.error,
            "unchanged": self.unchanged,
            "notes": list(self.notes),
            "tensors": tensors,
        }

    @classmethod
    def from_manifest(cls, output: Path | str, manifest: Mapping[str, Any]) -> Extracted:
        """Return the result that a manifest keeps. Raises LookupError, TypeError or ValueError where it is no such."""
        tensors = tuple(
            StoredTensor(
                name,
                str(of["stored"]),
                int(of["bytes"]),
                of["norm"] ** 2,
                (of["error"] * of["norm"]) ** 2,
                int(of["intruders"]) if "intruders" in of else None,
            )
            for name, of in manifest["tensors"].items()
        )
        notes = tuple(map(str, manifest["notes"]))
        return cls(output, int(manifest["bytes"]), tensors, int(manifest["unchanged"]), notes)


def manifest_text(extracted: Extracted, run: Mapping[str, Any], weights: Path, parts: Mapping[str, str]) -> str:
    """Return the text of a vector's manifest.

    Args:
        extracted: the result.
        run: what made it: its plan's digest, the settings, the models.
        weights: the file of weights.
        parts: digest of each of its tensors, by name.
    """
    places = [(spec.offset, spec.offset + spec.nbytes) for spec in safetensors.read_header(weights).tensors.values()]
    content = {
        "tool": "mergekit_lite",
        "version": __version__,
        **run,
        **{key: value for key, value in extracted.to_json().items() if key != "path"},
        "frame_xxh3_128": frame_digest(weights, places),
        "parts": parts,
    }
    return json.dumps(content, indent=1, ensure_ascii=False) + "\n"


def describes(weights: Path, manifest: Mapping[str, Any]) -> bool:
    """Return whether the bytes of a file of weights are those that a vector's manifest describes."""
    try:
        tensors = safetensors.read_header(weights).tensors
        places = [(spec.offset, spec.offset + spec.nbytes) for spec in tensors.values()]
        if frame_digest(weights, places) != manifest["frame_xxh3_128"] or tensors.keys() != manifest["parts"].keys():
            return False
        return all(
            _digest(weights, spec.offset, spec.nbytes) == manifest["parts"][name] for name, spec in tensors.items()
        )
    except (OSError, CheckpointError, LookupError, AttributeError, TypeError):
        return False


def _digest(path: Path, position: int, left: int) -> str:
    digest = xxhash.xxh3_128()
    with path.open("rb") as file:
        file.seek(position)
        while left and (piece := file.read(min(READ_BYTES, left))):
            digest.update(piece)
            left -= len(piece)
    return digest.hexdigest()


def made_of(before: Checkpoint, after: Checkpoint, settings: ExtractSettings) -> dict[str, Any]:
    """Return what makes a vector, for its manifest; the models as they lie there."""
    return {
        "format": settings.format,
        "settings": {key: value for key, value in vars(settings).items() if value is not None},
        "base": before.identity()._asdict(),
        "tuned": after.identity()._asdict(),
    }


def identified(
    before: Checkpoint, after: Checkpoint, recorded: Mapping[str, Any], tokens: Tokenizer | None
) -> dict[str, Any]:
    """Return what makes a vector with a digest of it, and of how rows lie in the models, that stands for the plan."""
    files = [(file.name, file.size, file.header_digest, file.etag) for model in (before, after) for file in model.files]
    rows = [model.tensors[name].key for model in (before, after) for name in filter(is_vocabulary, model.tensors)]
    whose = metadata_of(tokens) if tokens is not None else None
    digest = xxhash.xxh3_128_hexdigest(repr((__version__, recorded, files, rows, whose)).encode())
    return {"plan": digest, **recorded}
