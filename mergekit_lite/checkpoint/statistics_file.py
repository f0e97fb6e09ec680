"""Statistics of a model on prompts in a safetensors file: Gram matrices of its layers' inputs, or Fisher information.

The metadata's entry ``statistics`` is JSON: ``version``, ``kind``, the ``model``'s identity, how many ``tokens`` of how
many ``examples`` were read, a digest of them, and what the model was computed in. The tensors are float32:

    fisher   NAME, of the shape of the model's tensor NAME: the mean over examples of its squared gradient
    gram     MODULE.gram, square: XᵀX / tokens of the inputs X of linear layers. ``grams`` in the JSON names the matrix
             of each weight, and the axis of the weight that meets the inputs: layers that read the same share one

Gram matrices that were gathered behind merged layers, for ``regmean_plus``, say so in ``prefix``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from mergekit_lite.checkpoint.checkpoint import Checkpoint
from mergekit_lite.checkpoint.formats import safetensors
from mergekit_lite.checkpoint.identity import Identity
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError
from mergekit_lite.input_files import parse_json

KEY = "statistics"
VERSION = 1
DTYPE = "float32"
Kind = Literal["gram", "fisher"]
BY_ONE_MODEL = "mergekit-lite statistics MODEL --prompts FILE -o OUT"
CALLED: Mapping[Kind, str] = {"gram": "Gram matrices", "fisher": "Fisher information"}


class Gram(NamedTuple):
    """The Gram matrix of what a weight is multiplied with."""

    name: str  # of the matrix in the file
    axis: int  # of the weight: 1 of a linear layer, 0 where it is stored transposed


class Prefix(NamedTuple):
    """Which merged layers text went through before it came to those that Gram matrices are of."""

    recipe: str  # a digest of the models, and of how they are merged
    run: str  # a digest of what was gathered together: the files of one merge have the same


@dataclass(frozen=True)
class Statistics:
    """A file of statistics, known from its header alone."""

    file: Checkpoint  # with its tensors
    kind: Kind
    model: Identity  # of the model that they are of
    tokens: int  # that were read, padding not counted
    examples: int
    digest: str  # of the tokens
    computed: str  # the dtype and the kind of device that the model ran in
    grams: Mapping[str, Gram]  # by weight; empty for Fisher information
    prefix: Prefix | None = None  # None where the model read the text by itself

    def facts(self) -> dict[str, Any]:
        """Return what there is to know of the file, as plain data."""
        method = "fisher" if self.kind == "fisher" else "regmean_plus" if self.prefix else "regmean"
        return {
            "statistics": CALLED[self.kind],
            "model": self.model.reference,
            "tensors": len(self.file.tensors),
            "bytes": sum(spec.nbytes for spec in self.file.tensors.values()),
            "examples": self.examples,
            "tokens": self.tokens,
            "computed in": self.computed,
            "for": f"merge_method: {method}",
        }

    def gram(self, weight: str) -> TensorSpec | None:
        """Return the Gram matrix of a weight's inputs, if there is one."""
        return self.file.tensors[self.grams[weight].name] if weight in self.grams else None


def metadata_of(
    kind: Kind,
    model: Identity,
    tokens: int,
    examples: int,
    digest: str,
    computed: str,
    grams: Mapping[str, Gram],
    prefix: Prefix | None = None,
) -> dict[str, str]:
    """Return the metadata of a file of statistics."""
    content = {
        "version": VERSION,
        "kind": kind,
        "model": model._asdict(),
        "tokens": tokens,
        "examples": examples,
        "digest": digest,
        "computed": computed,
        "grams": {weight: list(gram) for weight, gram in grams.items()},
    }
    return {KEY: json.dumps(content | ({"prefix": prefix._asdict()} if prefix else {}))}


def is_statistics(path: Path) -> bool:
    """Return whether a file is one of statistics, by its header."""
    try:
        return path.suffix in safetensors.SUFFIXES and path.is_file() and KEY in safetensors.read_header(path).metadata
    except CheckpointError:
        return False


def open_statistics(reference: str, place: Path | None = None, written_by: str = BY_ONE_MODEL) -> Statistics:
    """Open a file of statistics on this machine; only its header is read.

    Args:
        reference: the text that names it: its path.
        place: where it is now, if elsewhere.
        written_by: the command that would write it.

    Raises:
        CheckpointError: it isn't there, is damaged, or holds something else.
    """
    path = (place or Path(reference).expanduser()).resolve()  # workers elsewhere have other working folders
    if not path.is_file():
        raise CheckpointError(f"{reference}: is no file: `{written_by}` writes it.")
    header = safetensors.read_header(path)
    if KEY not in header.metadata:
        raise CheckpointError(f"{reference}: holds no statistics: `mergekit-lite statistics` writes such files.")
    checkpoint = Checkpoint(reference, path, (header.file,), header.tensors)
    checkpoint.check_names()
    try:
        return _statistics(checkpoint, parse_json(header.metadata[KEY]))
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise CheckpointError(
            f"{reference}: its header doesn't describe statistics as expected. It is damaged, or of a later version."
        ) from error


def _statistics(file: Checkpoint, content: Any) -> Statistics:
    """Return what the metadata describe. Raises ValueError, TypeError, KeyError, AttributeError where they don't."""
    if content["version"] != VERSION or content["kind"] not in CALLED:
        raise ValueError(content["version"], content["kind"])
    grams = {str(weight): Gram(str(name), int(axis)) for weight, (name, axis) in content["grams"].items()}
    for gram in grams.values():
        rows, columns = file.tensors[gram.name].shape
        if rows != columns or gram.axis not in (0, 1):
            raise ValueError(gram)
    if any(spec.dtype != DTYPE for spec in file.tensors.values()):
        raise ValueError(DTYPE)
    tokens, examples = int(content["tokens"]), int(content["examples"])
    told = str(content["digest"]), str(content["computed"])
    prefix = Prefix(**content["prefix"]) if "prefix" in content else None
    return Statistics(file, content["kind"], Identity(**content["model"]), tokens, examples, *told, grams, prefix)
