"""Random draws that depend on (seed, tensor name, stream, element index) and on nothing else.

There is no generator to advance: element i of a tensor gets the same draw whichever thread, block or device computes
it. Each draw hashes its index with a 32-bit mixer (two rounds of xor-shift and multiply, constants from C.
Wellons' "lowbias32" search), with half of a 64-bit key entering before each multiplication.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    import torch


def stream_key(seed: int, tensor: str, stream: int = 0) -> int:
    """The 64-bit key of one tensor's draws; ``stream`` tells apart the models of a merge, or its uses of chance."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{stream}\0{tensor}".encode())


def bits(key: int, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """32 random bits for each of the elements ``start … start + count``.

    Args:
        key: from ``stream_key``.
        start: index of the first element; the range must not cross a multiple of 2³².

    Returns:
        int32 tensor of shape (count,).
    """
    import torch

    key ^= xxhash.xxh3_64_intdigest((start >> 32).to_bytes(8, "little")) if start >> 32 else 0
    x = torch.arange(count, dtype=torch.int32, device=device)
    x += _signed((start & 0xFFFFFFFF) + (key & 0xFFFFFFFF))
    x ^= (x >> 16) & 0xFFFF
    x *= _signed(0x7FEB352D)
    x ^= _signed(key >> 32)
    x ^= (x >> 15) & 0x1FFFF
    x *= _signed(0x846CA68B)
    x ^= (x >> 16) & 0xFFFF
    return x


def uniform(key: int, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Uniform draws in [0, 1) with 24 bits each: float32 tensor of shape (count,)."""
    import torch

    return (bits(key, start, count, device) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def _signed(word: int) -> int:
    """The 32-bit word as the int32 that has the same bits."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
