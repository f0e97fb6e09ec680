"""How far two outputs are apart."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from parity.both import State


@dataclass(frozen=True)
class Apart:
    """Two models compared, element by element.

    Attributes:
        equal: share of the elements that are equal, bit by bit.
        most: the largest difference, in units of the last place (see ``unit``).
        mean: the mean difference, likewise.
        where: the tensor with the largest difference.
        names: tensors that only one of them has.
    """

    equal: float
    most: float
    mean: float
    where: str
    names: tuple[str, ...] = ()


def apart(ours: State, theirs: State, dtype: torch.dtype) -> Apart:
    """Compare after rounding both to ``dtype``."""
    equal, total, sums, most, where = 0, 0, 0.0, 0.0, ""
    for name in sorted(ours.keys() & theirs.keys()):
        a, b = (state[name].to(dtype) for state in (ours, theirs))
        difference = (a.double() - b.double()).abs() / unit(b)
        difference.nan_to_num_(nan=float("inf")).masked_fill_((a == b) | (a.isnan() & b.isnan()), 0)
        equal += int((difference == 0).sum())
        total += a.numel()
        sums += float(difference.sum())
        if (largest := float(difference.max())) > most:
            most, where = largest, name
    return Apart(equal / total, most, sums / total, where, tuple(sorted(ours.keys() ^ theirs.keys())))


def unit(tensor: torch.Tensor) -> torch.Tensor:
    """The spacing of the dtype at each element, but at least that at a thousandth of the tensor's rms.

    A result that is zero but for the errors of its terms has no last place worth the name.
    """
    wide = tensor.double()
    size = wide.abs().clamp(min=1e-3 * float(wide.square().mean().sqrt()) or 1e-30)
    return torch.exp2(size.log2().floor()) * torch.finfo(tensor.dtype).eps


def statistics(merged: State, base: State) -> tuple[float, float]:
    """Of a random method: the share of elements that left the base, and the mean distance that they went."""
    moved = [(merged[name].double() - base[name].double()).abs() for name in merged]
    changed, total = sum(int((one > 0).sum()) for one in moved), sum(one.numel() for one in moved)
    return changed / total, float(sum(one.sum() for one in moved)) / total
