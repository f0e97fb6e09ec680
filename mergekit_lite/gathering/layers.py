"""The linear layers of a model: which read the same, in which order, and which of its weights they multiply with."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch

from mergekit_lite.answers.logprobs import padded
from mergekit_lite.answers.template import Tokens
from mergekit_lite.checkpoint.statistics_file import Gram
from mergekit_lite.resident.model import Built

TOKENS = 8  # of an example that the layers are found with


@dataclass(frozen=True)
class Inputs:
    """What some linear layers read together."""

    name: str  # of its Gram matrix
    module: Any  # the first of them that reads it
    size: int  # of an input


@dataclass(frozen=True)
class Layers:
    """The linear layers of a model that text goes through."""

    inputs: tuple[Inputs, ...]  # in the order in which they are read
    grams: Mapping[str, Gram]  # of each weight
    takes_padding: bool  # whether every layer reads a row for each place of a batch, so that padding can be told
    runs_once: bool  # whether none of them is run more than once on a text


def linear_layers(built: Built, rows: Sequence[Tokens]) -> Layers:
    """Find the linear layers by letting the model read the beginnings of two examples, of different lengths."""
    weights = _weights(built)
    reads: list[tuple[Any, torch.Tensor, int]] = []  # the tensors are kept, so that none takes the place of another

    def note(module: Any, arguments: tuple[Any, ...], named: dict[str, Any]) -> None:
        tensor = input_of(arguments, named)
        reads.append((module, tensor, tensor._version))

    long = [*rows[0].prompt, *rows[0].response][:TOKENS]
    batch = padded([Tokens(tuple(long), ()), Tokens(tuple(long[:1]), ())], device=built.model.device)
    with torch.no_grad(), ExitStack() as hooks:
        for module in weights:
            hooks.enter_context(module.register_forward_pre_hook(note, with_kwargs=True))
        built.model(**batch.inputs, use_cache=False)
    first: dict[Any, Inputs] = {}  # by module: what it reads when it is run first
    shared: dict[tuple[int, int], Inputs] = {}
    for module, tensor, version in reads:
        if module not in first:
            name = f"{next(iter(weights[module])).removesuffix('.weight')}.gram"
            first[module] = shared.setdefault((id(tensor), version), Inputs(name, module, tensor.shape[-1]))
    grams = {
        weight: Gram(read.name, axis) for module, read in first.items() for weight, axis in weights[module].items()
    }
    return Layers(
        inputs=tuple(dict.fromkeys(first.values())),
        grams=grams,
        takes_padding=all(tensor.numel() // tensor.shape[-1] == batch.input_ids.numel() for _, tensor, _ in reads),
        runs_once=len(reads) == len(first),
    )


def input_of(arguments: tuple[Any, ...], named: Mapping[str, Any]) -> torch.Tensor:
    """Return what a linear layer was called with."""
    tensor: torch.Tensor = arguments[0] if arguments else next(iter(named.values()))
    return tensor


def _weights(built: Built) -> dict[Any, dict[str, int]]:
    """Return for each linear layer the weights of the checkpoint that it multiplies with, and their axes of inputs.

    A head that is tied to the embedding has none: the embedding is no linear layer.
    """
    from transformers.pytorch_utils import Conv1D

    embedding = built.model.get_input_embeddings()
    by_storage: dict[int, list[tuple[str, torch.Tensor]]] = {}
    for name, place in built.places.items():
        by_storage.setdefault(place.untyped_storage().data_ptr(), []).append((name, place))
    weights: dict[Any, dict[str, int]] = {}
    for module in built.model.modules():
        is_linear = isinstance(module, torch.nn.Linear)
        if not (is_linear or isinstance(module, Conv1D)) or module.weight is getattr(embedding, "weight", None):
            continue
        inputs = 1 if is_linear else 0  # the axis of the parameter; the checkpoint may have a part of it, or turn it
        size, stride = module.weight.shape[inputs], module.weight.stride(inputs)
        own = {
            name: axis
            for name, place in by_storage.get(module.weight.untyped_storage().data_ptr(), ())
            if place.dim() == 2
            for axis in (1 - inputs, inputs)
            if (place.shape[axis], place.stride(axis)) == (size, stride)
        }
        if own:
            weights[module] = own
    return weights
