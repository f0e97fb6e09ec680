"""A model as it is, in this process: its plan, whether it fits, and its weights filled in."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.engine.devices import memory_left
from mergekit_lite.errors import UsageError
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import Recipe, Slice, Source
from mergekit_lite.resident.model import Built, build
from mergekit_lite.resident.weights import Weights

UNWRITTEN = Path("whole")  # the output of the model's plan, which is filled into a model and never written


def plan_of_whole(base: Checkpoint, device: str) -> Plan:
    """Return the plan of a model as it is, in float32 on a CPU with room for that, else in its own dtype."""
    recipe = Recipe("passthrough", (Slice((Source(base.reference),)),))
    own = make_plan(recipe, [UNWRITTEN], opened={base.reference: base})
    if device != "cpu":
        return own
    wide = make_plan(
        Recipe("passthrough", recipe.slices, out_dtype="float32"), [UNWRITTEN], opened={base.reference: base}
    )
    free = memory_left(device)
    return wide if free is None or 1.2 * wide.layout.nbytes < free else own


def check_memory(plan: Plan, device: str, instead: str) -> None:
    """Raise UsageError where a model doesn't fit into a device's memory; ``instead`` is what needs no model."""
    free = memory_left(device)
    if free is not None and plan.layout.nbytes > free:
        raise UsageError(
            f"{plan.source.reference} takes {plan.layout.nbytes / 1e9:.2f} GB, but only {free / 1e9:.2f} GB of memory "
            f"are free on {device}. Take another --device, or {instead}."
        )


def check_tokens(numbers: Iterable[Sequence[int]], rows: int, reference: str) -> None:
    """Raise UsageError where a token's number is none of the ``rows`` of a model's embedding."""
    if (largest := max(map(max, numbers))) >= rows:
        raise UsageError(
            f"{reference}: its tokenizer gives the number {largest:,} to a token of the prompts, and its embedding has "
            f"{rows:,} rows. Is it another model's tokenizer?"
        )


def loaded(plan: Plan, device: str, threads: int | None = None) -> Built:
    """Build the model of a plan and fill its weights in; ``threads`` read them. Raises as ``build`` and ``Weights``."""
    built = build(plan, device)
    Weights(built, device, threads).set(plan)
    return built
