"""Passes of a model over examples, each of which gathers as many matrices as fit into memory.

A pass for Gram matrices ends in the last layer that it is for: nothing behind it is computed. One for Fisher
information takes gradients of some parameters alone. Gram matrices are summed in float64, their products being float32;
Fisher information in float32, which loses less than the number of examples times 6e-8.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass
from typing import Any, TypeVar

import torch

from mergekit_lite.answers.likelihood import batches
from mergekit_lite.answers.logprobs import padded, response_log_probs
from mergekit_lite.answers.template import Tokens
from mergekit_lite.checkpoint.statistics_file import DTYPE
from mergekit_lite.errors import RunError
from mergekit_lite.gathering.layers import Inputs, Layers, input_of
from mergekit_lite.gathering.working_file import WorkingFile
from mergekit_lite.resident.model import Built

T = TypeVar("T")
Progress = Callable[[int], None]  # called with how many tokens were read
GRAM, FISHER = 8, 4  # bytes of memory for each number while it is summed up
Results = Iterator[tuple[str, torch.Tensor]]  # names, and float32 tensors on the CPU


class _Enough(Exception):
    """Leaves a forward pass: nothing further of it is needed."""


def grouped(units: Iterable[T], nbytes: Callable[[T], int], most: int) -> list[list[T]]:
    """Return units in groups of up to ``most`` bytes, in their order; a larger unit is a group by itself."""
    groups: list[list[T]] = []
    room = 0
    for unit in units:
        if not groups or nbytes(unit) > room:
            groups.append([])
            room = most
        groups[-1].append(unit)
        room -= nbytes(unit)
    return groups


def gram_pass(
    built: Built,
    layers: Layers,
    group: Sequence[Inputs],
    rows: Sequence[Tokens],
    batch_size: int,
    progress: Progress,
    file: WorkingFile,
) -> Results:
    """Yield XᵀX / n of the n inputs X that some layers read, padding not counted.

    Args:
        built: the model.
        layers: all of its linear layers.
        group: which inputs to sum up, in the order in which they are read.
        rows: the examples.
        batch_size: examples that are read at once, where the layers take padding.
        progress: called after each batch.
        file: that they are for, beside which the sums are kept.
    """
    device, size = built.model.device, batch_size if layers.takes_padding else 1
    sums = {read.name: torch.zeros(read.size, read.size, dtype=torch.float64, device=device) for read in group}
    counts = {name: torch.zeros(1, dtype=torch.float64) for name in sums}
    kept = file.sums("gram", size, [read.name for read in group])
    summed = [*sums.values(), *counts.values()]
    done = kept.take_up(summed)
    mask: list[torch.Tensor] = []

    def summing(read: Inputs) -> Callable[[Any, tuple[Any, ...], dict[str, Any]], None]:
        def add(_: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
            x = input_of(arguments, named).detach().reshape(-1, read.size)
            if len(x) == mask[-1].numel():
                x = x[mask[-1]]
            x = x.float()
            sums[read.name] += x.mT @ x
            counts[read.name] += len(x)
            if layers.runs_once and read is group[-1]:
                raise _Enough

        return add

    with torch.no_grad(), ExitStack() as hooks:
        for read in group:
            hooks.enter_context(read.module.register_forward_pre_hook(summing(read), with_kwargs=True))
        for number, places in enumerate(batches(rows, size), 1):
            if number > done:
                batch = padded([rows[place] for place in places], device=device)
                mask[:] = [batch.attention_mask.flatten().bool()]
                with suppress(_Enough):
                    built.model(**batch.inputs, use_cache=False)
                kept.keep(summed, number)
            progress(sum(len(rows[place].prompt) + len(rows[place].response) for place in places))
    for name, total in sums.items():
        yield _checked(name, total.div_(max(int(counts[name]), 1)))


@dataclass(frozen=True, eq=False)
class Parameter:
    """A parameter of a model, and the tensors of the checkpoint that it is made of."""

    values: Any
    names: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Bytes of memory for its sums and its gradient."""
        return int(self.values.numel() * (FISHER + self.values.element_size()))


def parameters_of(built: Built) -> list[Parameter]:
    """Return the parameters of a model that the checkpoint holds, in the order of the model."""
    names: dict[int, list[str]] = {}
    for name, place in built.places.items():
        names.setdefault(place.untyped_storage().data_ptr(), []).append(name)
    owned = ((each, names.get(each.untyped_storage().data_ptr(), ())) for each in built.model.parameters())
    return [Parameter(each, tuple(own)) for each, own in owned if own and each.is_floating_point()]


def fisher_pass(
    built: Built, group: Sequence[Parameter], rows: Sequence[Tokens], progress: Progress, file: WorkingFile
) -> Results:
    """Yield the mean over examples of the squared gradient of the response's log-probability, Σ log π(y_t | x, y_<t).

    Args:
        built: the model.
        group: the parameters whose elements it is of.
        rows: the examples; each has a response.
        progress: called after each example.
        file: that it is for, beside which the sums are kept.
    """
    sums = [torch.zeros_like(each.values, dtype=torch.float32) for each in group]
    kept = file.sums("fisher", [each.names for each in group])
    done = kept.take_up(sums)
    before = {parameter: parameter.requires_grad for parameter in built.model.parameters()}
    try:
        for parameter in before:
            parameter.requires_grad_(False)
        for each in group:
            each.values.requires_grad_(True)
        for number, row in enumerate(rows, 1):
            if number > done:
                batch = padded([row], device=built.model.device)
                response_log_probs(built.model, batch).sums.sum().backward()  # type: ignore[no-untyped-call]
                for each, total in zip(group, sums, strict=True):
                    if (gradient := each.values.grad) is not None:  # of experts that no token goes to there is none
                        gradient = gradient.float()
                        total.addcmul_(gradient, gradient)
                        each.values.grad = None
                kept.keep(sums, number)
            progress(len(row.prompt) + len(row.response))
    finally:
        for parameter, required in before.items():
            parameter.requires_grad_(required)
            parameter.grad = None
    for each, total in zip(group, sums, strict=True):
        for name in each.names:
            place = built.places[name]
            begin = place.storage_offset() - each.values.storage_offset()
            yield _checked(name, total.as_strided(place.shape, place.stride(), begin) / len(rows))


def _checked(name: str, values: torch.Tensor) -> tuple[str, torch.Tensor]:
    if not bool(torch.isfinite(values).all()):
        raise RunError(
            f"{name}: its statistics are NaN or infinite. Are the model's weights damaged, or its dtype small?"
        )
    return name, values.to(device="cpu", dtype=getattr(torch, DTYPE)).contiguous()
