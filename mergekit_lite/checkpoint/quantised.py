"""Quantised weights shown as the tensors they stand for: code × scale, with the scales hidden."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.tensor import TensorSpec


def present(
    path: Path, tensors: Mapping[str, TensorSpec], config: Mapping[str, Any] | None
) -> tuple[dict[str, TensorSpec], dict[str, str]]:
    """Placeholder until the schemes are written."""
    return dict(tensors), {}
