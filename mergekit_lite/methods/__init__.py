"""Merge methods: pure functions of tensors, one file a family.

A module of this package that holds a function under ``@method`` is a family: nothing else has to name it.
"""

from importlib import import_module
from pkgutil import iter_modules

from mergekit_lite.methods.in_memory import merge_states, merge_tensors
from mergekit_lite.methods.parameters import Parameter
from mergekit_lite.methods.registry import METHODS, Method, method_named

__all__ = ["METHODS", "Method", "Parameter", "merge_states", "merge_tensors", "method_named"]

for _module in iter_modules(__path__):  # importing a family registers its methods
    import_module(f"{__name__}.{_module.name}")
