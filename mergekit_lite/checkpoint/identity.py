"""Which model a task vector was made from: told by its tensors and a sample of their values, not by names of files.

So a base is known again after it was renamed, sharded anew or downloaded by somebody else. Two fine-tunes of one model
have the same names and shapes, but not the same weights: every tensor is looked at in two places.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import torch

SAMPLE = 1024  # elements, at the begin and in the middle of each tensor


class Identity(NamedTuple):
    """A model as a task vector remembers it: what it was called, its commit, and digests of shapes and of a sample."""

    reference: str
    revision: str | None
    header: str
    sample: str

    def is_of(self, other: Identity) -> bool:
        """Whether the two are one model, whatever they are called."""
        return (self.header, self.sample) == (other.header, other.sample)


def identify(reference: str, revision: str | None, tensors: Mapping[str, TensorSpec]) -> Identity:
    """Look at a model. Some kilobytes of each tensor are read.

    Raises:
        RunError: a file can't be read.
    """
    from mergekit_lite.checkpoint.reader import Reader, bytes_of

    header, sample = xxhash.xxh3_128(), xxhash.xxh3_128()
    with Reader() as reader:
        for name in sorted(tensors):
            spec = tensors[name]
            header.update(repr((name, spec.dtype, spec.shape)).encode())
            for start in sorted({0, spec.numel // 2}):
                out = torch.empty(min(SAMPLE, spec.numel - start), dtype=dtypes.torch_dtype(spec.dtype))
                reader.read(spec, start, out)
                sample.update(bytes_of(out))
    return Identity(reference, revision, header.hexdigest(), sample.hexdigest())
