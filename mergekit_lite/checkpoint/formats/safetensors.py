"""The header of a ``.safetensors`` file, checked in full before anything in it is believed.

The format: 8 bytes little-endian header length, a JSON object (name → dtype, shape, begin and end offset), then the
data without holes. See https://github.com/huggingface/safetensors (format section).
"""

from __future__ import annotations

import json
import math
import sys
from functools import lru_cache
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.formats.header import Header, WeightFile, check_name
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError, shortened
from mergekit_lite.input_files import opened, size_of
from mergekit_lite.plain_text import can_be_written

SUFFIXES = (".safetensors",)
MODEL_NAMES = ("model.safetensors", "diffusion_pytorch_model.safetensors")
ADAPTER_NAMES = ("adapter_model.safetensors",)
LENGTH_BYTES = 8
MAX_HEADER_BYTES = 100_000_000  # the limit of the safetensors library itself
MAX_DIMENSIONS = 16
MAX_BYTES = 2**63 - 1


def read_header(path: Path) -> Header:
    """Read and check one file's header.

    Raises:
        CheckpointError: the header is longer than the file or than 100 MB, is not the JSON object it should be, names a
            tensor twice, or its dtypes, shapes and offsets don't add up to exactly the data that is there.
    """
    try:
        with opened(path) as file:
            total = size_of(file)
            length = int.from_bytes(file.read(LENGTH_BYTES), "little")
            if total < LENGTH_BYTES or length > total - LENGTH_BYTES:
                raise CheckpointError(
                    f"{path}: not a safetensors file, or cut short: its header should take {length:,} bytes, "
                    f"the file has {total:,}. Download it again."
                )
            if length > MAX_HEADER_BYTES:
                raise CheckpointError(
                    f"{path}: its header claims {length:,} bytes; more than {MAX_HEADER_BYTES:,} is refused. "
                    "This is no real checkpoint."
                )
            raw = file.read(length)
    except OSError as error:
        raise CheckpointError(f"{path}: can't be read: {error.strerror}") from error
    entries = _parse(path, raw)
    metadata = entries.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(map(_is_text, (*metadata, *metadata.values()))):
        raise CheckpointError(f"{path}: __metadata__ in its header should map text to text.")
    start = LENGTH_BYTES + length
    specs = [_spec(path, name, entries.pop(name), start) for name in list(entries)]  # an entry takes more than a spec
    specs.sort(key=lambda spec: (spec.offset, spec.nbytes))
    _check_tiling(path, specs, start, total)
    return Header(WeightFile.identify(path, raw), {spec.name: spec for spec in specs}, metadata)


def _parse(path: Path, raw: bytes) -> dict[str, Any]:
    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        members = dict(pairs)
        if len(members) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise CheckpointError(
                f"{path}: its header names {shortened(repr(twice))} twice. The file is damaged or forged."
            )
        return members

    try:
        text = raw.decode("utf-8")
        # Python reads -0 as the whole number 0, the format's own library as a fraction, and refuses it.
        numbers = _no_minus if "-0" in text else None
        entries = json.loads(text, object_pairs_hook=unique, parse_int=numbers)
    except (ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: its header is not valid JSON ({error}). Download the file again.") from error
    if not isinstance(entries, dict):
        raise CheckpointError(f"{path}: its header should be a JSON object, but is a {type(entries).__name__}.")
    return entries


def _no_minus(digits: str) -> int:
    if digits.startswith("-"):
        raise ValueError(f"{shortened(digits, 80)} is a number below 0")
    return int(digits)


def _is_text(value: object) -> bool:
    return isinstance(value, str) and can_be_written(value)


def _spec(path: Path, name: str, entry: object, start: int) -> TensorSpec:
    """Return the tensor that an entry describes, once dtype, shape and offsets, which count from ``start``, fit."""
    check_name(path, name)

    def damaged(what: str) -> CheckpointError:
        return CheckpointError(f"{path}: tensor {name!r}: {what}. The file is damaged or forged.")

    if not isinstance(entry, dict) or entry.keys() != {"dtype", "shape", "data_offsets"}:
        raise damaged("its header entry should hold dtype, shape and data_offsets")
    code, shape, offsets = entry["dtype"], entry["shape"], entry["data_offsets"]
    dtype = dtypes.BY_CODE.get(code) if isinstance(code, str) else None
    if dtype is None:
        raise CheckpointError(
            f"{path}: tensor {name!r}: dtype {shortened(repr(code), 80)} is not supported. "
            f"Known: {', '.join(dtypes.BY_CODE)}."
        )
    if not _naturals(shape) or len(shape) > MAX_DIMENSIONS:
        raise damaged(f"shape {shortened(shape, 80)} is not a list of at most {MAX_DIMENSIONS} sizes")
    if not _naturals(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise damaged(f"data_offsets {shortened(offsets, 80)} is not a begin and an end")
    expected = math.prod(shape) * dtype.size
    if expected == 0 and math.prod(size or 1 for size in shape) * dtype.size > MAX_BYTES:
        raise damaged(f"shape {shape} is empty, but its other sizes come to more than a tensor may have")
    if expected > MAX_BYTES or offsets[1] - offsets[0] != expected:
        raise damaged(
            f"shape {shape} of {code} takes {expected:,} bytes, data_offsets give {offsets[1] - offsets[0]:,}"
        )
    return TensorSpec(sys.intern(name), dtype.name, _one(tuple(shape)), path, start + offsets[0])  # models share names


@lru_cache(maxsize=1 << 10)
def _one(shape: tuple[int, ...]) -> tuple[int, ...]:
    """Return the same tuple for the same shape: there are very many tensors and few shapes."""
    return shape


def _naturals(values: object) -> bool:
    if not isinstance(values, list):
        return False
    for value in values:  # noqa: SIM110  (a generator takes twice as long, and there are very many headers' entries)
        if type(value) is not int or not 0 <= value <= MAX_BYTES:
            return False
    return True


def _check_tiling(path: Path, specs: list[TensorSpec], start: int, total: int) -> None:
    """Raise CheckpointError where the tensors don't tile the file from ``start`` to its end, ``total``, without a gap.

    They come in the order of their offsets, an empty one before the one that begins at the same offset.
    """
    position = start
    for spec in specs:
        if spec.offset != position:
            what = "overlaps the tensor before it" if spec.offset < position else "leaves a hole before it"
            raise CheckpointError(f"{path}: tensor {spec.name!r} {what}. The file is damaged or forged.")
        position += spec.nbytes
    if position != total:
        raise CheckpointError(
            f"{path}: its header describes {position - start:,} bytes of data, the file holds {total - start:,}. "
            f"{'It is cut short: download it again.' if position > total else 'The file is damaged or forged.'}"
        )
