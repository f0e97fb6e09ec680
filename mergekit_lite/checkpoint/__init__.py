"""Checkpoints: the only code that opens an input weight file."""

from mergekit_lite.checkpoint.adapters.adapter import Adapter
from mergekit_lite.checkpoint.checkpoint import Checkpoint
from mergekit_lite.checkpoint.formats.header import WeightFile
from mergekit_lite.checkpoint.opening import open_adapter, open_checkpoint
from mergekit_lite.checkpoint.tensor import TensorSpec

__all__ = [
    "Adapter",
    "Checkpoint",
    "TensorSpec",
    "WeightFile",
    "is_one_file",
    "open_adapter",
    "open_checkpoint",
    "open_vector",
]
