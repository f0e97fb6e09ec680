"""Merge methods: pure functions of tensors, one file a family."""

from mergekit_lite.methods import expo as _expo  # noqa: F401  (importing a family registers its methods)
from mergekit_lite.methods.registry import METHODS, Method, method_named

__all__ = ["METHODS", "Method", "method_named"]
