"""A mixture with fewer experts in one call: what ``moe prune`` and ``moe merge-experts`` do, for Python."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.engine.devices import chosen_devices
from mergekit_lite.engine.run import Finished, RunOptions, check_outputs, run
from mergekit_lite.mixtures.layers import ExpertLayer
from mergekit_lite.mixtures.thinning.choosing import By, Choice, checked, chosen_to_keep, chosen_to_merge
from mergekit_lite.mixtures.thinning.fewer import MERGE, PRUNE, first_experts, plan_fewer
from mergekit_lite.options import named_options
from mergekit_lite.planning import Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

CHOOSE = {PRUNE: chosen_to_keep, MERGE: chosen_to_merge}  # by the name that manifests and cards have


@named_options
def prune_experts(
    model: str | Path,
    output: str | Path,
    keep: int,
    by: By,
    *,
    prompts: Sequence[str] = (),
    shard_size: int | None = None,
    copy_code: bool = False,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Keep some experts of each layer of a mixture; rows of the routers and the config follow.

    Args:
        model: the mixture: any reference.
        output: a folder.
        keep: how many experts of each layer are kept.
        by: ``usage`` keeps those chosen most often on the prompts; ``weights`` drops one of the two that are most alike
            in their weights, again and again; ``router`` the same by their rows in the router.
        prompts: what a user says; the model reads it under its chat template.
        shard_size: most bytes of data in one file; by default shards as in the model.
        copy_code: copy the code of its own that a model in a folder has; it is not run.
        **run_options: see ``RunOptions``.

    Returns:
        The output's path and its report.

    Raises:
        UsageError: an option is wrong, there are no prompts to count usage on, or the output exists.
        CheckpointError: the model can't be opened or loaded, or is no mixture.
        PlanError: the model can't have that many experts; every problem is named.
        RunError, NonFiniteError: as ``run`` says.
    """
    return _thinned(PRUNE, model, output, keep, by, prompts, shard_size, copy_code, run_options)


@named_options
def merge_experts(
    model: str | Path,
    output: str | Path,
    to: int,
    by: By,
    *,
    prompts: Sequence[str] = (),
    shard_size: int | None = None,
    copy_code: bool = False,
    **run_options: Unpack[RunOptions],
) -> Finished:
    """Merge experts of each layer of a mixture that are alike, each group to its mean; routers and config follow.

    Args:
        model: the mixture: any reference.
        output: a folder.
        to: how many experts of each layer are left.
        by: ``weights`` makes the two groups one that are most alike in their weights, again and again; ``router`` the
            same by their rows in the router; ``usage`` lets each expert but those chosen most often on the prompts join
            the one of these whose row is most like its own.
        prompts: what a user says. Where there are any, experts count in a mean as often as they were chosen, plus 1.
        shard_size: most bytes of data in one file; by default shards as in the model.
        copy_code: copy the code of its own that a model in a folder has; it is not run.
        **run_options: see ``RunOptions``.

    Returns:
        The output's path and its report.

    Raises:
        UsageError, CheckpointError, PlanError, RunError, NonFiniteError: as ``prune_experts`` says.
    """
    return _thinned(MERGE, model, output, to, by, prompts, shard_size, copy_code, run_options)


def checked_first(
    method: str, model: str, output: str | Path, number: int, by: By, has_prompts: bool, run_options: RunOptions
) -> tuple[Checkpoint, list[ExpertLayer]]:
    """Return a mixture and its layers, once all that can be wrong with a smaller one is known not to be.

    Nothing but headers is read. Errors are those of ``checked``, ``plan_fewer`` and ``check_outputs``.
    """
    mixture, layers = checked(model, number, by, has_prompts, method)
    if not run_options.get("resume", False):
        check_outputs(plan_fewer(model, first_experts(layers, number), output), force=run_options.get("force", False))
    return mixture, layers


def plan_chosen(model: str, choice: Choice, output: str | Path, shard_size: int | None, copy_code: bool) -> Plan:
    """Plan the mixture of the experts that were chosen; errors as of ``plan_fewer``."""
    return plan_fewer(
        model,
        choice.groups,
        output,
        weights=choice.weights,
        chosen=choice.how,
        shard_size=shard_size,
        copy_code=copy_code,
        card=choice.card,
    )


def _thinned(
    method: str,
    model: str | Path,
    output: str | Path,
    number: int,
    by: By,
    prompts: Sequence[str],
    shard_size: int | None,
    copy_code: bool,
    run_options: RunOptions,
) -> Finished:
    model = str(model)
    mixture, layers = checked_first(method, model, output, number, by, bool(prompts), run_options)
    usage = None
    if prompts:
        from mergekit_lite.mixtures.thinning.usage import measured, prompts_of  # with torch and transformers

        device, threads = chosen_devices(run_options.get("device", "cpu"))[0], run_options.get("threads")
        usage = measured(mixture, prompts_of(prompts), len(layers[0].experts), device=device, threads=threads)
    choice = CHOOSE[method](mixture, layers, number, by, usage)
    return run(plan_chosen(model, choice, output, shard_size, copy_code), **run_options)
