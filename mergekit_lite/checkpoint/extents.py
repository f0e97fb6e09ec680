"""Which bytes of which files some elements of a tensor are made of: what is fetched ahead where it lies elsewhere."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import fields, is_dataclass
from pathlib import Path

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.encodings.gathered import Gathered
from mergekit_lite.checkpoint.encodings.ggml import GgmlBlocks
from mergekit_lite.checkpoint.encodings.made import Made
from mergekit_lite.checkpoint.encodings.rebuilt import Rebuilt
from mergekit_lite.checkpoint.encodings.strided import Strided
from mergekit_lite.checkpoint.encodings.sum import Sum
from mergekit_lite.checkpoint.encodings.views import Joined, Run
from mergekit_lite.checkpoint.stores.files import StorePath
from mergekit_lite.checkpoint.tensor import TensorSpec


def extents(spec: TensorSpec, begin: int, end: int) -> Iterator[tuple[Path, int, int]]:
    """Yield (file, first byte, end) of the elements ``begin … end``, as far as that can be told; nothing is read.

    Of codes and their scales it is the same share as of the elements. What is added to a base is left out, and so are
    tensors whose elements are scattered, as the rows of a vocabulary in another order: what is expected and never read
    would be fetched, and kept, for nothing.
    """
    encoding = spec.encoding
    if spec.is_plain:
        size = dtypes.size(spec.dtype)
        yield spec.file, spec.offset + begin * size, spec.offset + end * size
    elif isinstance(encoding, GgmlBlocks):
        first, last = begin // encoding.elements, -(-end // encoding.elements)
        yield spec.file, spec.offset + first * encoding.nbytes, spec.offset + last * encoding.nbytes
    elif isinstance(encoding, Sum):
        if encoding.base is not None:
            yield from extents(encoding.base, begin, end)
    elif isinstance(encoding, Run):
        yield from extents(encoding.stored, encoding.begin + begin, encoding.begin + end)
    elif isinstance(encoding, Joined):
        start = 0
        for part in encoding.parts:
            first, last = max(begin, start), min(end, start + part.numel)
            if first < last:
                yield from extents(part, first - start, last - start)
            start += part.numel
    elif not isinstance(encoding, Strided | Gathered | Rebuilt):
        for part in _parts(encoding):
            first, last = part.numel * begin // spec.numel, -(-part.numel * end // spec.numel)
            yield from extents(part, first, last)


def is_elsewhere(spec: TensorSpec) -> bool:
    """Return whether a tensor's file lies elsewhere, or one of those that it is made of while it is read."""
    if isinstance(spec.encoding, Made):
        return any(map(is_elsewhere, spec.encoding.inputs))
    return is_elsewhere_file(spec.file)


def is_elsewhere_file(path: Path) -> bool:
    """Return whether a file of weights lies elsewhere."""
    return isinstance(path, StorePath)


def files_of(spec: TensorSpec) -> set[Path]:
    """Return all files that a tensor is read from: its own, and those of what is added to it or gathered into it."""
    found: set[Path] = set()
    unvisited: list[object] = [spec]
    while unvisited:
        value = unvisited.pop()
        if isinstance(value, TensorSpec):
            found.add(value.file)
        if isinstance(value, tuple):
            unvisited += value
        elif is_dataclass(value):
            unvisited += [getattr(value, field.name) for field in fields(value)]
    return found


def _parts(encoding: object) -> Iterator[TensorSpec]:
    for field in fields(encoding):  # type: ignore[arg-type]
        value = getattr(encoding, field.name)
        yield from (part for part in (value if isinstance(value, tuple) else (value,)) if isinstance(part, TensorSpec))
