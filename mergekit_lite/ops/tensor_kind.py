"""What a backend has to know of the tensor it works on."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class TensorKind:
    """One tensor's inputs and output.

    Attributes:
        dtypes: of the inputs, and of the output where there is one.
        elements: how many it has.
        row: the length of the rows that blocks don't split and functions of methods see; 0 where blocks are 1-D.
        rounding_key: of the draws for stochastic rounding (``draws.stream_key``); None rounds to nearest.
    """

    dtypes: tuple[str, ...]
    elements: int = 0
    row: int = 0
    rounding_key: int | None = None
