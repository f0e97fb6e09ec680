"""Merge methods: pure functions of tensors, one file a family."""

from mergekit_lite.methods import expo, linear, spherical, stock  # noqa: F401  (importing a family registers it)
from mergekit_lite.methods.in_memory import merge_states, merge_tensors
from mergekit_lite.methods.passes import Block, Combine, Passes, Subject, Sums, Weighted
from mergekit_lite.methods.registry import METHODS, Method, method_named

__all__ = [
    "METHODS",
    "Block",
    "Combine",
    "Method",
    "Passes",
    "Subject",
    "Sums",
    "Weighted",
    "merge_states",
    "merge_tensors",
    "method_named",
]
