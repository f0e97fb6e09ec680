"""Tiny dense models, and mixtures of them by the published formula: what an output is held to."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from tests.causal import causal_model
from tests.families import step
from tests.tokenizers import tokenizer

HIDDEN, LAYERS, VOCABULARY = 32, 2, 340
TOKENS = torch.tensor([[5, 300, 17, 42, 8, 8, 211, 90, 33, 12, 7, 61]])  # longer than the window of the tiny Mistral


def dense_model(kind: str, seed: int, *, tied: bool = False, **settings: Any) -> Any:
    """A dense model whose norms and biases are random, too."""
    model = causal_model(kind, VOCABULARY, HIDDEN, LAYERS, seed)
    if tied or settings:
        config = model.config
        config.tie_word_embeddings = tied
        for key, value in settings.items():
            setattr(config, key, value)
        torch.manual_seed(seed)
        model = type(model)(config).eval()
    torch.manual_seed(100 + seed)
    step(model, 0.05)
    return model


def settled_model(kind: str) -> Any:
    """A model whose weights follow from a formula, so that numbers made from it stay right with any version."""
    model = causal_model(kind, VOCABULARY, HIDDEN, LAYERS)
    with torch.no_grad():
        for number, tensor in enumerate(model.state_dict().values()):
            places = torch.arange(tensor.numel(), dtype=torch.float64).view(tensor.shape)
            wave = torch.sin(places * (1.3 + 0.1 * number)) * 0.3
            tensor.copy_((wave + (1.0 if tensor.dim() == 1 else 0.0)).bfloat16())
    return model.eval()


def write(model: Any, folder: Path, style: str | None = None) -> Path:
    """Write a model, with a tokenizer of a style."""
    model.save_pretrained(folder)
    if style:
        tokenizer(style).save_pretrained(folder)
    return folder


class Mixture(torch.nn.Module):
    """An MLP of experts by the formula of their papers, without any library's code: token by token."""

    def __init__(
        self,
        router: torch.Tensor,
        experts: Sequence[torch.nn.Module],
        per_token: int,
        shared: torch.nn.Module | None = None,
        gate: torch.Tensor | None = None,
    ) -> None:
        super().__init__()
        self.router, self.experts, self.per_token = router, torch.nn.ModuleList(experts), per_token
        self.shared, self.gate = shared, gate

    def forward(self, states: torch.Tensor) -> torch.Tensor:
        out = torch.zeros_like(states)
        for batch in range(states.shape[0]):
            for place in range(states.shape[1]):
                x = states[batch, place]
                scores = torch.softmax(self.router.float() @ x, 0)
                chosen = scores.argsort(descending=True)[: self.per_token]
                weights = scores[chosen] / scores[chosen].sum()
                y = sum(weight * self.experts[number](x) for weight, number in zip(weights, chosen, strict=True))
                if self.shared is not None:
                    share = 1.0 if self.gate is None else torch.sigmoid(self.gate.float() @ x)
                    y = y + share * self.shared(x)
                out[batch, place] = y
        return out


@torch.no_grad()
def logits(model: Any) -> torch.Tensor:
    """A model's logits for some tokens."""
    return model(TOKENS).logits


def loaded(folder: Path) -> Any:
    """The model of a folder, as transformers loads it: with every weight and nothing else."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True, dtype=torch.float32)
    assert not {kind: names for kind, names in info.items() if names}
    return model.eval()
