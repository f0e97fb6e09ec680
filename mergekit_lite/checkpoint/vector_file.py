"""A task vector in a safetensors file: for each tensor that tuning changed, what was added to the base.

The metadata's entry ``task_vector`` is JSON: ``version``, ``format``, the ``base``'s identity, and under ``tensors``
for each name the dtype it is written in and its shape. The tensor ``NAME`` is stored as one of

    NAME                                    every difference (dense); another tool reads the file as a model of them
    NAME:starts, NAME:places, NAME:values   some of them (sparse); together with ``NAME``, what rounding that left out
    NAME:left, NAME:right                   factors of low rank
    NAME:bits, NAME:sizes                   signs, and a size for each row
    NAME:whole                              no difference but the tensor itself: one that the base lacks, or has in
                                            another shape, or that is not for arithmetic
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import tied_weights
from mergekit_lite.checkpoint.encodings.dense import Dense
from mergekit_lite.checkpoint.encodings.low_rank import LowRank
from mergekit_lite.checkpoint.encodings.signs import Signs
from mergekit_lite.checkpoint.encodings.sparse import Sparse
from mergekit_lite.checkpoint.encodings.sum import Sum, VectorTerm, scaled, with_terms
from mergekit_lite.checkpoint.folded import Folded
from mergekit_lite.checkpoint.formats import safetensors
from mergekit_lite.checkpoint.formats.header import MAX_NAME, WeightFile, check_name
from mergekit_lite.checkpoint.identity import Identity
from mergekit_lite.checkpoint.naming.matching import match_names
from mergekit_lite.checkpoint.stores.addresses import is_elsewhere
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError, UsageError, listing, refuse, shortened
from mergekit_lite.input_files import parse_json
from mergekit_lite.object_stores import Place
from mergekit_lite.plain_text import NOT_PLAIN, is_plain_line

KEY = "task_vector"
TOKENS = "task_vector_tokens"  # of the metadata: whose rows are those of embedding and head
VERSION = 1
TERMS: Mapping[tuple[str, ...], Callable[..., VectorTerm]] = {  # by the names of their parts
    ("",): Dense,
    ("starts", "places", "values"): Sparse,
    ("left", "right"): LowRank,
    ("bits", "sizes"): Signs,
}
EXACT: tuple[list[type], ...] = ([Dense], [Dense, Sparse])
FORMS = {  # by the format of a vector, the terms that a tensor may have
    "dense": EXACT,
    "sparse": ([Sparse],),
    "lowrank": ([LowRank], *EXACT),
    "sign": ([Signs], *EXACT),
}
PARTS = (*(part for parts in TERMS for part in parts if part), "whole")


@dataclass(frozen=True)
class Delta:
    """What a task vector holds for one tensor."""

    name: str
    dtype: str  # what it is written in
    shape: tuple[int, ...]
    terms: tuple[VectorTerm, ...] = ()  # to be added to the base's
    whole: TensorSpec | None = None  # the tensor itself, where it isn't stored as a difference


@dataclass(frozen=True)
class Vector:
    """A task vector, known from its header alone."""

    reference: str  # the text it was opened by
    path: Path
    file: WeightFile
    format: str  # one of ``FORMS``
    base: Identity  # of the model that it was made from
    deltas: Mapping[str, Delta]  # by the name of the tensor
    revision: str | None = None  # always: vectors are local files
    tokens: str = ""  # whose rows are those of embedding and head, as ``vector_tokens`` writes them

    def under_names_of(self, base: Mapping[str, TensorSpec]) -> tuple[Vector, str]:
        """Return the vector with the names that its tensors have in a base, and what was renamed, if anything."""
        own = {name: delta.shape for name, delta in self.deltas.items()}
        naming = match_names(own, {name: spec.shape for name, spec in base.items()})
        deltas = {naming.names[name]: replace(delta, name=naming.names[name]) for name, delta in self.deltas.items()}
        return replace(self, deltas=deltas), naming.summary

    def added_to(self, base: Mapping[str, TensorSpec], config: Mapping[str, Any] | None, scale: float = 1.0) -> Folded:
        """Return a base with the vector, times ``scale``, added.

        Adapters are added by the same call, and need ``config``.

        Raises:
            CheckpointError: tensors are missing in the base, have other shapes there, or are whole and can't be scaled.
        """
        tensors, left_out = dict(base), {}
        problems: list[str] = []
        for name, delta in self.deltas.items():
            own = tied_weights.counterpart(name, base)
            if delta.whole is not None:
                if scale != 1:
                    problems.append(
                        f"{name}: is stored whole, as the base had none of this shape, so it can't be scaled by "
                        f"{scale:g}. Apply the vector without a scale, or make one of models with the same tensors"
                    )
                elif own is not None and own.name == name:
                    left_out[f"{name} of the base"] = f"replaced by {self.reference}"
                tensors[name] = replace(delta.whole, name=name)
            elif own is None:
                problems.append(f"{name}: the base has no such tensor. Is it the right base?")
            elif own.shape != delta.shape or not dtypes.is_float(own.dtype):
                problems.append(
                    f"{name}: is {own.dtype} {list(own.shape)} in the base, expected a float of {list(delta.shape)}"
                )
            else:
                total = with_terms(own, scaled(delta.terms, scale), name, wide=delta.dtype == "float64")
                written_as = own.written_as if isinstance(own.encoding, Sum) else delta.dtype
                tensors[name] = replace(total, written_as=written_as)
        refuse(self.reference, problems, "this task vector on its base")
        for name in base.keys() - self.deltas.keys():
            first = tied_weights.repeated_by(name, base, config)
            if first is not None and first.name in self.deltas and tensors[first.name].shape == base[name].shape:
                tensors[name] = replace(tensors[first.name], name=name, written_as=base[name].written_as)
        return Folded(tensors, config, left_out)

    def differences(self) -> dict[str, TensorSpec]:
        """Return the differences as tensors by themselves. Raises CheckpointError where some are stored whole."""
        whole = [name for name, delta in self.deltas.items() if delta.whole]
        if whole:
            lines = [f"{name}: is stored whole, as its base had none of this shape" for name in whole]
            raise CheckpointError(listing(f"{self.reference}: can't be combined", lines))
        return {name: difference(delta, self.path) for name, delta in self.deltas.items()}


def difference(delta: Delta, path: Path) -> TensorSpec:
    """Return a difference as a tensor; without terms it is zero everywhere."""
    terms = Sum(None, delta.terms)
    wide = any(part.dtype == "float64" for part in terms.parts)
    return TensorSpec(delta.name, "float64" if wide else "float32", delta.shape, path, 0, terms)


def check_output(path: Path | Place) -> None:
    """Raise UsageError where a task vector can't be written under this name, for its suffix or its characters."""
    if not is_plain_line(path.name):
        raise UsageError(f"{str(path)!a}: {NOT_PLAIN}. Choose another.")
    if path.suffix not in safetensors.SUFFIXES:
        raise UsageError(f"{path}: a task vector is a .safetensors file. Name one: -o {path.name}.safetensors.")


def open_vector(reference: str) -> Vector:
    """Open a task vector by its file or URL; errors as in ``read_vector``."""
    if is_elsewhere(reference):
        from mergekit_lite.checkpoint.stores import mirror

        return read_vector(reference, mirror.stand_up(reference)[0])
    return read_vector(reference, Path(reference).expanduser().resolve())


def read_vector(reference: str, path: Path) -> Vector:
    """Open a task vector by its header. Raises CheckpointError where it is none, damaged or of an unknown version."""
    header = safetensors.read_header(path)
    if KEY not in header.metadata:
        raise CheckpointError(
            f"{path}: is not a task vector (its metadata has no {KEY!r}). "
            "Make one: mergekit-lite vector extract BASE TUNED -o v.safetensors"
        )
    about = _about(path, header.metadata[KEY])
    parts: dict[str, dict[str, TensorSpec]] = {}
    for name, spec in header.tensors.items():
        whose, _, part = name.rpartition(":") if name.endswith(tuple(f":{part}" for part in PARTS)) else (name, "", "")
        parts.setdefault(whose, {})[part] = spec
    problems = [f"{name}: is stored, but not described" for name in parts if name not in about["tensors"]]
    deltas: dict[str, Delta] = {}
    for name, described in about["tensors"].items():
        try:
            deltas[name] = _delta(about["format"], name, described, parts.get(name, {}))
        except CheckpointError as problem:
            problems.append(str(problem))
    refuse(path, problems, "this task vector. It is damaged or forged")
    return Vector(
        reference,
        path,
        header.file,
        about["format"],
        Identity(**about["base"]),
        deltas,
        tokens=header.metadata.get(TOKENS, ""),
    )


def described(form: str, base: Identity, deltas: Mapping[str, tuple[str, tuple[int, ...]]]) -> dict[str, str]:
    """Return the metadata of a task vector, from each tensor's dtype and shape."""
    tensors = {name: [dtype, list(shape)] for name, (dtype, shape) in deltas.items()}
    about = {"version": VERSION, "format": form, "base": base._asdict(), "tensors": tensors}
    return {KEY: json.dumps(about, separators=(",", ":"), ensure_ascii=False)}


def _about(path: Path, text: str) -> dict[str, Any]:
    """Read and check the description in the metadata, all but what it says of each tensor."""

    def reject(what: str) -> NoReturn:
        raise CheckpointError(f"{path}: its description {what}. It is damaged, forged, or of another program.")

    try:
        about = parse_json(text)
    except ValueError:
        reject("is not valid JSON")
    if not isinstance(about, dict) or about.get("version") != VERSION:
        version = about.get("version") if isinstance(about, dict) else about
        raise CheckpointError(
            f"{path}: is a task vector of version {shortened(repr(version), 40)}, this program reads {VERSION}. "
            "Update mergekit-lite, or extract the vector again."
        )
    if about.get("format") not in FORMS:
        reject(f"has format {shortened(repr(about.get('format')), 40)}, expected one of {', '.join(FORMS)}")
    base = about.get("base")
    if not isinstance(base, dict) or set(base) != set(Identity._fields):
        reject(f"of the base should hold {', '.join(Identity._fields)}")
    if not all(_is_text(value) or (key == "revision" and value is None) for key, value in base.items()):
        reject("of the base should hold printable text")
    if not isinstance(about.get("tensors"), dict):
        reject("lacks its tensors")
    for name in about["tensors"]:
        check_name(path, name)
    return about


def _is_text(value: object) -> bool:
    return isinstance(value, str) and value.isprintable() and len(value) <= MAX_NAME


def _delta(form: str, name: str, described: object, parts: Mapping[str, TensorSpec]) -> Delta:
    """Return what is stored for one tensor, its parts checked against its shape."""
    if not (
        isinstance(described, list)
        and len(described) == 2
        and isinstance(described[0], str)
        and described[0] in dtypes.BY_NAME
        and isinstance(described[1], list)
        and all(type(size) is int and 0 <= size < 2**63 for size in described[1])
    ):
        raise CheckpointError(f"{shortened(name)}: expected a dtype and a shape, got {shortened(described, 80)}")
    dtype, shape = described[0], tuple(described[1])
    if "whole" in parts:
        whole = parts["whole"]
        if len(parts) > 1 or (whole.dtype, whole.shape) != (dtype, shape):
            raise CheckpointError(f"{whole.name}: is {whole.dtype} {list(whole.shape)}, expected {dtype} {list(shape)}")
        return Delta(name, dtype, shape, (), whole)
    terms: list[VectorTerm] = []
    unused = dict(parts)
    for keys, kind in TERMS.items():
        if unused.keys() >= set(keys):
            terms.append(kind(*(unused.pop(key) for key in keys)))
    if unused or [type(term) for term in terms] not in FORMS[form]:
        names = ", ".join(sorted(spec.name for spec in parts.values())) or "nothing"
        raise CheckpointError(f"{shortened(name)}: found {names}, which is no way to store a difference")
    if not dtypes.is_float(dtype):
        raise CheckpointError(f"{shortened(name)}: has differences, but is {dtype}, which is not for arithmetic")
    for term in terms:
        for spec, (wanted, kinds) in term.expected(name, shape).items():
            if spec.shape != wanted or spec.dtype not in kinds:
                raise CheckpointError(
                    f"{spec.name}: is {spec.dtype} {list(spec.shape)}, expected {' or '.join(kinds)} {list(wanted)}"
                )
        term.check_values()
    return Delta(name, dtype, shape, tuple(terms))
