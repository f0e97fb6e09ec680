"""``mergekit-lite vector``: task vectors as files."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import CommandGroup, json_output, running, values
from mergekit_lite.engine.ray_cluster import workers_of
from mergekit_lite.engine.run import RunOptions
from mergekit_lite.errors import UsageError, counted

if TYPE_CHECKING:
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.vectors.adapter_writing import AdapterOutput
    from mergekit_lite.vectors.extracted import Extracted, StoredTensor
    from mergekit_lite.vectors.spaces import SpaceName


class Signed(click.Command):
    """A command that takes ``+a -b`` as arguments, where a and b exist: ``-b`` is −1 times b, unless an option."""

    def parse_args(self, context: click.Context, arguments: list[str]) -> list[str]:
        """Rewrite arguments with a sign before click looks for options."""
        options = {name for parameter in self.get_params(context) for name in parameter.opts}
        signed = [argument if argument in options else _signed(argument) for argument in arguments]
        return super().parse_args(context, signed)


def _signed(argument: str) -> str:
    from mergekit_lite.checkpoint.references import parse_addition
    from mergekit_lite.checkpoint.stores.addresses import is_elsewhere

    rest = argument[1:]
    if not argument.startswith(("+", "-")) or rest.startswith("-") or not rest or Path(argument).exists():
        return argument
    vector = parse_addition(rest)
    if not (is_elsewhere(vector.path) or Path(vector.path).expanduser().exists()):
        return argument
    return str(vector._replace(scale=-vector.scale)) if argument.startswith("-") else rest


@click.group(name="vector", cls=CommandGroup)
def command() -> None:
    """Work with task vectors, tuned − base, as files: extract, apply, combine.

    \b
    Examples:
      mergekit-lite vector extract ./base ./tuned -o v.safetensors
      mergekit-lite vector apply ./base v.safetensors:0.5 -o ./half-tuned
      mergekit-lite vector combine --method ties math.safetensors code.safetensors -o both.safetensors
    """


@command.command(
    name="extract",
    short_help="Make a task vector: tuned − base.",
    epilog="""\b
Examples:
  mergekit-lite vector extract ./base ./tuned -o v.safetensors
  mergekit-lite vector extract ./base ./tuned -o v.safetensors --format sparse --density 0.1
  mergekit-lite vector extract ./base ./tuned -o v.safetensors --format sign
  mergekit-lite vector extract ./base ./tuned -o v.safetensors --tokenizer-source tuned   (other vocabularies)
  mergekit-lite vector extract ./base ./tuned -o v.safetensors --format lowrank --energy 0.9
  mergekit-lite vector extract ./base ./tuned -o ./adapter --format lora --rank 32
""",
)
@click.argument("base")
@click.argument("tuned")
@click.option("-o", "--output", required=True, help="A .safetensors file; for the format lora a folder.")
@click.option(
    "--format",
    type=click.Choice(["dense", "sparse", "lowrank", "sign", "lora"]),
    default="dense",
    show_default=True,
    help="dense is exact; the others throw some of it away and tell how much.",
)
@click.option("--density", type=float, help="sparse: the share of each tensor that is kept, its largest differences.")
@click.option("--threshold", type=float, help="sparse: keep differences from this size on.")
@click.option("--rank", type=int, help="lowrank, lora: of the factors.")
@click.option("--energy", type=float, help="lowrank, lora: the least rank that keeps this share of ‖difference‖².")
@click.option("--seed", type=int, default=0, show_default=True, help="lowrank, lora: of the random projections.")
@click.option(
    "--tokenizer-source",
    type=click.Choice(["base", "tuned"]),
    help="Let rows of embedding and head follow their tokens; they are those of BASE's or TUNED's tokenizer.",
)
@click.option("--threads", type=click.IntRange(min=1), help="Workers; one for each core by default.")
@click.option("--device", default="cpu", show_default=True, help="lowrank, lora: cpu, cuda, cuda:1 … or auto.")
@running.takes_ray
@click.option("--resume", is_flag=True, help="Go on with a run that was killed or failed.")
@click.option("--force", is_flag=True, help="Replace OUTPUT if it exists; drop an unfinished run.")
@running.takes_sync
@running.takes_stream
@click.option("--json", "as_json", is_flag=True, help="Print the result as JSON.")
@click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only.")
@click.option("-v", "--verbose", is_flag=True, help="Print every tensor.")
def extract(
    base: str, tuned: str, output: str, as_json: bool, quiet: bool, verbose: bool, ray: str | None, **options: Any
) -> None:
    """Make the task vector of TUNED: what was added to BASE. Prints what it takes and what it throws away.

    BASE and TUNED are any models: folders, files, hub repositories, BASE+ADAPTER.
    """
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.vectors.extraction import extract_vector

    screen = Screen(quiet=quiet or as_json, verbose=verbose)
    workers = workers_of(ray, options["device"], options["threads"])
    with running.resumable(), workers as crew, screen.progress("extracting", crew) as progress:
        extracted = extract_vector(base, tuned, output, progress=progress, ray=crew, **options)
    for note in extracted.notes:
        screen.warn(note)
    if as_json:
        made = extracted.to_json() | json_output.of_nodes(crew)
        click.echo(json.dumps(json_output.with_fetched(made), indent=1))
    elif not quiet:
        _show(extracted, screen)
    screen.nodes(crew)


def _show(extracted: Extracted, screen: Screen) -> None:
    from mergekit_lite.commands.screen import made, size, table

    if screen.verbose:
        rows = [
            (tensor.name, tensor.encoder, size(tensor.nbytes), f"{math.sqrt(tensor.square):.3g}", f"{tensor.error:.4f}")
            for tensor in extracted.tensors
        ]
        screen.out.print(table(("tensor", "stored", ">size", ">‖difference‖", ">thrown away"), rows))
    screen.out.print(made(extracted.output, extracted.nbytes))
    differ = f"{counted(len(extracted.tensors), 'tensor')} differ, {extracted.unchanged:,} don't"
    exact = not any(tensor.lost for tensor in extracted.tensors)
    loss = "nothing thrown away" if exact else f"thrown away: {extracted.error:.4f} of ‖difference‖"
    screen.out.print(f"  {differ}; {loss}")


@command.command(
    name="apply",
    short_help="Add task vectors or adapters to a model.",
    cls=Signed,
    epilog="""\b
Examples:
  mergekit-lite vector apply ./base v.safetensors -o ./tuned-again
  mergekit-lite vector apply ./base math.safetensors:0.5 code.safetensors:0.5 -o ./both
  mergekit-lite vector apply ./model toxic.safetensors:-0.3 -o ./milder         (forgetting)
  mergekit-lite vector apply ./base +a.safetensors -b.safetensors -o ./analogy
  mergekit-lite vector apply ./base ./adapter:0.7 -o ./merged
""",
)
@click.argument("base")
@click.argument("vectors", nargs=-1, required=True, metavar="VECTOR[:SCALE]…")
@click.option("-o", "--output", required=True, help="A folder, or a .safetensors or .pt file.")
@click.option("--rebase", is_flag=True, help="Add vectors to another base than the one they were made from.")
@click.option("--dtype", help="float32, bfloat16, float16 or float64; that of the tuned model by default.")
@running.takes_rounding
@running.takes_shard_size
@running.takes_copy_code
@running.takes_run_options
def apply(
    base: str, vectors: tuple[str, ...], output: str, run_options: RunOptions, view: running.View, **options: Any
) -> None:
    """Add task vectors to BASE: base + Σ scale · vector, summed in float64 and rounded once.

    A VECTOR is a file made by extract or combine, or a LoRA adapter (a folder or a hub repository). A scale below 0
    takes it away; so does a minus before its name.
    """
    from mergekit_lite.vectors.application import plan_apply

    running.carry_out(plan_apply(base, vectors, output, **options), run_options, view)


@command.command(
    name="combine",
    short_help="Combine task vectors into one, by any method.",
    epilog="""\b
Examples:
  mergekit-lite vector combine --method ties -p density=0.2 math.safetensors code.safetensors -o both.safetensors
  mergekit-lite vector combine --method linear -p normalize=false a.safetensors:0.7 b.safetensors:0.3 -o v.safetensors
  mergekit-lite vector combine --space core --method ties -p density=0.5 ./adapter-a ./adapter-b -o ./adapter
  mergekit-lite vector combine --space knots --method linear ./a ./b ./c --rank 16 -o ./adapter
""",
)
@click.argument("vectors", nargs=-1, required=True, metavar="VECTOR[:WEIGHT]…")
@click.option("--method", required=True, help="Any method of the recipes (mergekit-lite methods).")
@click.option(
    "-p", "--parameter", "parameters", metavar="NAME=VALUE", callback=values.parameters, multiple=True, help="Of it."
)
@click.option("-o", "--output", required=True, help="A .safetensors file; with --space a folder.")
@click.option(
    "--space",
    type=click.Choice(["core", "knots"]),
    help="Combine LoRA adapters into an adapter: the space in which the method sees their products.",
)
@click.option("--rank", type=int, help="With --space: cut the result to this rank; the sum of the ranks by default.")
@click.option("--rebase", is_flag=True, help="Take vectors of different bases for vectors of the first one's.")
@click.option("--dtype", default="float32", show_default=True, help="Of the result.")
@click.option("--seed", type=int, default=0, show_default=True, help="Of methods that draw.")
@running.takes_run_options
def combine(
    vectors: tuple[str, ...],
    output: str,
    method: str,
    parameters: dict[str, Any],
    space: SpaceName | None,
    rank: int | None,
    run_options: RunOptions,
    view: running.View,
    **options: Any,
) -> None:
    """Combine task vectors of one base into one, by any method of the recipes; the base of it is zero.

    With --space they are LoRA adapters (folders or hub repositories) of any ranks and scales, and so is the result.
    """
    from mergekit_lite.vectors.combination import plan_combine

    if space is not None:
        _combine_adapters(vectors, output, method, parameters, space, rank, run_options, view, options)
        return
    if rank is not None:
        raise UsageError("--rank goes with --space, which combines adapters.")
    running.carry_out(plan_combine(vectors, output, method, parameters, **options), run_options, view)


def _combine_adapters(
    adapters: tuple[str, ...],
    output: str,
    method: str,
    parameters: dict[str, Any],
    space: SpaceName,
    rank: int | None,
    run_options: RunOptions,
    view: running.View,
    options: dict[str, Any],
) -> None:
    """Combine adapters into one and show it, or the plan alone."""
    from mergekit_lite.vectors.adapter_combination import run_adapters
    from mergekit_lite.vectors.adapter_plan import plan_adapters

    if options.pop("rebase"):
        raise UsageError("--rebase: not with --space, as adapters are held to no base.")
    plan = plan_adapters(adapters, output, method, parameters, space=space, rank=rank, **options)
    _make_adapter(plan, partial(run_adapters, plan), f"by {method} in {space}", "--space", run_options, view)


@command.command(
    name="intruders",
    short_help="Scale what an adapter brought that its base has nothing like.",
    epilog="""\b
Examples:
  mergekit-lite vector intruders ./base ./adapter -o ./milder
  mergekit-lite vector intruders ./base ./adapter -o ./milder --lambda 0.5 -v   (each module's intruders)
  mergekit-lite vector intruders ./base ./adapter -o ./milder --dry-run
""",
)
@click.argument("base")
@click.argument("adapter")
@click.option("-o", "--output", required=True, help="A folder.")
@click.option("--top-k", type=int, default=10, show_default=True, help="Strongest directions that are looked at.")
@click.option(
    "--epsilon", type=float, default=0.5, show_default=True, help="Cosine with all of BASE's below which one intrudes."
)
@click.option("--lambda", "scale", type=float, default=0.75, show_default=True, help="What intruders are scaled by.")
@click.option("--dtype", default="float32", show_default=True, help="Of the result.")
@running.takes_run_options
def intruders(
    base: str, adapter: str, output: str, run_options: RunOptions, view: running.View, **options: Any
) -> None:
    """Scale the intruder dimensions of a LoRA adapter, and write it as an adapter (arXiv 2410.21228).

    Of each matrix of BASE + ADAPTER the strongest singular directions are compared with those of BASE. Those that
    resemble none of them are made weaker: some of what fine-tuning forgot comes back. A matrix at a time is in memory,
    some seven times in float64, for each of --threads.
    """
    from mergekit_lite.vectors.intruders import plan_intruders, run_intruders

    plan = plan_intruders(base, adapter, output, **options)
    how = f"their intruders × {options['scale']:g}"
    _make_adapter(plan, partial(run_intruders, plan), how, "an adapter's intruders", run_options, view)


def _make_adapter(
    plan: AdapterOutput,
    run: Callable[..., Extracted],
    how: str,
    what: str,
    run_options: RunOptions,
    view: running.View,
) -> None:
    """Make an adapter and show it, or the plan alone. Raises UsageError for options that ``what`` has no use for."""
    from mergekit_lite.commands.screen import Screen

    unfit = {
        "--device": run_options.pop("device", "cpu") not in ("cpu", "auto"),
        "--ray": run_options.pop("ray", None) is not None,
        "--allow-nonfinite": run_options.pop("allow_nonfinite", False),
    }
    if given := [name for name, is_given in unfit.items() if is_given]:
        raise UsageError(f"{', '.join(given)}: not with {what}, which works on this machine's CPUs, on finite factors.")
    running_options: dict[str, Any] = {**run_options}
    screen = Screen(quiet=view.quiet or view.as_json, verbose=view.verbose)
    for note in plan.notes:
        screen.warn(note)
    ranks = sorted({module.rank for module in plan.modules})
    if view.dry_run:
        shown = {"modules": len(plan.modules), "ranks": ranks, "bytes": plan.layout.nbytes, "notes": list(plan.notes)}
        if view.as_json:
            click.echo(json.dumps(shown, indent=1))
        elif not view.quiet:
            screen.out.print(f"{counted(len(plan.modules), 'module')} of rank {_range(ranks)}, {how}")
        return
    with running.resumable(), screen.progress("combining", None) as progress:
        made = run(progress=progress, **running_options)
    if view.as_json:
        click.echo(json.dumps(json_output.with_fetched(made.to_json()), indent=1))
    elif not view.quiet:
        _show_adapter(made, _range(ranks), screen)


def _range(numbers: Sequence[int]) -> str:
    """Return ``16``, or ``8 to 16`` where numbers differ."""
    least, most = min(numbers), max(numbers)
    return f"{most}" if least == most else f"{least} to {most}"


def _show_adapter(result: Extracted, ranks: str, screen: Screen) -> None:
    from mergekit_lite.commands.screen import made, table

    if screen.verbose:
        rows = [
            (one.name, f"{math.sqrt(one.square):.3g}", f"{one.error:.4f}", *_intruders(one)) for one in result.tensors
        ]
        heads = ("tensor", ">‖product‖", ">cut off", ">intruders")
        screen.out.print(table(heads[: len(rows[0])], rows))
    screen.out.print(made(result.output, result.nbytes))
    exact = not any(tensor.lost for tensor in result.tensors)
    loss = "nothing cut off" if exact else f"cut off: {result.error:.4f} of ‖product‖"
    found = [one.intruders for one in result.tensors if one.intruders is not None]
    scaled = f"{counted(sum(found), 'intruder')} in {sum(map(bool, found)):,} of them scaled; " if found else ""
    screen.out.print(f"  {counted(len(result.tensors), 'module')} of rank {ranks}; {scaled}{loss}")


def _intruders(tensor: StoredTensor) -> list[str]:
    return [] if tensor.intruders is None else [f"{tensor.intruders}"]
