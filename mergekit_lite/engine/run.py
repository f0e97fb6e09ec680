"""Run a plan: take the working folders, let the workers fill them, and publish what they made."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, TypedDict

from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.devices import kind_of
from mergekit_lite.engine.finished import is_finished, may_be_finished
from mergekit_lite.engine.pool import Workers, available_cores, writing_workers
from mergekit_lite.engine.ray_cluster import devices_of, workers_of
from mergekit_lite.engine.ray_workers import Cluster
from mergekit_lite.engine.remote import jobs_left, opened_workspace
from mergekit_lite.engine.report import Report, TensorDigests, report
from mergekit_lite.engine.schedule import Progress, Schedule
from mergekit_lite.engine.tiling import BLOCK, GRAIN
from mergekit_lite.errors import NonFiniteError, UsageError, counted, listing
from mergekit_lite.layout import OutputPath
from mergekit_lite.object_stores import Place
from mergekit_lite.options import named_options
from mergekit_lite.output.companions import write_companions
from mergekit_lite.output.file_writer import waiting_weight
from mergekit_lite.output.publishing import check_target
from mergekit_lite.output.remote_target import check_remote_target, remote_manifest
from mergekit_lite.output.remote_workspace import RemoteWorkspace
from mergekit_lite.output.working_folder import as_run_errors
from mergekit_lite.output.workspace import OutputWorkspace, manifest_path
from mergekit_lite.planning import Plan

if TYPE_CHECKING:
    from typing_extensions import Unpack

GPU_WORKERS = 6
GPU_BLOCK = 1 << 22


@dataclass(frozen=True)
class Finished:
    """The outputs of a run, in the order of the plan's: a path or the URL of an object store, and a report for each."""

    outputs: tuple[Path | str, ...]
    reports: tuple[Report, ...]
    seconds: float


class RunOptions(TypedDict, total=False):
    """How a plan is run: the options of ``run``, and of every function that plans and runs in one call.

    Attributes:
        threads: workers; by default one more than there are cores, or enough to keep a GPU's copies going.
        device: ``cpu`` (the default), ``cuda``, ``cuda:1`` …, ``cuda:all`` (every GPU) or ``auto`` (a GPU where one is
            there).
        block: elements read, computed and written at once, rounded up to whole grains; changes no byte of the output.
        resume: go on with what an earlier run of the same plan left.
        force: replace existing outputs, and drop what an earlier run left unless ``resume`` is set too.
        sync: bring each output to the disk before it gets its name, and its name after, so that a power cut can't undo
            or damage what was published; takes as long as the disk takes to write the output.
        allow_nonfinite: publish even where weights are NaN or infinite.
        progress: called with (bytes read, bytes in all) after each span, or some small ones.
        processes: fork the workers (CPU, Linux) instead of starting threads: faster, as they don't share Python's lock,
            and safe where this process has no threads of its own that hold locks.
        ray: work on the machines of a Ray cluster: ``auto``, ``HOST:PORT``, ``local:N``, or one that is connected. They
            share the file systems of inputs and outputs, or reach the object stores; ``device`` is ``cpu`` or ``cuda``,
            for all GPUs they have.
    """

    threads: int | None
    device: str
    block: int | None
    resume: bool
    force: bool
    sync: bool
    allow_nonfinite: bool
    progress: Progress | None
    processes: bool
    ray: str | Cluster | None


@named_options
def run(plan: Plan, **options: Unpack[RunOptions]) -> Finished:
    """Carry out a plan.

    Args:
        plan: from ``plan_extrapolation``, ``plan_merge`` or another of the planning functions.
        **options: see ``RunOptions``.

    Returns:
        The outputs' paths, a report for each of them, and the seconds it took.

    Raises:
        UsageError: an output exists, or lies in an input; the device or the cluster is not there.
        CheckpointError: an input changed since it was planned.
        RunError: reading or writing failed; the journal is kept for ``resume``.
        NonFiniteError: weights are NaN or infinite; everything is kept for ``resume`` with ``allow_nonfinite``.
    """
    started = time.monotonic()
    resume, force, sync = (options.get("resume", False), options.get("force", False), options.get("sync", False))
    ray, device = options.get("ray"), options.get("device", CPU)
    devices = devices_of(ray, device)
    workers, usual_block = workers_and_block(devices, options.get("threads"), writing_workers())
    block = -(-(options.get("block") or usual_block) // GRAIN) * GRAIN
    check_outputs(plan, resume=resume, force=force)
    finished = [resume and is_finished(plan, v, force=force, sync=sync) for v in range(len(plan.outputs))]
    _check_targets(plan, finished, resume=resume, force=force)
    unfinished = [v for v, done in enumerate(finished) if not done]
    made: dict[int, Report] = {}
    with ExitStack() as stack:
        crew = stack.enter_context(workers_of(ray, device, options.get("threads"))) if unfinished else None
        workspaces: dict[int, OutputWorkspace] = {}
        for v in unfinished:
            workspaces[v] = opened_workspace(plan, v, stack, resume=resume, force=force, crew=crew is not None)
            stack.callback(workspaces[v].close)
            workspaces[v].weigh_waiting(waiting_weight(workers, available_cores()))
        _check_inputs(plan)
        left = jobs_left(plan, workspaces.values())
        if crew is not None and not crew.local:
            crew.must_see(plan.input_files, [_shared(workspace) for workspace in workspaces.values()])
        team = Workers(workers, devices, block, options.get("processes", False), crew)
        Schedule(plan, workspaces, team, options.get("progress"), left).run()
        _check_inputs(plan)
        if not options.get("allow_nonfinite", False):
            _refuse_nonfinite(plan, workspaces)
        for v, workspace in workspaces.items():
            made[v] = report(plan, v, workspace.journal)
            digests = TensorDigests(plan, workspace.journal)
            with workspace.adding_companions() as folder_of_result:
                write_companions(plan, v, folder_of_result, kind_of(devices[0]), made[v].to_json(), digests)
            workspace.publish(force=force, sync=sync)
    reports = tuple(made.get(v) or _reported(output) for v, output in enumerate(plan.outputs))
    outputs = tuple(str(output) if isinstance(output, Place) else output for output in plan.outputs)
    return Finished(outputs, reports, time.monotonic() - started)


def found(plan: Plan, *, force: bool = False, sync: bool = False) -> Finished | None:
    """Return what ``run`` with ``resume`` would where all outputs stand already; the inputs need not be there.

    Raises RunError where what a kill kept from being done can't be finished.
    """
    started = time.monotonic()
    if not all(is_finished(plan, number, force=force, sync=sync) for number in range(len(plan.outputs))):
        return None
    outputs = tuple(str(output) if isinstance(output, Place) else output for output in plan.outputs)
    return Finished(outputs, tuple(map(_reported, plan.outputs)), time.monotonic() - started)


def _shared(workspace: OutputWorkspace) -> tuple[str, str]:
    """Let other machines write to a workspace, and return the mark by which they know it."""
    if isinstance(workspace, RemoteWorkspace):
        return workspace.mark
    workspace.share()
    with as_run_errors(workspace.folder.path):
        return workspace.folder.marked(os.urandom(16).hex())


def check_outputs(plan: Plan, *, resume: bool = False, force: bool = False) -> None:
    """Raise UsageError where an output path is in an input, or exists already.

    An output that its manifest calls the plan's own passes: reading all of it is left to ``run``.
    """
    if len(set(plan.outputs)) < len(plan.outputs):
        raise UsageError("Two outputs have the same path. Put {alpha} in the name: -o out-{alpha}.")
    likely = [resume and may_be_finished(plan, v) for v in range(len(plan.outputs))]
    _check_targets(plan, likely, resume=resume, force=force)


def _check_targets(plan: Plan, finished: Sequence[bool], *, resume: bool, force: bool) -> None:
    sources = [path for checkpoint in plan.inputs for path in checkpoint.paths]
    references = [checkpoint.base_reference for checkpoint in plan.inputs]
    for output, done in zip(plan.outputs, finished, strict=True):
        if done:
            continue
        if isinstance(output, Place):
            check_remote_target(output, [*sources, *references], resume=resume, force=force)
        else:
            check_target(output, sources, resume=resume, force=force)


def workers_and_block(devices: Sequence[str], threads: int | None = None, on_cpu: int | None = None) -> tuple[int, int]:
    """Return how many workers some devices have use for, and how many elements each of them computes at once.

    ``threads`` are the workers that were asked for, if any; else ``on_cpu`` are those on the CPU, by default one
    for each core.
    """
    if CPU in devices:
        return threads or on_cpu or available_cores(), BLOCK
    return threads or GPU_WORKERS * len(devices), GPU_BLOCK


def _check_inputs(plan: Plan) -> None:
    for checkpoint in plan.inputs:
        checkpoint.check_unchanged()


def _refuse_nonfinite(plan: Plan, workspaces: Mapping[int, OutputWorkspace]) -> None:
    found: dict[str, None] = {}
    for workspace in workspaces.values():
        for key in workspace.journal.bad:
            record = workspace.journal[key]
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
            + "\nNothing was published; what was made is kept. If that is wanted, --resume --allow-nonfinite publishes "
            "it. Another recipe for this output needs --force, which throws it away."
        )


def _reported(output: OutputPath) -> Report:
    if isinstance(output, Place):
        return Report.from_json((remote_manifest(output) or {})["effect"])
    return Report.from_json(json.loads(manifest_path(output).read_bytes())["effect"])
