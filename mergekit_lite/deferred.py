"""torch, imported when something of it is first used.

Its import takes over a second and 200 MB. Planning, copying, and merges that a kernel does need nothing of it. So who
may do without it imports it from here; what Python will have as ``lazy import`` (PEP 810).
"""

from __future__ import annotations

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    import torch as torch
else:

    class _Deferred(ModuleType):
        """Has the attributes of the module of its name, which is imported when the first one is asked for."""

        def __getattr__(self, name: str) -> Any:
            import torch

            found = getattr(torch, name)
            setattr(self, name, found)  # from now on without this detour
            return found

    torch = _Deferred("torch")


def is_imported() -> bool:
    """Whether torch has been imported, by whomever."""
    return "torch" in sys.modules
