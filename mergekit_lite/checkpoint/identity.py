"""The identity of the model that a task vector was made from: its tensors and a sample of their values.

So a base is recognised after it was renamed, sharded anew or downloaded by somebody else. Two fine-tunes of one model
have the same names and shapes, but not the same weights: every tensor is looked at in two places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import xxhash

from mergekit_lite.checkpoint.extents import extents
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.checkpoint.tensor import TensorSpec

SAMPLE = 1024  # elements, at the beginning and in the middle of each tensor


class Identity(NamedTuple):
    """A model as a task vector remembers it."""

    reference: str
    revision: str | None  # the commit of a hub repository
    header: str  # a digest of its tensors' names, dtypes and shapes
    sample: str  # a digest of some of their values

    def is_of(self, other: Identity) -> bool:
        """Return whether the two are one model, whatever they are called."""
        return (self.header, self.sample) == (other.header, other.sample)


def identify(reference: str, revision: str | None, tensors: Mapping[str, TensorSpec]) -> Identity:
    """Return the identity of a model; some kilobytes of each tensor are read. Raises RunError where they can't be."""
    header, sample = xxhash.xxh3_128(), xxhash.xxh3_128()
    places = {name: sorted({0, spec.numel // 2}) for name, spec in tensors.items()}
    with Reader() as reader:
        reader.expect(
            (*extent, 0)
            for name in sorted(tensors)
            for start in places[name]
            for extent in extents(tensors[name], start, min(start + SAMPLE, tensors[name].numel))
        )
        for name in sorted(tensors):
            spec = tensors[name]
            header.update(repr((name, spec.dtype, spec.shape)).encode())
            for start in places[name]:
                elements = spec.elements(reader, start, min(SAMPLE, spec.numel - start))
                sample.update(bytes_of(elements))
    return Identity(reference, revision, header.hexdigest(), sample.hexdigest())
