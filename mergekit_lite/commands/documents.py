"""Recipes of several documents on the command line: their plans, and their merges one after the other."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import click

from mergekit_lite.commands import json_output, running
from mergekit_lite.commands.prediction import predicted_in_turn
from mergekit_lite.commands.screen import Screen, size
from mergekit_lite.commands.units import seconds
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.ray_cluster import devices_of, workers_of
from mergekit_lite.engine.run import RunOptions, check_outputs
from mergekit_lite.errors import RunError

if TYPE_CHECKING:
    from mergekit_lite.multimerge import Step
    from mergekit_lite.planning import Plan


def show_plans(steps: Sequence[Step], screen: Screen, *, as_json: bool, **options: Any) -> None:
    """Print the plan of each document, in the order in which they are made, and what each and all will take.

    ``options`` are those of ``predicted_in_turn``.
    """
    threads, devices = options.get("threads"), options.get("devices", (CPU,))
    told = predicted_in_turn([step.plan for step in steps if not step.is_fused], **options)
    of_each = iter(told.predictions if told is not None else ())
    predictions = [None if step.is_fused else next(of_each, None) for step in steps]
    if as_json:
        plans = [
            {"name": step.name, "fused": step.is_fused, **json_output.of_plan(step.plan, threads, devices, prediction)}
            for step, prediction in zip(steps, predictions, strict=True)
        ]
        in_all = {} if told is None else {"prediction": told.to_json()}
        click.echo(json.dumps({"documents": plans, **in_all}, indent=1))
        return
    for number, (step, prediction) in enumerate(zip(steps, predictions, strict=True)):
        screen.lines([*[""] * bool(number), heading(step)])
        screen.plan(step.plan, prediction.workers if prediction is not None else threads, devices, prediction)
        screen.missing(step.plan)
    if told is not None and len(told.predictions) > 1:
        screen.lines(["", f"all documents: about {seconds(told.seconds)}"])


def carry_out(steps: Sequence[Step], run_options: RunOptions, view: running.View, *, keep: bool) -> None:
    """Show or run the documents of a recipe."""
    from mergekit_lite.multimerge import merge_documents

    screen = Screen(quiet=view.quiet or view.as_json, verbose=view.verbose)
    for step in steps:
        if step.is_final:
            check_outputs(step.plan, resume=run_options["resume"], force=run_options["force"])
    if not run_options["resume"]:
        _check_room(steps)
    if view.dry_run:
        devices = devices_of(run_options["ray"], run_options["device"])
        show_plans(steps, screen, as_json=view.as_json, threads=run_options["threads"], devices=devices)
        return

    def announce(step: Step, plan: Plan) -> None:
        screen.note(heading(step))
        screen.headline(plan)

    for step in steps:
        if step.is_fused:
            screen.note(heading(step))
            for note in step.plan.notes:
                screen.warn(note)
    made = []
    workers = workers_of(run_options["ray"], run_options["device"], run_options["threads"])
    with running.resumable(), workers as crew, screen.progress(crew=crew) as progress:
        options: RunOptions = {**run_options, "progress": progress, "processes": running.PROCESSES, "ray": crew}
        for step, finished in merge_documents(steps, keep=keep, starting=announce, **options):
            if finished is None:
                screen.note(f"{heading(step)}: is there already")
                continue
            if not view.as_json:
                screen.finished(step.plan, finished, resumed=run_options.get("resume", False))
            made.append({"name": step.name, **json_output.of_finished(finished)})
    if view.as_json:
        click.echo(json.dumps(json_output.with_fetched({"documents": made} | json_output.of_nodes(crew)), indent=1))
    screen.nodes(crew)
    if keep:
        between = [step.output for step in steps if not step.is_final and not step.is_fused]
        folders = {output.parent for output in between if isinstance(output, Path)}
        screen.note("".join(f"kept for the next run: {folder}" for folder in folders))


def heading(step: Step) -> str:
    """Return what a document is called, and that it is written nowhere where that is so."""
    called = f"Document {step.name!r}" if step.name else "The last document"
    return f"{called}: made while the next one reads it, and written nowhere" if step.is_fused else called


def _check_room(steps: Sequence[Step]) -> None:
    """Raise RunError where the disk has no room for all results together."""
    here = [step for step in steps if isinstance(step.output, Path) and not step.is_fused]
    if not here:
        return
    wanted = sum(step.plan.bytes_to_write for step in here)
    parent = next(folder for folder in Path(str(here[-1].output)).absolute().parents if folder.exists())
    if (free := shutil.disk_usage(parent).free) < wanted:
        raise RunError(
            f"{parent}: has {size(free)} free, and the results of all documents need {size(wanted)}. Make room or "
            "choose another disk."
        )
