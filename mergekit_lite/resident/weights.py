"""A candidate's weights, written into a model block by block by the engine that writes models."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass

import torch

from mergekit_lite import dtypes
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.pool import Workers
from mergekit_lite.engine.report import Report, report
from mergekit_lite.engine.run import workers_and_block
from mergekit_lite.engine.schedule import Schedule
from mergekit_lite.engine.sink import Records
from mergekit_lite.planning import Plan
from mergekit_lite.resident.model import Built, Places


class Parameters(Records):
    """The engine's sink that writes into the parameters of a model instead of a file."""

    def __init__(self, places: Places, kinds: Mapping[str, torch.dtype]) -> None:
        """``kinds`` are the output's dtypes; a parameter of another dtype rounds them, as loading does."""
        super().__init__()
        self.places = places
        self.kinds = kinds

    def write(self, tensor: str, offset: int, data: memoryview) -> None:
        """Write bytes into a parameter."""
        if not data:
            return
        values = torch.frombuffer(data, dtype=self.kinds[tensor])
        _put(self.places[tensor], offset // values.element_size(), values)


@dataclass(frozen=True)
class Rewritten:
    """The result of setting the weights."""

    report: Report  # the same as a written model's
    nonfinite: tuple[str, ...]  # tensors that hold NaN or infinity


@dataclass(frozen=True)
class Weights:
    """Sets the weights of a built model to those of one plan after another.

    ``device`` computes: the bits are those of a model written by the same device.
    """

    built: Built
    device: str
    threads: int | None = None

    def set(self, plan: Plan, names: Collection[str] | None = None) -> Rewritten:
        """Set the weights, or those of some names, to the plan's first output.

        Raises:
            CheckpointError: an input changed.
            RunError: an input can't be read.
        """
        wanted = self.built.places.keys() if names is None else self.built.places.keys() & set(names)
        used = {index for index, job in enumerate(plan.jobs) if job.name in wanted}
        kinds = {job.name: dtypes.torch_dtype(job.dtype) for job in plan.jobs}
        parameters = Parameters(self.built.places, kinds)
        devices = (self.device,)
        count, block = workers_and_block(devices, self.threads)
        for source in plan.inputs:
            source.check_unchanged()
        if self.device != CPU:
            torch.cuda.synchronize(self.device)  # what still reads the weights that were, on another stream
        Schedule(plan, {0: parameters}, Workers(count, devices, block), None, only=used).run()
        bad = {plan.jobs[record.job].name for record in parameters.made.values() if record.bad}
        return Rewritten(report(plan, 0, parameters.made), tuple(sorted(bad)))


def _put(place: torch.Tensor, start: int, values: torch.Tensor) -> None:
    """Write elements, counted in row-major order from ``start``, into a view of a parameter."""
    if place.is_contiguous():
        place.view(-1)[start : start + len(values)].copy_(values)
        return
    index = torch.arange(start, start + len(values), device=place.device)
    position = torch.full_like(index, int(place.storage_offset()))
    for length, stride in zip(reversed(place.shape), reversed(place.stride()), strict=True):
        position += index % length * stride
        index = index // length
    last = place.storage_offset() + sum((n - 1) * step for n, step in zip(place.shape, place.stride(), strict=True))
    whole = place.as_strided((last + 1,), (1,), 0)
    whole.index_copy_(0, position, values.to(device=place.device, dtype=place.dtype))
