"""Verify an output in one call: what the command ``verify`` does, for Python."""

from __future__ import annotations

import random
import threading
import time
from collections.abc import Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Literal

from mergekit_lite._version import __version__
from mergekit_lite.engine.pool import available_cores
from mergekit_lite.engine.run import chosen_device, lanes_and_block
from mergekit_lite.engine.schedule import Progress
from mergekit_lite.errors import MergekitLiteError, UsageError, counted
from mergekit_lite.options import named_options
from mergekit_lite.output.workspace import is_single_file, manifest_path
from mergekit_lite.planning import Plan
from mergekit_lite.verification.inputs import Inputs, open_inputs, plan_again
from mergekit_lite.verification.manifest import Manifest, read_manifest
from mergekit_lite.verification.published import Published, check_digests, open_published
from mergekit_lite.verification.recompute import Recomputation
from mergekit_lite.verification.verdict import Finding, Verdict

SAMPLES = 8
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
) -> Verdict:
    """Check an output against its manifest, and make some of its tensors again from the inputs.

    Args:
        output: a folder or a single file that ``extrapolate`` or ``merge`` made.
        samples: how many tensors to make again; ``all``, or 0 to leave the inputs alone. By default 8, where the inputs
            are still there; a number that was asked for and can't be done is a finding.
        seed: of the choice of those tensors; by default another one each time.
        inputs: where models are now, by their references in the manifest.
        threads: workers; one for each core by default.
        device: for making tensors again, as for ``run``.
        progress: called with (bytes read, bytes in all), from the workers' threads.
        processes: fork the workers that make tensors again, as for ``run``.

    Raises:
        UsageError: there is no such output, or an input or device is named that isn't there.
        MergekitLiteError: there is no manifest, or it can't be used.
    """
    started = time.monotonic()
    path = Path(output).expanduser()
    if not path.exists() or path.is_dir() == is_single_file(path):
        raise UsageError(f"{path}: no such folder, or file of weights. Name an output of extrapolate or merge.")
    place = chosen_device(device)
    manifest, sealed = read_manifest(path)
    found = Inputs() if samples == 0 else open_inputs(manifest, inputs or {})
    published = open_published(path, manifest)
    findings = [] if sealed else [Finding(manifest_path(path).name, "was changed: it is not what its own digest says")]
    findings += [*published.findings, *found.findings]
    plan = None
    if samples != 0 and len(found.opened) == len(manifest.inputs):
        try:
            plan = plan_again(path, manifest, found.opened)
            findings += _of_plan(plan, manifest, published, found)
        except MergekitLiteError as error:
            findings.append(Finding("manifest", f"its recipe and inputs give no plan: {error}"))
    elif samples:
        findings += [Finding(gone, f"is needed to make tensors again: {why}") for gone, why in found.gone.items()]

    seed = random.SystemRandom().randrange(2**32) if seed is None else seed
    tally = _Tally(published.nbytes, progress)
    making = None
    if plan is not None:
        workers, block = lanes_and_block(place, threads)
        jobs = _chosen(plan, samples, seed)
        making = Recomputation(plan, manifest, jobs, place, workers, block, tally.recomputed, processes)
        tally.to_recompute = making.work.bytes_in_all
    findings += check_digests(published, manifest, threads or available_cores(), tally.read)
    if making is not None:
        findings += making.run()
    return Verdict(
        output=path,
        findings=tuple(findings),
        notes=tuple(_notes(manifest, making, bool(findings))),
        unchecked=tuple(_unchecked(found, making, samples)),
        tensors=len(published.tensors),
        nbytes=published.nbytes,
        recomputed=making.names if making is not None else (),
        seed=seed,
        seconds=time.monotonic() - started,
    )


def _chosen(plan: Plan, samples: Samples, seed: int) -> list[int]:
    """The indices of the jobs to do again."""
    jobs = len(plan.jobs)
    wanted = jobs if samples == "all" else min(SAMPLES if samples is None else samples, jobs)
    return random.Random(seed).sample(range(jobs), wanted)


def _of_plan(plan: Plan, manifest: Manifest, published: Published, found: Inputs) -> Iterator[Finding]:
    """What does not fit between the plan made again, the manifest and the output."""
    alike = manifest.version == __version__ and not found.findings and not found.renamed
    if alike and plan.digest(0) != manifest.plan:
        yield Finding("manifest", "its recipe and inputs give another plan than the one it names")
    for job in plan.jobs:
        spec = published.tensors.get(job.name)
        if spec is not None and (spec.dtype, spec.shape) != (job.dtype, job.shape):
            was, planned = (
                f"{dtype} {list(shape)}" for dtype, shape in ((spec.dtype, spec.shape), (job.dtype, job.shape))
            )
            yield Finding(spec.file.name, f"is {was}, the recipe makes it {planned}", job.name)
    for name in sorted(manifest.tensors.keys() - {job.name for job in plan.jobs}):
        yield Finding("manifest", "the recipe makes no such tensor", name)


def _notes(manifest: Manifest, making: Recomputation | None, wrong: bool) -> Iterator[str]:
    if making is not None and making.beyond:
        yield (
            "thresholds or coefficients span several tensors: "
            f"{counted(making.beyond, 'more tensor')} had to be read for their sums"
        )
    for what, before, now in (
        ("mergekit_lite", manifest.version, __version__),
        ("torch", manifest.torch, metadata.version("torch")),
    ):
        if before != now:
            suspect = ", and bytes that differ though the inputs are the same may come from that" if wrong else ""
            yield f"made with {what} {before}, this is {now}{suspect}"


def _unchecked(found: Inputs, making: Recomputation | None, samples: Samples) -> Iterator[str]:
    for reference, why in found.gone.items():
        yield f"the input {reference}: {why}. --input {reference}=PLACE tells where it is now"
    if making is None:
        yield "whether the inputs give this output" + (", as --samples 0 asks" if samples == 0 else "")


class _Tally:
    """Bytes read, for one progress over both steps."""

    def __init__(self, to_read: int, progress: Progress | None) -> None:
        self.to_read = to_read
        self.to_recompute = 0
        self.progress = progress
        self._read = 0
        self._lock = threading.Lock()

    def read(self, nbytes: int) -> None:
        """Bytes of the output were read."""
        with self._lock:
            self._read += nbytes
            self._tell(self._read, self.to_read + self.to_recompute)

    def recomputed(self, done: int, in_all: int) -> None:
        """Bytes of the inputs were read."""
        self._tell(self.to_read + done, self.to_read + in_all)

    def _tell(self, done: int, in_all: int) -> None:
        if self.progress is not None:
            self.progress(done, in_all)
