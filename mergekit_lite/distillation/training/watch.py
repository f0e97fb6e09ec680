"""What is watched while a training goes on: that it doesn't diverge, its speed and its memory."""

from __future__ import annotations

import math
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter

from mergekit_lite.errors import RunError

MOST_SKIPPED = 30  # steps in a row; float16's scale of 65,536 is halved at each of them


class DivergedError(RunError):
    """The training has diverged: ``what`` is not finite at ``step``."""

    def __init__(self, step: int, what: str):
        self.step = step
        super().__init__(f"at step {step:,} {what}")


class Watch:
    """Losses, tokens and time since the last report, in this process."""

    def __init__(self) -> None:
        self.began: float | None = None
        self.tokens: Tensor | int = 0
        self.loss: Tensor | float = 0.0  # of the step, as far as it is
        self.skipped = 0  # steps in a row that float16's scaling left out

    def part(self, inputs: Mapping[str, Tensor]) -> None:
        """Note that a part of a step begins."""
        if self.began is None:
            self.began = time.monotonic()
        mask = inputs.get("attention_mask")
        self.tokens = self.tokens + (inputs["input_ids"].numel() if mask is None else mask.sum())

    def check_loss(self, step: int, add_up: Callable[[Tensor], Tensor]) -> None:
        """Raise DivergedError unless the loss of the step is finite in every process; ``add_up`` sums over them."""
        loss, self.loss = torch.as_tensor(self.loss, dtype=torch.float32), 0.0
        value = float(add_up(loss))
        if not math.isfinite(value):
            raise DivergedError(step, f"the loss is {value}")

    def check_gradient(self, step: int, norm: float, skipped: bool) -> None:
        """Raise DivergedError unless the norm is finite, or float16's scaling has left the step out."""
        self.skipped = self.skipped + 1 if skipped else 0
        if self.skipped >= MOST_SKIPPED:
            raise DivergedError(step, f"the gradient is not finite for the {self.skipped}th time in a row")
        if not math.isfinite(norm) and not skipped:
            raise DivergedError(step, f"the norm of the gradient is {norm}")

    def take(self, over_processes: Callable[[Tensor], Tensor]) -> dict[str, float]:
        """Return speed and memory, and start anew.

        ``over_processes`` gathers a row of each, float64 or float32, shape (processes, 2).
        """
        seconds = time.monotonic() - self.began if self.began is not None else 0.0
        rows = over_processes(torch.tensor([[float(self.tokens), float(peak_memory())]]))
        self.began, self.tokens = None, 0
        figures = {"peak_memory": float(rows[:, 1].max())}
        return {"tokens_per_second": float(rows[:, 0].sum()) / seconds, **figures} if seconds else figures


def check_weights(step: int, parameters: Iterable[Parameter], add_up: Callable[[Tensor], Tensor]) -> None:
    """Raise DivergedError unless all weights are finite, each process looking at what it has of them."""
    bad = sum(not bool(torch.isfinite(_local(weight)).all()) for weight in parameters if weight.requires_grad)
    if float(add_up(torch.tensor(float(bad)))):
        raise DivergedError(step, "some weights are not finite")


def peak_memory() -> int:
    """Return the most bytes that this process had allocated so far: on its GPU, or else on the machine."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated()
    try:
        import resource
    except ImportError:  # on Windows
        import psutil

        memory = psutil.Process().memory_info()
        return int(getattr(memory, "peak_wset", memory.rss))
    unit = 1 if sys.platform == "darwin" else 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


def told(figures: Mapping[str, Any]) -> str:
    """Return a step's figures in words: ``loss 0.683, 12,300 tokens/s, 14.2 GB``."""
    parts = [f"loss {figures['loss']:.4g}"] if "loss" in figures else []
    if "tokens_per_second" in figures:
        parts.append(f"{figures['tokens_per_second']:,.0f} tokens/s")
    if "peak_memory" in figures:
        parts.append(f"{figures['peak_memory'] / 1e9:.1f} GB")
    return ", ".join(parts)


def _local(weight: Parameter) -> Tensor:
    """Return this process's share of a weight."""
    partitioned: Any = weight
    if hasattr(weight, "ds_tensor"):  # of ZeRO-3, filled up at its end to be as long as the others' shares
        share: Tensor = partitioned.ds_tensor.detach().flatten()
        first = torch.distributed.get_rank(partitioned.ds_process_group) * share.numel()
        return share[: max(0, partitioned.ds_numel - first)]
    detached = weight.detach()
    return detached.to_local() if hasattr(detached, "to_local") else detached
