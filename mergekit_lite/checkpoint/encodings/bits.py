"""Codes of a few bits, packed one after another from the lowest bit of the first byte on."""

from __future__ import annotations

from functools import lru_cache

from mergekit_lite.deferred import torch

TOGETHER = 8  # codes that fill whole bytes, whatever their bits


def unpacked(stored: torch.Tensor, bits: int) -> torch.Tensor:
    """Return the codes (…, 8·n), uint8, of rows of bytes (…, bits·n), uint8."""
    rows = stored.shape[:-1]
    if bits == 8:
        return stored
    if TOGETHER % bits == 0:
        return looked_up(_codes_of_bytes(bits), stored).view(*rows, -1)
    # Eight codes as one number, of which each is a run of bits.
    parts = stored.view(*rows, -1, bits).to(torch.int64) << 8 * torch.arange(bits)
    runs = parts.sum(-1, keepdim=True) >> bits * torch.arange(TOGETHER)
    return runs.bitwise_and_((1 << bits) - 1).to(torch.uint8).view(*rows, -1)


def looked_up(table: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """Return the row of a table (256, values) for each byte: (bytes · values), of the table's dtype.

    A row is fetched as one number, which is several times as fast as value by value; it has at most eight bytes.
    """
    row = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}[table.shape[1] * table.element_size()]
    rows = torch.index_select(table.view(row).view(-1), 0, stored.reshape(-1).to(torch.int32))
    return rows.view(table.dtype)


@lru_cache
def _codes_of_bytes(bits: int) -> torch.Tensor:
    """Return the codes that each byte holds: (256, 8 / bits), uint8."""
    shifts = torch.arange(0, 8, bits)
    return (torch.arange(256)[:, None] >> shifts).bitwise_and_((1 << bits) - 1).to(torch.uint8)
