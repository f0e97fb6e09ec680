"""mergekit_lite: arithmetic on the weights of language models, at the speed of a file copy.

The public names. Those that need torch are imported when they are first used, so that importing the package costs
little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from mergekit_lite._version import __version__
from mergekit_lite.planning import Plan, make_plan

if TYPE_CHECKING:
    from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
    from mergekit_lite.engine.run import Finished, run
    from mergekit_lite.errors import MergekitLiteError
    from mergekit_lite.extrapolation import extrapolate, plan_extrapolation
    from mergekit_lite.merging import merge, plan_merge
    from mergekit_lite.methods import merge_tensors
    from mergekit_lite.recipe import Recipe
    from mergekit_lite.verification import Verdict, verify

_HOMES = {
    "checkpoint": ("Checkpoint", "open_checkpoint"),
    "engine.run": ("Finished", "run"),
    "errors": ("MergekitLiteError",),
    "extrapolation": ("extrapolate", "plan_extrapolation"),
    "merging": ("merge", "plan_merge"),
    "methods": ("merge_tensors",),
    "recipe": ("Recipe",),
    "verification": ("Verdict", "verify"),
}
_HOME_OF = {name: home for home, names in _HOMES.items() for name in names}
__all__ = ["Plan", "__version__", "make_plan", *_HOME_OF]


def __getattr__(name: str) -> Any:
    if name in _HOME_OF:
        return getattr(import_module(f"mergekit_lite.{_HOME_OF[name]}"), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
