"""Options and steps that all commands which write models share: how a plan is run, and what is shown of it."""

from __future__ import annotations

import functools
import json
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import units, values
from mergekit_lite.commands.prediction import predicted
from mergekit_lite.commands.push import show, takes_public
from mergekit_lite.engine.pool import writing_workers
from mergekit_lite.engine.ray_cluster import devices_of, workers_of
from mergekit_lite.engine.remote import spool_bytes
from mergekit_lite.engine.run import RunOptions, check_outputs, run
from mergekit_lite.errors import MergekitLiteError, RunError, UsageError
from mergekit_lite.layout import is_single_file
from mergekit_lite.object_stores import Place
from mergekit_lite.output.remote_workspace import spool_folder

if TYPE_CHECKING:
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.layout import OutputPath
    from mergekit_lite.planning import Plan
    from mergekit_lite.pushing import Pushed

NO_KERNELS = (
    "the compiled kernels are not here, or older than the rest: torch computes the same, slower. With a C compiler on "
    "this machine, pip install --force-reinstall --no-deps mergekit-lite builds them (in a checkout: pip install -e .)."
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
takes_stream = click.option(
    "--stream",
    is_flag=True,
    expose_value=False,
    callback=values.stream,
    help="Read hub models by range, as they are needed, and store none of them: org/name as hf://org/name.",
)
takes_ray = click.option(
    "--ray",
    metavar="auto|ADDRESS|local:N",
    help="Work on the machines of a Ray cluster: of the one here, of the one at HOST:PORT, or with N workers here.",
)
takes_fetch_cache = click.option(
    "--fetch-cache",
    metavar="SIZE",
    expose_value=False,
    callback=values.fetch_cache,
    help="Keep up to so much of what is fetched on this disk until the end, for methods that read it again.",
)
OPTIONS = (
    click.option(
        "--threads",
        type=click.IntRange(min=1),
        help="Workers; by default one more than cores, as some wait for the disk.",
    ),
    click.option("--device", default="cpu", show_default=True, help="cpu, cuda, cuda:1 …, cuda:all or auto."),
    takes_ray,
    click.option("--resume", is_flag=True, help="Go on with a run that was killed or failed."),
    click.option("--force", is_flag=True, help="Replace OUTPUT if it exists; drop an unfinished run."),
    takes_sync,
    takes_stream,
    takes_fetch_cache,
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


def takes_tokenizer_source(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command on a pair the options of vocabularies that differ."""
    source = click.option(
        "--tokenizer-source",
        metavar="aligned|base|union",
        help="Let rows of embedding and head follow their tokens, and give the output this tokenizer: ALIGNED's, SFT's "
        "(base), or that which has the tokens of both.",
    )
    width = click.option(
        "--width",
        type=click.Choice(["base", "max", "min"]),
        default="base",
        show_default=True,
        help="With it, rows of the output: as the tokenizer's model has (base), or the most or fewest of both.",
    )
    return source(width(function))


def takes_push(function: Callable[..., None]) -> Callable[..., None]:
    """Give a command the options of putting its output on the hub."""
    option = click.option("--push", metavar="ORG/NAME", help="Put the output on the Hugging Face hub, too.")
    return option(takes_public(function))


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


def carry_out(
    plan: Plan,
    run_options: RunOptions,
    view: View,
    push: str | None = None,
    public: bool = False,
    *,
    more: Mapping[str, Any] | None = None,
) -> None:
    """Show or run a plan, and ``push`` what it made to a repository of the hub.

    ``more`` is told with the result as JSON.
    """
    from mergekit_lite.commands import json_output
    from mergekit_lite.commands.screen import Screen
    from mergekit_lite.ops.c_ops import compiled
    from mergekit_lite.planning.delta_check import delta_warning

    screen = Screen(quiet=view.quiet or view.as_json, verbose=view.verbose)
    resume, threads = run_options["resume"], run_options["threads"]
    devices = devices_of(run_options["ray"], run_options["device"])
    check_outputs(plan, resume=resume, force=run_options["force"])
    repositories = _repositories(plan, push, public)
    if not resume:
        _check_room(plan, threads)
    prediction = predicted(plan, threads=threads, devices=devices) if view.dry_run else None
    if view.dry_run and view.as_json:
        told = json_output.of_plan(plan, threads, devices, prediction) | dict(more or {})
        click.echo(json.dumps(json_output.with_fetched(told), indent=1))
    elif view.dry_run:
        screen.plan(plan, threads, devices, prediction)
    else:
        screen.headline(plan)
        if compiled() is None and not screen.quiet:
            screen.err.print(NO_KERNELS)
    screen.warn(delta_warning(plan))
    if view.dry_run:
        screen.missing(plan)
        return
    with (
        resumable(),
        workers_of(run_options["ray"], run_options["device"], threads) as crew,
        screen.progress(crew=crew) as progress,
    ):
        options: RunOptions = {**run_options, "progress": progress, "processes": PROCESSES, "ray": crew}
        finished = run(plan, **options)
    pushed: list[Pushed] = []
    failure: BaseException | None = None
    try:
        for output, name in zip(plan.outputs, repositories, strict=False):
            pushed.append(_pushed(output, name, public, screen))
    except BaseException as error:  # what was made is told in any case
        failure = error
    if view.as_json:
        made = json_output.of_finished(finished) | json_output.of_nodes(crew) | dict(more or {})
        told = json_output.with_fetched(made)
        if repositories:
            told |= {"pushed": [each.to_json() for each in pushed], "push_failed": str(failure) if failure else None}
        click.echo(json.dumps(told, indent=1))
    screen.finished(plan, finished, resumed=run_options.get("resume", False))
    screen.nodes(crew)
    for each in pushed:
        show(each, screen)
    if failure is not None:
        raise failure


def _repositories(plan: Plan, push: str | None, public: bool) -> list[str]:
    """Return the repository of each output, where any is to be pushed. Raises UsageError where one can't be."""
    if push is None:
        return []
    from mergekit_lite.pushing import check_repository  # with pydantic, which takes 13 MB

    if len(plan.outputs) > 1:
        raise UsageError("--push takes one output: make several, then push each: mergekit-lite push OUTPUT org/name.")
    if isinstance(plan.outputs[0], Place) or is_single_file(plan.outputs[0]):
        raise UsageError(f"--push takes a folder on a disk, with a card and a config; {plan.outputs[0]} is none.")
    check_repository(push, public=public)
    return [push]


def _pushed(output: OutputPath, repository: str, public: bool, screen: Screen) -> Pushed:
    from mergekit_lite.pushing import push

    again = f"It is made; push it again with: mergekit-lite push {output} {repository}"
    try:
        with screen.progress("uploading") as progress:
            return push(str(output), repository, public=public, progress=progress)
    except MergekitLiteError as error:
        raise RunError(f"{error}\n{again}") from None
    except KeyboardInterrupt:
        raise KeyboardInterrupt(again) from None


@contextmanager
def resumable() -> Iterator[None]:
    """Tell a user who interrupts that the command goes on where it stopped."""
    try:
        yield
    except KeyboardInterrupt:
        raise KeyboardInterrupt("What was finished is kept: the same command with --resume goes on.") from None


def _check_room(plan: Plan, threads: int | None) -> None:
    output = plan.outputs[0]
    if isinstance(output, Place):
        parent, needed, remedy = (
            spool_folder(),
            spool_bytes(plan, threads or writing_workers()),
            "set TMPDIR to another",
        )
    else:
        parent = next(folder for folder in output.resolve().parents if folder.exists())
        needed, remedy = plan.bytes_to_write, "choose another disk"
    free = shutil.disk_usage(parent).free
    if free < needed:
        what = "the output needs" if not isinstance(output, Place) else "what waits to be uploaded can take"
        raise RunError(f"{parent}: has {units.size(free)} free, {what} {units.size(needed)}. Make room or {remedy}.")
