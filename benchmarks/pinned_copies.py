"""The least time a run on a GPU can take: its traffic alone, through pinned memory, both ways at once.

Two blocks go up for each one that comes down, as in an extrapolation.

python -m benchmarks.pinned_copies BYTES_OF_ONE_CHECKPOINT
"""

from __future__ import annotations

import sys
import time

import torch

BLOCK = 1 << 26  # bytes


def seconds(nbytes: int, uploads: int = 2) -> float:
    """Return the time to copy some checkpoints to the GPU while one comes back."""
    up, down = torch.cuda.Stream(), torch.cuda.Stream()
    host = [torch.empty(BLOCK, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    device = [torch.empty(BLOCK, dtype=torch.uint8, device="cuda") for _ in range(2)]
    for warm in (True, False):
        torch.cuda.synchronize()
        started = time.perf_counter()
        for _ in range(2 if warm else -(-nbytes // BLOCK)):
            with torch.cuda.stream(up):
                for _ in range(uploads):
                    device[0].copy_(host[0], non_blocking=True)
            with torch.cuda.stream(down):
                host[1].copy_(device[1], non_blocking=True)
        torch.cuda.synchronize()
    return time.perf_counter() - started


if __name__ == "__main__":
    print(seconds(int(sys.argv[1])))
