"""Plans and results as plain data, for ``--json`` and for the tables."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from mergekit_lite.checkpoint.stores.ranges import TRAFFIC
from mergekit_lite.commands.prediction import not_predicted
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.fetching import fetches
from mergekit_lite.engine.memory import memory_estimate
from mergekit_lite.engine.pool import writing_workers
from mergekit_lite.engine.remote import spool_bytes
from mergekit_lite.output.companions import companions, what_is_missing
from mergekit_lite.planning.statistics import is_averaged

if TYPE_CHECKING:
    from mergekit_lite.engine.ray_workers import Cluster
    from mergekit_lite.engine.run import Finished
    from mergekit_lite.planning import Job, Plan
    from mergekit_lite.prediction import Prediction


def of_plan(
    plan: Plan, threads: int | None, devices: Sequence[str] = (CPU,), prediction: Prediction | None = None
) -> dict[str, Any]:
    """Return everything that the plan decides, with what it takes on some devices, and is predicted to take."""
    copied, not_copied = companions(plan)
    return {
        "inputs": [
            {
                "reference": source.reference,
                "tensors": len(source.tensors),
                "bytes": sum(spec.nbytes for spec in source.tensors.values()),
            }
            for source in plan.inputs
        ],
        "outputs": [str(output) for output in plan.outputs],
        "files": [{"name": file.name, "bytes": file.size} for file in plan.layout.files],
        "bytes_to_read": plan.bytes_to_read,
        "bytes_to_write": plan.bytes_to_write,
        "memory": memory_estimate(plan, threads, devices),
        "spool": spool_bytes(plan, threads or writing_workers()),
        **({} if prediction is None else {"prediction": prediction.to_json()}),
        **({} if (why := not_predicted(plan)) is None else {"not_predicted": why}),
        "tensors": [_of_job(plan, job) for job in plan.jobs],
        "left_out": [{"model": model, "name": name, "why": why} for model, name, why in plan.left_out],
        "beside": {"copied": sorted(copied), "not_copied": not_copied},
        "missing": what_is_missing(plan),
        "notes": list(plan.notes),
        **({"to_fetch": to_fetch._asdict()} if (to_fetch := fetches(plan)).bytes else {}),
    }


def with_fetched(content: dict[str, Any]) -> dict[str, Any]:
    """Return a command's result with what was fetched for it, if anything was."""
    return content | {"fetched": TRAFFIC.as_json()} if TRAFFIC.requests else content


def of_finished(finished: Finished) -> dict[str, Any]:
    """Return the outputs of a run with their reports."""
    pairs = zip(finished.outputs, finished.reports, strict=True)
    return {
        "seconds": round(finished.seconds, 3),
        "outputs": [{"path": str(output), **report.to_json()} for output, report in pairs],
    }


def of_nodes(crew: Cluster | None) -> dict[str, Any]:
    """Return what each machine of a Ray cluster did; nothing where there is none."""
    return {} if crew is None else {"nodes": [node.to_json() for node in crew.nodes.values()]}


def what_happens(plan: Plan, job: Job) -> str:
    """Return one job in a few words: ``expo alpha 0.3``, ``copy (int64 is not for arithmetic)``."""
    if job.scales_of:
        return f"scales of {job.scales_of}"
    if not job.merged_elements:
        return f"copy ({job.why})" if job.why else "copy"
    numbers = " | ".join(", ".join(f"{k} {shown(v)}" for k, v in values.items()) for values in job.parameters)
    averaged = ", no statistics: averaged" if is_averaged(job) else ""
    return f"{job.method} {numbers}{averaged}" + (", new rows copied" if job.merged_elements < job.numel else "")


def shown(value: Any) -> str:
    """Return a parameter's value as text: one number, or one for each model."""
    if isinstance(value, tuple):
        return "/".join(map(shown, value))
    return f"{value:g}" if isinstance(value, float) else str(value).lower() if isinstance(value, bool) else str(value)


def _of_job(plan: Plan, job: Job) -> dict[str, Any]:
    return {
        "name": job.name,
        "shape": list(job.shape),
        "dtype": job.dtype,
        "method": job.method or "copy",
        "why": job.why,
        "parameters": [dict(parameters) for parameters in job.parameters],
        "copied_elements": job.numel - job.merged_elements,
    }
