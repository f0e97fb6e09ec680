"""torch and numpy, imported when something of them is first used.

torch's import takes over a second and 200 MB, numpy's a tenth of that. Planning, copying and what kernels do need
nothing of torch, and most of it nothing of numpy. So who may do without them imports them from here; what Python will
have as ``lazy import`` (PEP 810).
"""

from __future__ import annotations

import importlib
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import numpy as np
    import torch as torch
else:

    class _Deferred(ModuleType):
        """A stand-in for the module of its name, which is imported when its first attribute is asked for."""

        def __getattr__(self, name: str) -> Any:
            attribute = getattr(importlib.import_module(self.__name__), name)
            setattr(self, name, attribute)  # from now on without this detour
            return attribute

        def __reduce__(self) -> tuple[Any, ...]:
            """Pickle it by its name, as cloudpickle does modules that functions refer to."""
            return _Deferred, (self.__name__,)

    np = _Deferred("numpy")
    torch = _Deferred("torch")

__all__ = ["np", "torch"]
