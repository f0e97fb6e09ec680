"""FuseChat's own formulas, naive, on whole tensors, in float64: what its authors' code computes, without its rounding.

SCE as in their fork of mergekit: the elements that vary most serve the coefficients only, all changes are merged, and
divided by the coefficients of those that agree with the elected sign (arXiv 2408.07990; its Algorithm 1 merges the
selected ones and doesn't divide). VaRM as equation 7 of arXiv 2402.16107, by matrices.
"""

from __future__ import annotations

from pathlib import Path

import torch

from parity.both import State, tensors_in
from parity.recipes import Yaml


def by_formulas(body: Yaml) -> State:
    """Return a recipe's merge by the published formulas."""
    base = tensors_in(Path(body["base_model"]))
    tuned = [tensors_in(Path(entry["model"])) for entry in body["models"] if entry["model"] != body["base_model"]]
    parameters = body.get("parameters", {})
    merged: State = {}
    for name, start in base.items():
        deltas = torch.stack([state[name].double() - start.double() for state in tuned])
        change = _sce(deltas, parameters.get("select_topk", 1.0)) if body["merge_method"] == "sce" else _varm(deltas)
        merged[name] = start.double() + change
    return merged


def _sce(deltas: torch.Tensor, select_topk: float) -> torch.Tensor:
    selected = deltas
    if select_topk < 1:
        variance = deltas.var(0, unbiased=False).masked_fill((deltas == deltas[0]).all(0), 0)
        order = variance.flatten().argsort(descending=True, stable=True)
        mask = torch.zeros(variance.numel(), dtype=torch.float64)
        mask[order[: int(select_topk * int((variance > 0).sum()))]] = 1
        selected = deltas * mask.view(variance.shape)
    coefficients = _shares(selected)
    majority = torch.where(deltas.sum(0) >= 0, 1.0, -1.0)
    kept = coefficients * (deltas.sign() == majority)
    divisor = kept.sum(0)
    return (kept * deltas).sum(0) / divisor.masked_fill(divisor == 0, 1)


def _varm(deltas: torch.Tensor) -> torch.Tensor:
    return (_shares(deltas) * deltas).sum(0)


def _shares(deltas: torch.Tensor) -> torch.Tensor:
    """Each model's share of all squared change; even where there is none."""
    squares = deltas.square().flatten(1).sum(1)
    shares = squares / squares.sum() if squares.sum() > 0 else torch.full_like(squares, 1 / len(squares))
    return shares.view(-1, *[1] * (deltas.dim() - 1))
