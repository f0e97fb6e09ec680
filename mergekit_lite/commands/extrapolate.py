"""``mergekit-lite extrapolate``: ExPO on two checkpoints."""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import values
from mergekit_lite.errors import RunError

if TYPE_CHECKING:
    from mergekit_lite.plan import Plan


@click.command(
    name="extrapolate",
    epilog="""\b
Examples:
  mergekit-lite extrapolate sft.pt dpo.pt --alpha 0.3 -o boosted.pt
  mergekit-lite extrapolate ./tulu-2-7b ./tulu-2-dpo-7b --alpha 0.5 -o ./tulu-2-dpo-7b-expo
  mergekit-lite extrapolate ./sft ./dpo --alpha 0.1,0.3,0.5 -o './expo-{alpha}'   (one read of the inputs)
  mergekit-lite extrapolate ./sft ./dpo --alpha 0.3 --alpha-for 'norm|embed=0' -o ./expo --dry-run
""",
)
@click.argument("sft")
@click.argument("aligned")
@click.option(
    "-a",
    "--alpha",
    metavar="A[,B…]",
    callback=values.alphas,
    required=True,
    help="How far past ALIGNED to go; 0 is ALIGNED, -1 is SFT.",
)
@click.option(
    "-o", "--output", required=True, help="A folder, or a .safetensors or .pt file; {alpha} becomes the alpha."
)
@click.option(
    "--alpha-for",
    metavar="REGEX=A",
    callback=values.alphas_for,
    multiple=True,
    help="Another alpha for tensors whose name matches; first match wins.",
)
@click.option(
    "--include", metavar="REGEX", multiple=True, help="Extrapolate only tensors whose name matches; copy the others."
)
@click.option("--exclude", metavar="REGEX", multiple=True, help="Copy tensors whose name matches from ALIGNED.")
@click.option(
    "--new-rows",
    type=click.Choice(["refuse", "copy"]),
    default="refuse",
    show_default=True,
    help="Vocabulary rows that only ALIGNED has.",
)
@click.option("--out-dtype", help="float32, bfloat16, float16 or float64; as in ALIGNED by default.")
@click.option(
    "--rounding",
    type=click.Choice(["nearest", "stochastic"]),
    default="nearest",
    show_default=True,
    help="Stochastic keeps steps smaller than the dtype's spacing, on average.",
)
@click.option("--seed", type=int, default=0, show_default=True, help="Of the stochastic rounding.")
@click.option(
    "--shard-size",
    metavar="SIZE",
    callback=values.size,
    help="Most bytes in one file, for instance 5GB; shards as in ALIGNED by default.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Workers; one for each core by default.")
@click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 … or auto.")
@click.option("--resume", is_flag=True, help="Go on with a run that was killed or failed.")
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists; drop an unfinished run.")
@click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinity in the inputs.")
@click.option("--dry-run", is_flag=True, help="Print the plan, read no weights but a sample, write nothing.")
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
@click.option("-v", "--verbose", is_flag=True, help="Print every tensor.")  # fmt: skip
def command(
    sft: str,
    aligned: str,
    output: str,
    alpha: tuple[float, ...],
    alpha_for: dict[str, float],
    resume: bool,
    force: bool,
    allow_nonfinite: bool,
    threads: int | None,
    device: str,
    dry_run: bool,
    as_json: bool,
    quiet: bool,
    verbose: bool,
    **options: Any,
) -> None:
    """Go on from SFT past ALIGNED: out = aligned + alpha·(aligned − sft), for every tensor (ExPO, arXiv 2404.16792).

    SFT and ALIGNED are two checkpoints of one model, before and after DPO or RLHF: folders, .safetensors or .pt /
    .bin files, or hub repositories (org/name, org/name@revision).
    """
    from mergekit_lite.commands import facts
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.extrapolation import plan_extrapolation

    screen = Screen(quiet=quiet or as_json, verbose=verbose)
    plan = plan_extrapolation(sft, aligned, output, alpha, alpha_for=alpha_for, **options)
    # torch comes in only here, once the request is known to be sound
    from mergekit_lite.engine.run import check_outputs, run
    from mergekit_lite.engine.sample import delta_warning

    check_outputs(plan, resume=resume, force=force)
    _check_room(plan, resume)
    if dry_run and as_json:
        click.echo(json.dumps(facts.of_plan(plan, threads), indent=1))
    elif dry_run:
        screen.plan(plan, threads)
    else:
        screen.headline(plan)
    screen.warn(delta_warning(plan))
    if dry_run:
        return
    with screen.progress() as progress:
        finished = run(
            plan,
            threads=threads,
            device=device,
            resume=resume,
            force=force,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    if as_json:
        click.echo(json.dumps(facts.of_finished(finished), indent=1))
    screen.finished(plan, finished)


def _check_room(plan: Plan, resume: bool) -> None:
    """Refuse before the start what can't fit on the disk."""
    import shutil

    if resume:
        return
    parent = next(folder for folder in plan.outputs[0].resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < plan.bytes_to_write:
        raise RunError(
            f"{Path(parent)}: has {free / 1e9:.2f} GB free, the output needs {plan.bytes_to_write / 1e9:.2f} GB. "
            "Make room or choose another disk."
        )
