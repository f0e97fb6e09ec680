"""A search in words, as ``--dry-run`` shows it and its report."""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lite.boosting.measure import nulls, opponent
from mergekit_lite.errors import counted

if TYPE_CHECKING:
    from mergekit_lite.boosting.request import Prepared, Request
    from mergekit_lite.planning import Plan


def described(prepared: Prepared) -> dict[str, str]:
    """Describe a search in words: models, tuned parameters, search, scores, data."""
    request = prepared.request
    plan = prepared.family.plan(prepared.family.baseline, request.output)
    data = {"prompt": prepared.prompts, "pair": prepared.pairs, "text": prepared.texts}
    facts = {
        "models": ", ".join(prepared.family.opened),
        "recipe": str(request.recipe or ""),
        "tuned": ", ".join(f"{name} from {of.low:g} to {of.high:g}" for name, of in prepared.family.ranges.items()),
        "search": prepared.search,
        "scores": ", ".join(request.scores),
        "measured on": ", ".join(counted(len(rows), kind) for kind, rows in data.items() if rows),
        "answers": _answers_described(request) if prepared.prompts else "",
        "opponent": opponent.described(prepared.opponent) if prepared.opponent is not None else "",
        "null test of the judge": nulls.described(prepared.scores),
        "dtype": ", ".join(sorted({job.dtype for job in plan.merged})),
        "rounding": plan.rounding,
        "device": ", ".join(dict.fromkeys(prepared.devices)),
        "measured by": _team_described(prepared, plan),
        "seed": str(request.seed),
    }
    return {name: text for name, text in facts.items() if text}


def _team_described(prepared: Prepared, plan: Plan) -> str:
    number = len(prepared.devices)
    if prepared.request.ray is not None:
        return _cluster_described(prepared, plan)
    if prepared.threads is None:
        return ""
    if prepared.request.serve_command is not None:
        return (
            f"{number} processes, each with {counted(prepared.request.servers, 'server')} over a candidate of its own"
        )
    weights = f"{number} × {plan.bytes_to_write / 1e9:.2f} GB of weights"
    return f"{number} processes with {counted(prepared.threads, 'thread')} and a model each: {weights}"


def _cluster_described(prepared: Prepared, plan: Plan) -> str:
    request = prepared.request
    each = "processor" if request.device == "cpu" else "GPU"
    most = f", {request.parallel:,} at most" if request.parallel is not None else ""
    served = request.serve_command is not None
    has = counted(request.servers, "server") if served else f"a model: {plan.bytes_to_write / 1e9:.2f} GB of weights"
    return f"a worker for each {each} of the Ray cluster {request.ray}{most}, each with {has}"


def _answers_described(request: Request) -> str:
    sampling = request.sampling
    drawn = "greedy" if sampling.temperature == 0 else f"temperature {sampling.temperature:g}, top-p {sampling.top_p:g}"
    by = f"by {request.serve_command}" if request.serve_command else "in process"
    return f"{request.samples} each, {drawn}, at most {sampling.max_tokens:,} tokens, {by}"
