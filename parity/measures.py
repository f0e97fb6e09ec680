"""Distances between two outputs."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parity.both import State


@dataclass(frozen=True)
class Apart:
    """Two outputs compared, element by element.

    Attributes:
        equal: share of the elements that are equal, bit by bit.
        most: the largest difference, in units of the last place (see ``unit``).
        mean: the mean difference, likewise.
        beyond: elements that are further apart than is allowed; ``unexplained`` of them are not at a border.
        names: tensors that only one of the outputs has.
    """

    equal: float
    most: float
    mean: float
    beyond: int
    unexplained: int
    names: tuple[str, ...] = ()


def apart(ours: State, theirs: State, dtype: torch.dtype, allowed: float, borders: State | None = None) -> Apart:
    """Compare after rounding both to ``dtype``; elements at ``borders`` may be anything."""
    equal, total, sums, most, beyond, unexplained = 0, 0, 0.0, 0.0, 0, 0
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = (state[name].to(dtype) for state in (ours, theirs))
        same = (a == b) | (a.isnan() & b.isnan())
        difference = ((a.double() - b.double()).abs() / unit(b)).nan_to_num(nan=torch.inf).masked_fill(same, 0)
        far = difference > allowed
        equal += int(same.sum())
        total += a.numel()
        sums += float(difference.sum())
        most = max(most, float(difference.max()))
        beyond += int(far.sum())
        unexplained += int((far & ~borders[name]).sum() if borders else far.sum())
    return Apart(equal / total, most, sums / total, beyond, unexplained, tuple(sorted(ours.keys() ^ theirs.keys())))


def unit(tensor: torch.Tensor) -> torch.Tensor:
    """Return the spacing of the dtype at each element, but at least that at the tensor's rms.

    The last place of an element that happens to be nearly zero says nothing: errors are those of its terms.
    """
    wide = tensor.double()
    size = wide.abs().clamp(min=float(wide.square().mean().sqrt()) or 1e-30)
    return torch.exp2(size.log2().floor()) * torch.finfo(tensor.dtype).eps


def statistics(merged: State, base: State) -> tuple[float, float]:
    """Return the share of elements that a random method changes, and the mean size of the changes."""
    moved = [(merged[name].double() - base[name].double()).abs() for name in merged]
    changed, total = sum(int((one > 0).sum()) for one in moved), sum(one.numel() for one in moved)
    return changed / total, float(sum(one.sum() for one in moved)) / total
