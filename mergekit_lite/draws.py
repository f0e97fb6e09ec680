"""Random draws that depend on (seed, tensor name, stream, element index) and on nothing else.

There is no generator to advance: element i of a tensor gets the same draw whichever thread, block or device computes
it. Each draw hashes its index with a 32-bit mixer (two rounds of xor-shift and multiply, constants from C.
Wellons' "lowbias32" search), with half of a 64-bit key entering before each multiplication.
"""

from __future__ import annotations

from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING

import xxhash

from mergekit_lite.deferred import np, torch

if TYPE_CHECKING:
    import numpy.typing as npt

WORDS = 1 << 32  # indices that one key's draws are counted up to before the next one enters it


def stream_key(seed: int, tensor: str, stream: int = 0) -> int:
    """Return the 64-bit key of a tensor's draws; ``stream`` tells apart the models or uses of chance of a merge."""
    return xxhash.xxh3_64_intdigest(f"{seed}\0{stream}\0{tensor}".encode())


def bits(key: int, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw 32 random bits for each of the elements ``start … start + count``: int32 tensor of shape (count,).

    ``key`` is from ``stream_key``. The range of elements must not cross a multiple of 2³².
    """
    key = _counted(key, start)
    x = _indices(count, torch.device(device)) + _signed((start & 0xFFFFFFFF) + (key & 0xFFFFFFFF))
    shifted = torch.empty_like(x)

    def fold(by: int) -> None:
        torch.bitwise_right_shift(x, by, out=shifted)
        x.bitwise_xor_(shifted.bitwise_and_((1 << (32 - by)) - 1))

    fold(16)
    x.mul_(_signed(0x7FEB352D))
    x.bitwise_xor_(_signed(key >> 32))
    fold(15)
    x.mul_(_signed(0x846CA68B))
    fold(16)
    return x


def words(key: int, start: int, count: int) -> npt.NDArray[np.uint32]:
    """Draw what ``bits`` does, without torch: uint32 array of shape (count,)."""
    key = _counted(key, start)
    x: npt.NDArray[np.uint32] = np.arange(count, dtype=np.uint32) + np.uint32((start + key) & 0xFFFFFFFF)
    x ^= x >> 16
    x *= np.uint32(0x7FEB352D)
    x ^= np.uint32(key >> 32)
    x ^= x >> 15
    x *= np.uint32(0x846CA68B)
    x ^= x >> 16
    return x


def halves(key: int, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw 16 random bits for each of the elements ``start … start + count``: int16 tensor of shape (count,).

    It takes half the time of ``bits``: two elements share a draw. Any range of elements will do.
    """
    first, stop = start // 2, -(-(start + count) // 2)
    edges = [first, *range((first // WORDS + 1) * WORDS, stop, WORDS), stop]
    drawn = [bits(key, begin, end - begin, device) for begin, end in pairwise(edges)]
    words = drawn[0] if len(drawn) == 1 else torch.cat(drawn)
    return words.view(torch.int16)[start - 2 * first :][:count]


def uniform(key: int, start: int, count: int, device: torch.device | str = "cpu") -> torch.Tensor:
    """Draw uniformly from [0, 1) with 24 bits each: float32 tensor of shape (count,)."""
    return (bits(key, start, count, device) & 0xFFFFFF).to(torch.float32) * 2.0**-24


def _counted(key: int, start: int) -> int:
    """Return the key of the draws whose indices are counted from the last multiple of 2³² before ``start``."""
    return key ^ xxhash.xxh3_64_intdigest((start >> 32).to_bytes(8, "little")) if start >> 32 else key


def _indices(count: int, device: torch.device) -> torch.Tensor:
    """Return 0 … count. Only those on the CPU may be shared: what one stream of a GPU makes is not for the others."""
    return _cached_indices(count) if device.type == "cpu" else torch.arange(count, dtype=torch.int32, device=device)


@lru_cache(maxsize=8)
def _cached_indices(count: int) -> torch.Tensor:
    """Return 0 … count: making it takes a fifth of a draw's time, and blocks are nearly all of one length."""
    with torch.inference_mode(False):
        return torch.arange(count, dtype=torch.int32)


def _signed(word: int) -> int:
    """Return the 32-bit word as the int32 that has the same bits."""
    word &= 0xFFFFFFFF
    return word - (1 << 32) if word >> 31 else word
