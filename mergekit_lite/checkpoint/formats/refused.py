"""File formats of weights that aren't read, and are not copied with a model."""

from __future__ import annotations

SUFFIXES = (".onnx", ".h5", ".msgpack", ".ckpt", ".ot", ".npz")
