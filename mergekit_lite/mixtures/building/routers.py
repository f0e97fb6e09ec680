"""Rows of routers: vectors that stand for an expert's prompts, one for each layer.

A router scores an expert by the inner product of its row with the hidden state before the MLP. The row is what the base
model itself makes of the expert's prompts:

    hidden, hidden_last   the hidden state that enters the layer at a prompt's last token, as a mean over prompts
    hidden_avg            the mean over a prompt's tokens instead
    cheap_embed           the sum of all tokens' embeddings, the same in all layers; no model runs

minus that of the negative prompts, scaled to length 1. Prompts are batched; what pads one to the length of others
enters nothing. mergekit counts it in ``hidden_avg``, so that a prompt's row there depends on its neighbours.
Random rows are drawn where they are read: N(0, 1), and U(±1/√hidden) as ``torch.nn.Linear`` begins.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from typing import Any, NamedTuple

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.deferred import torch
from mergekit_lite.errors import UsageError, counted
from mergekit_lite.mixtures.building.planning import MixturePlan
from mergekit_lite.mixtures.building.recipe import Expert
from mergekit_lite.planning import Plan
from mergekit_lite.resident.model import tokenizer_of
from mergekit_lite.resident.whole import check_memory, check_tokens, loaded, plan_of_whole

EMBEDDING = "model.embed_tokens.weight"
BATCH = 8192  # tokens that go through the model at once, padding included
DEGENERATE = 5.0  # condition number of a layer's rows from which on some experts are hardly told apart
LEAST = 1e-8  # of a row's length before it is scaled

Vectors = Callable[[Sequence[str]], "torch.Tensor"]  # of prompts: (layers, hidden), float32


class Routers(NamedTuple):
    """Rows by the names of their routers, as bytes of the output's dtype; and what the user should know of them."""

    rows: dict[str, bytes]
    warning: str


def make_routers(planned: MixturePlan, device: str = "cpu", threads: int | None = None) -> Routers:
    """Compute the rows of a mixture's routers.

    Args:
        planned: the mixture.
        device: that the base model runs on.
        threads: workers that read it.

    Raises:
        UsageError: the base has no tokenizer, or one with more tokens than rows, doesn't fit into memory, or
            transformers can't load it.
        CheckpointError, RunError: it can't be read.
    """
    recipe, layers = planned.recipe, 1 + max(layer for layer, _ in planned.routers.values())
    base_plan = plan_of_whole(planned.base, device)
    tokenizer = tokenizer_of(base_plan)
    with torch.no_grad():
        if recipe.gate_mode == "cheap_embed":
            vectors = _embeddings(planned.base, tokenizer, layers)
        else:
            averaged = recipe.gate_mode == "hidden_avg"
            vectors = _hidden_states(planned.base, base_plan, tokenizer, device, threads, averaged=averaged)
        experts = torch.stack([_row(each, vectors) for each in recipe.experts])  # (experts, layers, hidden)
        gated = recipe.shared if any(is_shared for _, is_shared in planned.routers.values()) else ()
        shared = torch.stack([_row(each, vectors) for each in gated]) if gated else experts[:0]
        kinds = {job.name: dtypes.torch_dtype(job.dtype) for job in planned.plan.jobs}
        rows = {
            name: bytes(bytes_of((shared if is_shared else experts)[:, layer].to(kinds[name]).contiguous().view(-1)))
            for name, (layer, is_shared) in planned.routers.items()
        }
        return Routers(rows, _degenerate(torch.cat([experts, shared]).transpose(0, 1)))


def _row(expert: Expert, vectors: Vectors) -> torch.Tensor:
    """Return an expert's row for each layer: (layers, hidden)."""
    row = vectors(expert.positive)
    if expert.negative:
        row = row - vectors(expert.negative)
    scaled: torch.Tensor = row / row.norm(dim=-1, keepdim=True).clamp(min=LEAST)
    return scaled


def _tokens(prompts: Iterable[str], tokenizer: Any, base: Checkpoint) -> list[list[int]]:
    """Return the numbers of the tokens of each prompt, behind the token that begins texts where there is one."""
    beginning = tokenizer.bos_token or ""
    numbers = [tokenizer(beginning + prompt, add_special_tokens=False)["input_ids"] for prompt in prompts]
    if empty := [prompt for prompt, tokens in zip(prompts, numbers, strict=True) if not tokens]:
        raise UsageError(f"the prompt {empty[0]!r} has no token: give each expert texts that are to go to it.")
    check_tokens(numbers, base.tensors[EMBEDDING].shape[0], base.reference)
    return numbers


def _embeddings(base: Checkpoint, tokenizer: Any, layers: int) -> Vectors:
    """Return what sums the embeddings of prompts' tokens: of each token that occurs one row is read."""
    spec = base.tensors[EMBEDDING]
    columns = spec.shape[1]

    def summed(prompts: Sequence[str]) -> torch.Tensor:
        counts = Counter(number for tokens in _tokens(prompts, tokenizer, base) for number in tokens)
        total = torch.zeros(columns, dtype=torch.float64)
        with Reader() as reader:
            for number, times in sorted(counts.items()):
                total += times * spec.elements(reader, number * columns, columns).double()
        row: torch.Tensor = total / total.norm().clamp(min=LEAST)
        return row.float().expand(layers, -1)

    return summed


def _hidden_states(
    base: Checkpoint, plan: Plan, tokenizer: Any, device: str, threads: int | None, *, averaged: bool
) -> Vectors:
    """Return what runs prompts through the base and gives the mean of their hidden states before each layer."""
    check_memory(plan, device, "gate_mode: cheap_embed, which runs no model")
    model = loaded(plan, device, threads).model

    def mean(prompts: Sequence[str]) -> torch.Tensor:
        total = torch.zeros(())
        for batch in _batches(_tokens(prompts, tokenizer, base)):
            longest = max(map(len, batch))
            # Padding stands behind a prompt, where no token of it looks. Any number will do.
            numbers = torch.tensor([tokens + [0] * (longest - len(tokens)) for tokens in batch], device=device)
            states = model.model(input_ids=numbers, output_hidden_states=True, use_cache=False).hidden_states
            for row, tokens in enumerate(batch):
                own = torch.stack([layer[row, : len(tokens)].float() for layer in states[:-1]])
                total = total + (own.mean(dim=1) if averaged else own[:, -1]).cpu()
        return total / len(prompts)

    return mean


def _batches(prompts: Sequence[list[int]]) -> list[list[list[int]]]:
    """Return prompts of similar lengths together, as many as fit into ``BATCH``."""
    batches: list[list[list[int]]] = []
    for tokens in sorted(prompts, key=len):
        if batches and (len(batches[-1]) + 1) * len(tokens) <= BATCH:
            batches[-1].append(tokens)
        else:
            batches.append([tokens])
    return batches


def _degenerate(layers: torch.Tensor) -> str:
    """Return a warning where rows of a layer are hardly told apart; ``layers`` are (layers, rows, hidden)."""
    numbers = [float(torch.linalg.cond(rows.float())) for rows in layers]
    bad = [layer for layer, number in enumerate(numbers) if not number <= DEGENERATE]
    if not bad:
        return ""
    where = "all layers" if len(bad) == len(numbers) else (
        f"layer {bad[0]}" if len(bad) == 1 else f"{counted(len(bad), 'layer')} of {len(numbers)}")  # fmt: skip
    return (
        f"the router's rows of {where} are nearly dependent (condition number {max(numbers):.1f}, {DEGENERATE:g} is "
        "much): the prompts of experts are alike, and some experts will hardly be chosen"
    )
