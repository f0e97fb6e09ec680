"""``mergekit-lite extrapolate``: ExPO on two checkpoints, RELEX on those of a training run."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import running, values
from mergekit_lite.engine.run import RunOptions
from mergekit_lite.errors import UsageError
from mergekit_lite.plain_text import plain_line

if TYPE_CHECKING:
    from mergekit_lite.planning import Plan


@click.command(
    name="extrapolate",
    epilog="""\b
Examples:
  mergekit-lite extrapolate sft.pt dpo.pt --alpha 0.3   (makes dpo-expo-0.3.pt)
  mergekit-lite extrapolate ./tulu-2-7b ./tulu-2-dpo-7b --alpha 0.5 -o ./tulu-2-dpo-7b-expo
  mergekit-lite extrapolate ./sft ./dpo --alpha 0.1,0.3,0.5 -o './expo-{alpha}'   (one read of the inputs)
  mergekit-lite extrapolate ./sft ./run/step-1000 --alpha 0.3 --as hf=./sft -o ./expo   (a training checkpoint)
  mergekit-lite extrapolate s3://models/sft s3://models/dpo --alpha 0.3 -o ./expo   (read by range)
  mergekit-lite extrapolate ./sft ./dpo --alpha 0.3 -o s3://bucket/expo   (into an object store)
  mergekit-lite extrapolate ./sft ./dpo --alpha 0.3 --tokenizer-source aligned -o ./expo   (other vocabularies)
  mergekit-lite extrapolate ./sft ./dpo --alpha 0.3 --alpha-for 'norm|embed=0' -o ./expo --dry-run
  mergekit-lite extrapolate ./base ./grpo/step-* --to-step 500,1000 -o './at-{step}'   (a run, on to later steps)
  mergekit-lite extrapolate ./base a.pt b.pt c.pt --steps 25,50,75 --to-step 500 -o at-500.pt
""",
)
@click.argument("sft")
@click.argument("aligned", nargs=-1, required=True)
@click.option(
    "-a",
    "--alpha",
    metavar="A[,B…]",
    callback=values.numbers,
    help="How far past ALIGNED to go; 0 is ALIGNED, -1 is SFT.",
)
@click.option(
    "--to-step",
    metavar="N[,M…]",
    callback=values.numbers,
    help="Instead: the step to go on to. ALIGNED are then the checkpoints of a run that began with SFT.",
)
@click.option(
    "--steps",
    metavar="N,M[,…]",
    callback=values.numbers,
    help="With it, the steps of the checkpoints; by default those in their names.",
)
@click.option(
    "-o",
    "--output",
    help="A folder, or a .safetensors or .pt file, here or s3://, gs://, az://; {alpha} becomes the alpha, "
    "{step} the step. By default ALIGNED-expo-{alpha}, here.",
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
@running.takes_tokenizer_source
@click.option(
    "--out-dtype", help="float32, bfloat16, float16, float64, or fp8 in blocks of 128 × 128; as in ALIGNED by default."
)
@click.option(
    "--as",
    "names",
    metavar="hf[=FOLDER]",
    callback=values.names,
    help="Read both under transformers' names, with the config beside them or in FOLDER: hf:SFT, hf:ALIGNED.",
)
@running.takes_rounding
@running.takes_shard_size
@running.takes_copy_code
@running.takes_push
@running.takes_run_options
def command(
    sft: str,
    aligned: tuple[str, ...],
    output: str | None,
    alpha: tuple[float, ...],
    to_step: tuple[float, ...],
    steps: tuple[float, ...],
    alpha_for: dict[str, float],
    names: str,
    run_options: RunOptions,
    view: running.View,
    push: str | None,
    public: bool,
    **options: Any,
) -> None:
    """Go on from SFT past ALIGNED: out = aligned + alpha·(aligned − sft), for every tensor (ExPO, arXiv 2404.16792).

    SFT and ALIGNED are two checkpoints of one model, before and after DPO or RLHF: folders, .safetensors, .gguf or
    .pt / .bin files, training checkpoints (torch.distributed.checkpoint, DeepSpeed's ZeRO), hub repositories (org/name,
    org/name@revision), or URLs that are read by range (s3://, gs://, az://, https://, hf://org/name). FILE.pt:KEY or
    FOLDER:KEY names the weights where there are several.

    With --to-step, ALIGNED are two or more checkpoints of one training run that began with SFT, or the folder that
    holds them, and the line through them is followed on to a later step (RELEX, arXiv 2605.21468). The share of their
    variance that it explains is told for each tensor (-v) and for all; a low one is a warning.
    """
    if to_step:
        plan = _plan_of_run(sft, aligned, output, to_step, steps, names, alpha=alpha, alpha_for=alpha_for, **options)
        running.carry_out(plan, run_options, view, push, public)
        return
    from mergekit_lite.extrapolation import plan_extrapolation

    if not alpha:
        raise UsageError("Give --alpha, how far past ALIGNED to go; or --to-step for the checkpoints of a run.")
    if len(aligned) > 1 or steps:
        raise UsageError("Several checkpoints and --steps are for --to-step N; with --alpha there is one ALIGNED.")
    plan = plan_extrapolation(names + sft, names + aligned[0], output, alpha, alpha_for=alpha_for, **options)
    if output is None and not view.quiet:
        click.echo(plain_line(f"Output: {', '.join(map(str, plan.outputs))}"), err=True)
    running.carry_out(plan, run_options, view, push, public)


def _plan_of_run(
    base: str,
    checkpoints: tuple[str, ...],
    output: str | None,
    to_step: tuple[float, ...],
    steps: tuple[float, ...],
    names: str,
    **options: Any,
) -> Plan:
    """Return the plan of the extrapolation of a run. Raises UsageError for options that it has no use for."""
    from mergekit_lite.extrapolation import plan_run_extrapolation

    of_pair: dict[str, Any] = {
        "alpha": (),
        "alpha_for": {},
        "new_rows": "refuse",
        "tokenizer_source": None,
        "width": "base",
    }
    if given := [f"--{name.replace('_', '-')}" for name, value in of_pair.items() if options.pop(name) != value]:
        raise UsageError(f"{', '.join(given)} can't be combined with --to-step: it is of a pair.")
    if output is None:
        raise UsageError("--to-step needs -o, for instance -o 'out-{step}'.")
    several = [names + each for each in checkpoints]
    models = several[0] if len(several) == 1 else several
    return plan_run_extrapolation(names + base, models, output, to_step, steps=steps, **options)
