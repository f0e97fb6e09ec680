"""Elements that a hair decides: as large as the smallest that are kept, or in an election that ends level.

Which of several equal magnitudes is kept, and which sign wins a draw, is a matter of each tool's last bit. Everything
is found here from the formulas, in float64, on whole tensors.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from parity.both import State, tensors_in

HAIR = 1e-6
ELECTED = ("ties", "breadcrumbs_ties", "dare_ties", "della", "sce")


def borders(plan: Any) -> State:
    """For each tensor of a plan: which of its elements are at a border."""
    found: State = {}
    states = [tensors_in(Path(source.reference)) for source in plan.inputs]
    for job in plan.jobs:
        parameters = job.parameters[0] if job.parameters else {}
        if not job.has_base:
            found[job.name] = torch.zeros(job.shape, dtype=torch.bool)
            continue
        *models, base = [states[model][spec.name].double() for model, spec in zip(job.models, job.inputs, strict=True)]
        found[job.name] = _of_tensor(job.method, parameters, base, [model - base for model in models], models)
    return found


def _of_tensor(
    method: str, parameters: Any, base: torch.Tensor, deltas: list[torch.Tensor], models: list[torch.Tensor]
) -> torch.Tensor:
    border = torch.zeros(base.shape, dtype=torch.bool)
    total = base.numel()
    if method == "arcee_fusion":
        scores = _scores(base, models[0])
        ranked = scores.flatten().sort().values
        first, median, third = (ranked[int(share * (total - 1))] for share in (0.25, 0.5, 0.75))
        return _near(scores, median + 1.5 * (third - first))
    if method == "sce" and parameters["select_topk"] < 1 and parameters["variant"] != "fusechat":
        variance = torch.stack(deltas).var(0, unbiased=False)
        kept = int(parameters["select_topk"] * int((variance > 0).sum()))
        edge = _kth_largest(variance, kept)
        border |= _near(variance, edge)
        deltas = [delta * (variance >= edge) for delta in deltas]
    for number, density in enumerate(parameters.get("density", ())):
        if density >= 1 or method not in ("ties", "breadcrumbs", "breadcrumbs_ties"):
            continue
        size = deltas[number].abs()
        kept, outliers = int(density * total), 0
        if "gamma" in parameters:
            outliers = int(parameters["gamma"][number] * total)
            border |= _near(size, _kth_largest(size, outliers))
        edge = _kth_largest(size, min(total, kept + outliers))
        border |= _near(size, edge)
        deltas[number] = deltas[number] * (size >= edge) * (size < _kth_largest(size, outliers))
    if method in ELECTED:
        weights = parameters.get("weight", (1.0,) * len(deltas))
        votes = torch.stack([delta * weight for delta, weight in zip(deltas, weights, strict=True)])
        border |= (votes.sum(0).abs() <= HAIR * votes.abs().sum(0)) & (votes != 0).any(0)
    return border


def _scores(base: torch.Tensor, model: torch.Tensor) -> torch.Tensor:
    p, q = (tensor.softmax(-1) + 1e-8 for tensor in (model, base))
    return (model - base).abs() * (p * (p / q).log()).sum(-1, keepdim=True)


def _kth_largest(size: torch.Tensor, k: int) -> torch.Tensor:
    """Return the k-th largest; infinity for k = 0."""
    return size.flatten().kthvalue(size.numel() - k + 1).values if k > 0 else torch.tensor(torch.inf)


def _near(size: torch.Tensor, edge: torch.Tensor) -> torch.Tensor:
    return (size - edge).abs() <= HAIR * edge
