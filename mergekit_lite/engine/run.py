"""Run a plan: take the working folders, let the workers fill them, and publish what they made."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from mergekit_lite.deferred import torch
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.finished import is_finished
from mergekit_lite.engine.pool import Workers, available_cores, writing_workers
from mergekit_lite.engine.report import Report, TensorDigests, report
from mergekit_lite.engine.schedule import Progress, Schedule
from mergekit_lite.engine.tiling import BLOCK, GRAIN
from mergekit_lite.errors import NonFiniteError, UsageError, counted, listing
from mergekit_lite.options import named_options
from mergekit_lite.output.companions import write_companions
from mergekit_lite.output.workspace import (
    OutputWorkspace,
    check_target,
    finish_publishing,
    is_half_published,
    manifest_path,
    own_manifest,
    tidy,
)
from mergekit_lite.planning import Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

GPU_WORKERS = 6
GPU_BLOCK = 1 << 22


@dataclass(frozen=True)
class Finished:
    """The outputs of a run: a path and a report for each, in the order of the plan's outputs."""

    outputs: tuple[Path, ...]
    reports: tuple[Report, ...]
    seconds: float


class RunOptions(TypedDict, total=False):
    """How a plan is run: the options of ``run``, and of every function that plans and runs in one call.

    Attributes:
        threads: workers; by default one more than there are cores, or enough to keep a GPU's copies going.
        device: ``cpu`` (the default), ``cuda``, ``cuda:1`` … or ``auto`` (a GPU where one is there).
        block: elements read, computed and written at once, rounded up to whole grains; changes no byte of the output.
        resume: go on with what an earlier run of the same plan left.
        force: replace existing outputs, and drop what an earlier run left unless ``resume`` is set too.
        allow_nonfinite: publish even where weights are NaN or infinite.
        progress: called with (bytes read, bytes in all) after each span, or some small ones.
        processes: fork the workers (CPU, Linux) instead of starting threads: faster, as they don't share Python's lock,
            and safe where this process has no threads of its own that hold locks.
    """

    threads: int | None
    device: str
    block: int | None
    resume: bool
    force: bool
    allow_nonfinite: bool
    progress: Progress | None
    processes: bool


@named_options
def run(plan: Plan, **options: Unpack[RunOptions]) -> Finished:
    """Carry out a plan.

    Args:
        plan: from ``plan_extrapolation``, ``plan_merge`` or another of the planning functions.
        **options: see ``RunOptions``.

    Returns:
        The outputs' paths, a report for each of them, and the seconds it took.

    Raises:
        UsageError: an output exists, or lies in an input; the device is not there.
        CheckpointError: an input changed since it was planned.
        RunError: reading or writing failed; the journal is kept for ``resume``.
        NonFiniteError: weights are NaN or infinite; everything is kept for ``resume`` with ``allow_nonfinite``.
    """
    started = time.monotonic()
    resume, force = options.get("resume", False), options.get("force", False)
    place = chosen_device(options.get("device", CPU))
    workers, usual_block = workers_and_block(place, options.get("threads"), writing_workers())
    block = -(-(options.get("block") or usual_block) // GRAIN) * GRAIN
    check_outputs(plan, resume=resume, force=force)
    if resume:
        for output in plan.outputs:
            finish_publishing(output)
    finished = [resume and is_finished(output, plan, v) for v, output in enumerate(plan.outputs)]
    _check_targets(plan, finished, resume=resume, force=force)
    unfinished = [v for v, done in enumerate(finished) if not done]
    for v, output in enumerate(plan.outputs):
        if finished[v]:
            tidy(output, plan.digest(v))
    made: dict[int, Report] = {}
    with ExitStack() as stack:
        workspaces: dict[int, OutputWorkspace] = {}
        for v in unfinished:
            workspaces[v] = OutputWorkspace(
                plan.outputs[v], plan.layout, plan.digest(v), plan.input_files, fresh=force and not resume
            )
            stack.callback(workspaces[v].close)
        _check_inputs(plan)
        team = Workers(workers, place, block, options.get("processes", False))
        Schedule(plan, workspaces, team, options.get("progress")).run()
        _check_inputs(plan)
        if not options.get("allow_nonfinite", False):
            _refuse_nonfinite(plan, workspaces)
        for v, workspace in workspaces.items():
            records = workspace.journal.records
            made[v] = report(plan, v, records)
            write_companions(plan, v, workspace.result, made[v].to_json(), TensorDigests(plan, records))
            workspace.publish(force=force)
    reports = tuple(made.get(v) or _reported(output) for v, output in enumerate(plan.outputs))
    return Finished(plan.outputs, reports, time.monotonic() - started)


def check_outputs(plan: Plan, *, resume: bool = False, force: bool = False) -> None:
    """Raise UsageError where an output path is in an input, or exists already.

    An output that its manifest calls the plan's own passes: reading all of it is left to ``run``.
    """
    if len(set(plan.outputs)) < len(plan.outputs):
        raise UsageError("Two outputs have the same path. Put {alpha} in the name: -o out-{alpha}.")
    likely = [
        resume and (is_half_published(output) or own_manifest(output, plan, v) is not None)
        for v, output in enumerate(plan.outputs)
    ]
    _check_targets(plan, likely, resume=resume, force=force)


def _check_targets(plan: Plan, finished: Sequence[bool], *, resume: bool, force: bool) -> None:
    sources = [path for checkpoint in plan.inputs for path in checkpoint.paths]
    for output, done in zip(plan.outputs, finished, strict=True):
        if not done:
            check_target(output, sources, resume=resume, force=force)


def chosen_device(name: str) -> str:
    """Return the device of this name as torch names it. Raises UsageError where it is unknown or missing."""
    if name == "auto":
        return "cuda" if torch.cuda.is_available() else CPU
    if name == CPU:
        return CPU
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise UsageError(f"Unknown device {name!r}: expected cpu, cuda, cuda:0 … or auto.") from error
    if device.type not in (CPU, "cuda"):
        raise UsageError(f"Device {name!r} is not supported: expected cpu, cuda, cuda:0 … or auto.")
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(
            f"Device {name!r} is not there: torch sees {counted(torch.cuda.device_count(), 'CUDA device')}."
        )
    return CPU if device.type == CPU else str(device)


def workers_and_block(device: str, threads: int | None = None, on_cpu: int | None = None) -> tuple[int, int]:
    """Return how many workers a device has use for, and how many elements each of them computes at once.

    ``threads`` are the workers that were asked for, if any; else ``on_cpu`` are those on the CPU, by default one
    for each core.
    """
    workers, block = (on_cpu or available_cores(), BLOCK) if device == CPU else (GPU_WORKERS, GPU_BLOCK)
    return threads or workers, block


def _check_inputs(plan: Plan) -> None:
    for checkpoint in plan.inputs:
        checkpoint.check_unchanged()


def _refuse_nonfinite(plan: Plan, workspaces: Mapping[int, OutputWorkspace]) -> None:
    found: dict[str, None] = {}
    for workspace in workspaces.values():
        for record in workspace.journal.records.values():
            job = plan.jobs[record.job]
            for number in record.bad:
                where = (
                    plan.inputs[job.models[number]].reference
                    if number >= 0
                    else f"the output ({job.dtype} can't hold the result)"
                )
                found[f"{job.name} in {where}"] = None
    if found:
        raise NonFiniteError(
            listing(f"NaN or infinity in {counted(len(found), 'tensor')}", sorted(found))
            + "\nNothing was published. If that is wanted, --resume --allow-nonfinite publishes what was made."
        )


def _reported(output: Path) -> Report:
    return Report.from_json(json.loads(manifest_path(output).read_bytes())["effect"])
