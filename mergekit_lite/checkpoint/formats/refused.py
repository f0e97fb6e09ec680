"""File formats of weights that are known only to be refused, and not to be copied with a model."""

from __future__ import annotations

REMEDIES = {".gguf": "GGUF holds requantised, renamed tensors. Use the safetensors the file was made from."}
SUFFIXES = (*REMEDIES, ".onnx", ".h5", ".msgpack", ".ckpt", ".ot", ".npz")
