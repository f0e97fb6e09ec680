"""Options and steps that all commands which write models share: how a plan is run, and what is shown of it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import values
from mergekit_lite.engine.devices import chosen_devices
from mergekit_lite.engine.run import RunOptions, check_outputs, run
from mergekit_lite.errors import RunError

if TYPE_CHECKING:
    from mergekit_lite.planning import Plan

NO_KERNELS = (
    "the compiled kernels are not here: torch computes the same, slower. With a C compiler on this machine, "
    "pip install --force-reinstall --no-deps mergekit-lite builds them."
)
# Whether workers are forked: elsewhere there is no fork, or system libraries don't survive it.
PROCESSES = sys.platform == "linux" and hasattr(os, "fork")


@dataclass(frozen=True)
class View:
    """What a command shows: the plan alone or the result too, as text or JSON, and how much of it."""

    dry_run: bool
    as_json: bool
    quiet: bool
    verbose: bool


takes_sync = click.option(
    "--sync",
    is_flag=True,
    help="Hold through a power cut, too: wait until the disk has the output. Takes as long as the disk takes to write.",
)
OPTIONS = (
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="Workers; by default one more than cores, as some wait for the disk.",
    ),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …, cuda:all or auto."),
    click.option("--resume", is_flag=True, help="Go on with a run that was killed or failed."),
    click.option("--force", is_flag=True, help="Replace OUTPUT if it exists; drop an unfinished run."),
    takes_sync,
    click.option("--allow-nonfinite", is_flag=True, help="Accept NaN and infinity in the inputs."),
    click.option("--dry-run", is_flag=True, help="Print the plan, write nothing."),
    click.option("--json", "as_json", is_flag=True, help="Print the result as JSON."),
    click.option("-q", "--quiet", is_flag=True, help="Print errors and warnings only."),
    click.option("-v", "--verbose", is_flag=True, help="Print every tensor."),
)


def takes_run_options(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of running a plan.

    The function gets them together as ``run_options`` (RunOptions) and ``view`` (View).
    """

    @functools.wraps(function)
    def with_groups(**arguments: Any) -> None:
        run_options = {name: arguments.pop(name) for name in RunOptions.__annotations__ if name in arguments}
        view = View(**{field.name: arguments.pop(field.name) for field in fields(View)})
        function(run_options=run_options, view=view, **arguments)

    for option in reversed(OPTIONS):
        with_groups = option(with_groups)
    return with_groups


takes_shard_size = click.option(
    "--shard-size",
    metavar="SIZE",
    callback=values.size,
    help="Most bytes in one file, for instance 5GB; by default shards as in the model that gives the config.",
)

takes_copy_code = click.option(
    "--copy-code",
    is_flag=True,
    help="Copy the code of its own that a model in a folder has (auto_map in its config); it is not run.",
)


def takes_rounding(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of rounding, for methods that draw nothing else."""
    seed = click.option("--seed", type=int, default=0, show_default=True, help="Of the stochastic rounding.")
    rounding = click.option(
        "--rounding",
        type=click.Choice(["nearest", "stochastic"]),
        default="nearest",
        show_default=True,
        help="Stochastic keeps steps smaller than the dtype's spacing, on average.",
    )
    return rounding(seed(function))


def carry_out(plan: Plan, run_options: RunOptions, view: View) -> None:
    """Show or run a plan."""
    from mergekit_lite.commands import json_output
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.ops.c_ops import compiled
    from mergekit_lite.planning.delta_check import delta_warning

    screen = Screen(quiet=view.quiet or view.as_json, verbose=view.verbose)
    resume, threads = run_options["resume"], run_options["threads"]
    devices = chosen_devices(run_options["device"])
    check_outputs(plan, resume=resume, force=run_options["force"])
    if not resume:
        _check_room(plan)
    if view.dry_run and view.as_json:
        click.echo(json.dumps(json_output.of_plan(plan, threads, devices), indent=1))
    elif view.dry_run:
        screen.plan(plan, threads, devices)
    else:
        screen.headline(plan)
        if compiled() is None and not screen.quiet:
            screen.err.print(NO_KERNELS)
    screen.warn(delta_warning(plan))
    if view.dry_run:
        screen.missing(plan)
        return
    with resumable(), screen.progress() as progress:
        options: RunOptions = {**run_options, "progress": progress, "processes": PROCESSES}
        finished = run(plan, **options)
    if view.as_json:
        click.echo(json.dumps(json_output.of_finished(finished), indent=1))
    screen.finished(plan, finished)


@contextmanager
def resumable() -> Iterator[None]:
    """Tell a user who interrupts that the command goes on where it stopped."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("What was finished is kept: the same command with --resume goes on.") from None


def _check_room(plan: Plan) -> None:
    parent = next(folder for folder in plan.outputs[0].resolve().parents if folder.exists())
    free = shutil.disk_usage(parent).free
    if free < plan.bytes_to_write:
        raise RunError(
            f"{parent}: has {free / 1e9:.2f} GB free, the output needs {plan.bytes_to_write / 1e9:.2f} GB. "
            "Make room or choose another disk."
        )
