"""Merge methods: pure functions of tensors, one file a family."""

from mergekit_lite.methods import (  # noqa: F401  (importing a family registers its methods)
    arcee,
    elementwise,
    expo,
    linear,
    sce,
    spherical,
    stock,
    task_vectors,
    varm,
)
from mergekit_lite.methods.in_memory import merge_states, merge_tensors
from mergekit_lite.methods.parameters import Parameter
from mergekit_lite.methods.passes import Block, Combine, Passes, Reduction, TensorInfo, Weighted
from mergekit_lite.methods.registry import METHODS, Method, method_named

__all__ = [
    "METHODS",
    "Block",
    "Combine",
    "Method",
    "Parameter",
    "Passes",
    "Reduction",
    "TensorInfo",
    "Weighted",
    "merge_states",
    "merge_tensors",
    "method_named",
]
