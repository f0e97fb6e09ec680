"""Arithmetic on the weights of language models, at the speed of a file copy.

    import mergekit_lite as ml

    ml.extrapolate("./sft", "./dpo", "./expo", 0.3)  # dpo + 0.3·(dpo − sft)
    ml.merge("recipe.yml", "./merged", threads=4)  # a recipe in mergekit's language
    assert ml.verify("./merged").sound  # every byte of it, and some tensors made again

    ml.extract_vector("./base", "./tuned", "math.safetensors", format="sparse", density=0.1)
    ml.apply_vectors("./base", ["math.safetensors:0.5"], "./half")
    print(ml.compare("./base", ["./math", "./code"]).overall.cosine)

Every function does what the command of its name does, and raises a ``MergekitLiteError`` where it can't. Models are
folders, ``.safetensors`` or torch files, or hub repositories (``org/name``, ``org/name@revision``). docs/api.md lists
all of it. What needs torch is imported when it is first used: importing the package costs little.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING

from mergekit_lite._version import __version__

if TYPE_CHECKING:
    from mergekit_lite.answers.aggregating.answering import Answered, answer
    from mergekit_lite.boosting.boosting import Boosted, boost
    from mergekit_lite.boosting.options import BoostOptions
    from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
    from mergekit_lite.comparison.comparison import Comparison, compare
    from mergekit_lite.comparison.inspection import Inspection, inspect
    from mergekit_lite.distillation.distilling import distill
    from mergekit_lite.distillation.reporting.findings import Findings
    from mergekit_lite.engine.run import Finished, RunOptions, run
    from mergekit_lite.errors import CheckpointError, MergekitLiteError, NonFiniteError, PlanError, RunError, UsageError
    from mergekit_lite.extrapolation import (
        extrapolate,
        extrapolate_run,
        plan_extrapolation,
        plan_run_extrapolation,
    )
    from mergekit_lite.gathering.gathering import Gathered, gather_statistics
    from mergekit_lite.gathering.options import StatisticsOptions
    from mergekit_lite.gathering.prefixed import gather_statistics_plus
    from mergekit_lite.merging import merge, plan_merge
    from mergekit_lite.methods import merge_states, merge_tensors
    from mergekit_lite.mixtures.building.building import build_moe
    from mergekit_lite.mixtures.building.upcycling import upcycle
    from mergekit_lite.mixtures.splitting import split_experts
    from mergekit_lite.mixtures.thinning.thinning import merge_experts, prune_experts
    from mergekit_lite.planning import Plan, make_plan
    from mergekit_lite.previewing.preview import Preview, Previewed, preview
    from mergekit_lite.pushing import Pushed, push
    from mergekit_lite.recipe import Recipe
    from mergekit_lite.transplanting.transplanting import transplant
    from mergekit_lite.vectors.adapter_combination import combine_adapters
    from mergekit_lite.vectors.application import apply_vectors
    from mergekit_lite.vectors.combination import combine_vectors
    from mergekit_lite.vectors.extracted import Extracted
    from mergekit_lite.vectors.extraction import extract_vector
    from mergekit_lite.vectors.intruders import reduce_intruders
    from mergekit_lite.verification import Verification, verify

__all__ = [
    "Answered", "BoostOptions", "Boosted", "Checkpoint", "CheckpointError", "Comparison", "Extracted", "Findings",
    "Finished", "Gathered", "Inspection", "MergekitLiteError", "NonFiniteError", "Plan", "PlanError", "Preview",
    "Previewed", "Pushed", "Recipe", "RunError", "RunOptions", "StatisticsOptions", "UsageError", "Verification",
    "__version__", "answer", "apply_vectors", "boost", "build_moe", "combine_adapters", "combine_vectors",
    "compare", "distill", "extract_vector", "extrapolate", "extrapolate_run", "gather_statistics",
    "gather_statistics_plus", "inspect", "make_plan", "merge", "merge_experts", "merge_states", "merge_tensors",
    "open_checkpoint", "plan_extrapolation", "plan_merge", "plan_run_extrapolation", "preview", "prune_experts",
    "push", "reduce_intruders", "run", "split_experts", "transplant", "upcycle", "verify",
]  # fmt: skip

_NAMES = {  # by the module that has them
    "answers.aggregating.answering": ("Answered", "answer"),
    "boosting.boosting": ("Boosted", "boost"),
    "boosting.options": ("BoostOptions",),
    "checkpoint": ("Checkpoint", "open_checkpoint"),
    "comparison.comparison": ("Comparison", "compare"),
    "comparison.inspection": ("Inspection", "inspect"),
    "distillation.distilling": ("distill",),
    "distillation.reporting.findings": ("Findings",),
    "engine.run": ("Finished", "RunOptions", "run"),
    "errors": ("CheckpointError", "MergekitLiteError", "NonFiniteError", "PlanError", "RunError", "UsageError"),
    "gathering.gathering": ("Gathered", "gather_statistics"),
    "gathering.options": ("StatisticsOptions",),
    "gathering.prefixed": ("gather_statistics_plus",),
    "extrapolation": ("extrapolate", "extrapolate_run", "plan_extrapolation", "plan_run_extrapolation"),
    "merging": ("merge", "plan_merge"),
    "methods": ("merge_states", "merge_tensors"),
    "mixtures.building.building": ("build_moe",),
    "mixtures.splitting": ("split_experts",),
    "mixtures.thinning.thinning": ("merge_experts", "prune_experts"),
    "mixtures.building.upcycling": ("upcycle",),
    "planning": ("Plan", "make_plan"),
    "previewing.preview": ("Preview", "Previewed", "preview"),
    "pushing": ("Pushed", "push"),
    "recipe": ("Recipe",),
    "transplanting.transplanting": ("transplant",),
    "vectors.adapter_combination": ("combine_adapters",),
    "vectors.application": ("apply_vectors",),
    "vectors.combination": ("combine_vectors",),
    "vectors.extracted": ("Extracted",),
    "vectors.extraction": ("extract_vector",),
    "vectors.intruders": ("reduce_intruders",),
    "verification": ("Verification", "verify"),
}
_MODULE_OF = {name: module for module, names in _NAMES.items() for name in names}


def __getattr__(name: str) -> object:
    """Import a public name when it is first used."""
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
