"""``moe split``, ``moe prune`` and ``moe merge-experts``: a mixture's experts by themselves, or fewer of them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import running
from mergekit_lite.engine.run import RunOptions, check_outputs
from mergekit_lite.errors import UsageError

if TYPE_CHECKING:
    from mergekit_lite.checkpoint import Checkpoint
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.mixtures.splitting import Expert
    from mergekit_lite.mixtures.thinning.choosing import By, Choice
    from mergekit_lite.mixtures.thinning.usage import Usage

FILE = click.Path(dir_okay=False, path_type=Path)
BY = click.Choice(["usage", "weights", "router"])
PLACE = "{expert}"  # in a name of outputs, where each expert is one


def _experts(_context: object, _option: object, text: str) -> tuple[Expert, ...] | None:
    """Parse ``3``, ``0,2,5``, ``shared`` or ``all``, which is None."""
    if text == "all":
        return None
    if text == "shared":
        return ("shared",)
    try:
        return tuple(int(part) for part in text.split(","))
    except ValueError as error:
        raise click.BadParameter(f"{text!r} should be numbers of experts, as 3 or 0,2,5; or all, or shared.") from error


def _weights(_context: object, _option: object, text: str | None) -> tuple[float, ...]:
    try:
        return tuple(float(part) for part in text.split(",")) if text else ()
    except ValueError as error:
        raise click.BadParameter(f"{text!r} should be numbers, as 0.7,0.3.") from error


@click.command(
    name="split",
    short_help="Make dense models of a mixture's experts.",
    epilog="""\b
Examples:
  mergekit-lite moe split ./mixture --experts 3 -o ./dense
  mergekit-lite moe split ./mixture --experts all -o './dense-{expert}'
  mergekit-lite moe split ./mixture --experts 0,2 --weights 0.7,0.3 -o ./mean
  mergekit-lite moe split ./qwen2-moe --experts shared -o ./dense
""",
)
@click.argument("model")
@click.option("--experts", required=True, callback=_experts, metavar="N,M…|all|shared", help="Which ones.")
@click.option("--weights", callback=_weights, metavar="W,V…", help="Of each in the mean; equal by default.")
@click.option("-o", "--output", required=True, help="A folder; with {expert} in its name one for each expert.")
@running.takes_shard_size
@running.takes_run_options
def split(
    model: str,
    experts: tuple[Expert, ...] | None,
    weights: tuple[float, ...],
    output: str,
    shard_size: int | None,
    run_options: RunOptions,
    view: running.View,
) -> None:
    """Make a dense model of an expert of MODEL, or of the mean of several.

    The dense model has the mixture's attention, norms, embedding and head. With {expert} in the name of the output,
    each expert becomes a model of its own.
    """
    from mergekit_lite.mixtures.splitting import experts_of, plan_split

    chosen: tuple[Expert, ...] = tuple(range(experts_of(model))) if experts is None else experts
    if PLACE in output and weights:
        raise UsageError(f"--weights are for a mean, and {output} is a folder for each expert: leave one of them out.")
    if PLACE not in output:
        running.carry_out(plan_split(model, chosen, output, weights=weights, shard_size=shard_size), run_options, view)
        return
    if view.as_json and len(chosen) > 1:
        raise UsageError("--json tells of one output: split off one expert at a time, or leave --json out.")
    plans = [plan_split(model, [one], output.replace(PLACE, str(one)), shard_size=shard_size) for one in chosen]
    for plan in plans:
        check_outputs(plan, resume=run_options["resume"], force=run_options["force"])
    for plan in plans:
        running.carry_out(plan, run_options, view)


def _takes_choice(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options by which experts are chosen."""
    for option in reversed(
        (
            click.option("--by", type=BY, required=True, help="What decides: see above."),
            click.option(
                "--prompts", type=FILE, multiple=True, help="JSONL or Parquet, to count how experts are used."
            ),
            click.option("--limit", type=click.IntRange(min=1), help="Most prompts that are read."),
            click.option("-o", "--output", required=True, help="A folder."),
            running.takes_shard_size,
            running.takes_copy_code,
            running.takes_run_options,
        )
    ):
        function = option(function)
    return function


@click.command(
    name="prune",
    short_help="Keep some of a mixture's experts.",
    epilog="""\b
Examples:
  mergekit-lite moe prune ./mixture --keep 6 --by usage --prompts dev.jsonl -o ./smaller
  mergekit-lite moe prune ./mixture --keep 96 --by weights -o ./smaller
  mergekit-lite moe prune ./mixture --keep 96 --by router -o ./smaller --dry-run
""",
)
@click.argument("model")
@click.option("--keep", "number", type=click.IntRange(min=1), required=True, help="Experts of each layer.")
@_takes_choice
def prune(model: str, number: int, **options: Any) -> None:
    """Keep some experts of each layer of MODEL; rows of the routers and the config follow.

    \b
    --by usage    keeps those that its routers choose most often on the prompts
    --by weights  drops, of the two whose weights are most alike, the one that is more like the others, and so on
    --by router   the same, by the experts' rows in the router
    """
    _fewer("moe prune", model, number, **options)


@click.command(
    name="merge-experts",
    short_help="Merge some of a mixture's experts.",
    epilog="""\b
Examples:
  mergekit-lite moe merge-experts ./mixture --to 4 --by weights -o ./smaller
  mergekit-lite moe merge-experts ./mixture --to 4 --by weights --prompts dev.jsonl -o ./smaller   (means by usage)
  mergekit-lite moe merge-experts ./mixture --to 4 --by usage --prompts dev.jsonl -o ./smaller
""",
)
@click.argument("model")
@click.option("--to", "number", type=click.IntRange(min=1), required=True, help="Experts of each layer that are left.")
@_takes_choice
def merge_experts(model: str, number: int, **options: Any) -> None:
    """Merge experts of each layer of MODEL that are alike, each group to its mean; routers and config follow.

    \b
    --by usage    each but those chosen most often joins the one of these whose row in the router is most like its own
    --by weights  of all groups the two whose weights are most alike become one, and so on
    --by router   the same, by the experts' rows in the router

    With prompts, means are weighted by how often each expert was chosen.
    """
    _fewer("moe merge-experts", model, number, **options)


def _fewer(
    method: str,
    model: str,
    number: int,
    by: By,
    prompts: tuple[Path, ...],
    limit: int | None,
    output: str,
    shard_size: int | None,
    copy_code: bool,
    run_options: RunOptions,
    view: running.View,
) -> None:
    """Choose experts, show what was chosen, and make the smaller mixture."""
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.mixtures.thinning.thinning import CHOOSE, checked_first, plan_chosen

    screen = Screen(quiet=view.quiet or view.as_json, verbose=view.verbose)
    mixture, layers = checked_first(method, model, output, number, by, bool(prompts), run_options)
    usage = _usage(mixture, len(layers[0].experts), prompts, limit, run_options, screen) if prompts else None
    with screen.progress("comparing experts") as progress:
        choice = CHOOSE[method](mixture, layers, number, by, usage, progress)
    _show(screen, choice)
    plan = plan_chosen(model, choice, output, shard_size, copy_code)
    running.carry_out(plan, run_options, view, more=choice.to_json())


def _usage(
    mixture: Checkpoint,
    experts: int,
    prompts: tuple[Path, ...],
    limit: int | None,
    run_options: RunOptions,
    screen: Screen,
) -> Usage:
    """Count how experts are used on the prompts of files."""
    from mergekit_lite.engine.devices import chosen_devices
    from mergekit_lite.mixtures.thinning.usage import measured, prompts_in

    loaded = prompts_in(prompts)
    for problem in loaded.problems:
        screen.warn(f"left out: {problem}")
    device, threads = chosen_devices(run_options["device"])[0], run_options["threads"]
    with screen.progress("reading prompts", unit="tokens") as progress:
        return measured(mixture, loaded.prompts[:limit], experts, device=device, threads=threads, progress=progress)


def _show(screen: Screen, choice: Choice) -> None:
    from mergekit_lite.commands.screen import table

    if not screen.quiet:
        screen.err.print(f"experts: {choice.how}")
        screen.err.print(table(choice.columns, choice.rows))
