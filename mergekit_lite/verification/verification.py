"""Verification of an output: its files, its inputs, its plan, and some tensors made again."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

from mergekit_lite._version import __version__
from mergekit_lite.checkpoint.stores.addresses import is_elsewhere
from mergekit_lite.checkpoint.stores.mirror import stand_up
from mergekit_lite.engine.pool import available_cores
from mergekit_lite.engine.ray_cluster import devices_of, files_of, workers_of
from mergekit_lite.engine.ray_machine import File
from mergekit_lite.engine.ray_workers import Cluster
from mergekit_lite.engine.schedule import Progress
from mergekit_lite.errors import MergekitLiteError, UsageError, counted
from mergekit_lite.layout import is_single_file
from mergekit_lite.options import named_options
from mergekit_lite.output.workspace import manifest_path
from mergekit_lite.planning import Plan
from mergekit_lite.verification.inputs import OpenedInputs, open_inputs, plan_again
from mergekit_lite.verification.manifest_schema import Manifest, read_manifest
from mergekit_lite.verification.output_files import OpenedOutput, check_digests, open_output
from mergekit_lite.verification.recomputation import Recomputation
from mergekit_lite.verification.result import Finding, Verification

DEFAULT_SAMPLES = 8
Samples = int | Literal["all"] | None


@named_options
def verify(
    output: str | Path,
    *,
    samples: Samples = None,
    seed: int | None = None,
    inputs: Mapping[str, str] | None = None,
    threads: int | None = None,
    device: str = "cpu",
    progress: Progress | None = None,
    processes: bool = False,
    ray: str | Cluster | None = None,
) -> Verification:
    """Check an output against its manifest, and make some of its tensors again from the inputs.

    Args:
        output: a folder or a single file that ``extrapolate`` or ``merge`` made.
        samples: number of tensors to make again, or ``all``; 0 opens no input. By default 8 if the inputs can be
            opened; it is a finding where they can't and a number was asked for.
        seed: of the choice of these tensors; by default another one each time.
        inputs: where models are now, by their references in the manifest.
        threads: number of workers; one for each core by default.
        device: for making tensors again, as for ``run``.
        progress: called with (bytes read, bytes in all), from the workers' threads.
        processes: fork the workers that make tensors again, as for ``run``.
        ray: work on the machines of a Ray cluster, as for ``run``.

    Raises:
        UsageError: there is no such output, or an input or device is named that isn't there.
        MergekitLiteError: there is no manifest, or it can't be used.
    """
    started = time.monotonic()
    path = stand_up(str(output))[0] if is_elsewhere(str(output)) else Path(output).expanduser()
    if not path.exists() or path.is_dir() == is_single_file(path):
        raise UsageError(f"{path}: no such folder, or file of weights. Name an output of extrapolate or merge.")
    devices = devices_of(ray, device)
    manifest, sealed = read_manifest(path)
    opened = OpenedInputs() if samples == 0 else open_inputs(manifest, inputs or {})
    written = open_output(path, manifest)
    findings = [] if sealed else [Finding(manifest_path(path).name, "was changed: it is not what its own digest says")]
    findings += [*written.findings, *opened.findings]
    plan, why = None, ""
    if samples != 0 and len(opened.opened) == len(manifest.models):
        try:
            again = plan_again(path, manifest, opened.opened, written.tensors)
            plan, why = again.plan, again.why
            findings += _check_plan(again.as_made, manifest, written, opened)
            if samples and why:
                findings.append(Finding("manifest", f"tensors can't be made again without what lay between: {why}"))
        except MergekitLiteError as error:
            findings.append(Finding("manifest", f"its recipe and inputs give no plan: {error}"))
    elif samples:
        findings += [Finding(gone, f"is needed to make tensors again: {why}") for gone, why in opened.gone.items()]

    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    total_progress = _TotalProgress(written.nbytes, progress)
    recomputation = None
    with workers_of(ray, device, threads) as crew:
        if plan is not None:
            jobs = _chosen(plan, samples, seed)
            advance = total_progress.recomputed
            recomputation = Recomputation(
                plan, manifest, written.tensors, jobs, devices, threads, advance, processes, crew
            )
            total_progress.to_recompute = recomputation.schedule.bytes_in_all
        if crew is not None and not crew.local:
            crew.must_see([*files_of(opened.opened.values()), *_files_of_output(written)])
        findings += check_digests(written, manifest, threads or available_cores(), total_progress.read, crew)
        if recomputation is not None:
            findings += recomputation.run()
    return Verification(
        output=path,
        findings=tuple(findings),
        notes=(*written.notes, *_notes(manifest, recomputation, bool(findings))),
        unchecked=tuple(_unchecked(opened, recomputation, samples, why)),
        tensors=len(written.tensors),
        nbytes=written.nbytes,
        recomputed=recomputation.names if recomputation is not None else (),
        seed=seed,
        seconds=time.monotonic() - started,
    )


def _files_of_output(output: OpenedOutput) -> list[File]:
    """Return the weight files of an output, as machines have to see them."""
    files = {spec.file: spec.file.stat() for spec in output.tensors.values()}
    return [(str(path), status.st_size, status.st_mtime_ns) for path, status in files.items()]


def _chosen(plan: Plan, samples: Samples, seed: int) -> list[int]:
    """Choose the indices of the jobs to do again."""
    jobs = len(plan.jobs)
    wanted = jobs if samples == "all" else min(DEFAULT_SAMPLES if samples is None else samples, jobs)
    return random.Random(seed).sample(range(jobs), wanted)


def _check_plan(plan: Plan, manifest: Manifest, output: OpenedOutput, inputs: OpenedInputs) -> Iterator[Finding]:
    """Yield what doesn't fit between the plan that was made again, the manifest and the output."""
    comparable = manifest.version == __version__ and not inputs.findings and not inputs.renamed
    if comparable and plan.digest(0) != manifest.plan:
        yield Finding("manifest", "its recipe and inputs give another plan than the one it names")
    for job in plan.jobs:
        spec = output.tensors.get(job.name)
        if spec is not None and (spec.dtype, spec.shape) != (job.dtype, job.shape):
            was, planned = (
                f"{dtype} {list(shape)}" for dtype, shape in ((spec.dtype, spec.shape), (job.dtype, job.shape))
            )
            yield Finding(spec.file.name, f"is {was}, the recipe makes it {planned}", job.name)
    for name in sorted(manifest.tensors.keys() - {job.name for job in plan.jobs}):
        yield Finding("manifest", "the recipe makes no such tensor", name)


def _notes(manifest: Manifest, recomputation: Recomputation | None, wrong: bool) -> Iterator[str]:
    """Yield facts that may explain a fault, or that the user should know."""
    if recomputation is not None and recomputation.also_read:
        yield (
            "thresholds or coefficients span several tensors: "
            f"{counted(recomputation.also_read, 'more tensor')} had to be read for their sums"
        )
    if recomputation is not None and (differ := recomputation.differs_in_last_bits):
        yield (
            f"made on {manifest.device}, made again on {recomputation.device}: {counted(differ, 'element')} differ, as "
            "sums of floats depend on the order in which a device adds"
        )
    for what, before, now in (
        ("mergekit_lite", manifest.version, __version__),
        ("torch", manifest.torch, metadata.version("torch")),
    ):
        if before != now:
            suspect = ", and bytes that differ though the inputs are the same may come from that" if wrong else ""
            yield f"made with {what} {before}, this is {now}{suspect}"


def _unchecked(inputs: OpenedInputs, recomputation: Recomputation | None, samples: Samples, why: str) -> Iterator[str]:
    """Yield what could not be checked, and why."""
    for reference, why in inputs.gone.items():
        yield f"the input {reference}: {why}. --input {reference}=PLACE tells where it is now"
    if recomputation is None:
        reason = ", as --samples 0 asks" if samples == 0 else f": {why}" if why else ""
        yield f"whether the inputs give this output{reason}"


class _TotalProgress:
    """One progress over both steps: bytes of the output, then bytes of the inputs."""

    def __init__(self, to_read: int, progress: Progress | None) -> None:
        self.to_read = to_read
        self.to_recompute = 0
        self.progress = progress
        self._read = 0
        self._lock = threading.Lock()

    def read(self, nbytes: int) -> None:
        """Count bytes of the output that were read."""
        with self._lock:
            self._read += nbytes
            self._report(self._read, self.to_read + self.to_recompute)

    def recomputed(self, done: int, in_all: int) -> None:
        """Report how many bytes of the inputs were read."""
        self._report(self.to_read + done, self.to_read + in_all)

    def _report(self, done: int, in_all: int) -> None:
        if self.progress is not None:
            self.progress(done, in_all)
