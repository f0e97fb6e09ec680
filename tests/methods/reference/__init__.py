"""Every deterministic method once more: naive, on whole tensors, in float64, with sorts, straight from the formula.

A reference takes (base or None, list of tensors, parameters with every value given) in float64 and returns the merged
tensor. It shares no code with the package.
"""

from __future__ import annotations

from tests.methods.reference import elementwise, fusechat, linear, runs, singular, spherical, task_vectors
from tests.methods.reference.table import REFERENCES, doubtful

__all__ = [
    "REFERENCES",
    "doubtful",
    "elementwise",
    "fusechat",
    "linear",
    "runs",
    "singular",
    "spherical",
    "task_vectors",
]
