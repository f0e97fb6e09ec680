"""Distances computed in chunks from a model's hidden states, held to those of all its logits at once."""

from __future__ import annotations

import pytest
import torch

from mergekit_lite.answers import logprobs
from mergekit_lite.answers.logprobs import padded
from mergekit_lite.answers.template import Tokens
from mergekit_lite.distillation.objectives.distances import DISTANCES
from mergekit_lite.distillation.training.distances import distance_losses
from tests.causal import causal_model
from tests.distill.teachers import in_float32, mapping, projection, taught

VOCABULARY = 340
TEACHER = {"same": VOCABULARY, "map": 300, "projection": 300, "any": 300}


def batch_of(positions: int) -> list[Tokens]:
    draws = torch.Generator().manual_seed(3)
    rows, sizes = [], [5, 3, positions - 8]
    for size in sizes:
        ids = torch.randint(1, VOCABULARY, (4 + size,), generator=draws).tolist()
        rows.append(Tokens(tuple(ids[:4]), tuple(ids[4:])))
    return rows


def vocabulary_of(name: str, seed: int):
    kind = DISTANCES[name].vocabulary
    return {"map": mapping, "projection": projection}.get(kind, lambda *_: None)(seed, VOCABULARY, TEACHER[kind])


def two_teachers(name: str):
    """Teachers whose groups differ, the second with fewer tokens a position."""
    shapes = ((2, 1), (1, 1), (1, 2), (1, 1), (4, 3), (1, 1), (1, 1), (1, 1), (1, 0), (0, 1))
    size = TEACHER[DISTANCES[name].vocabulary]
    both = [taught(1, VOCABULARY, size, top=20), taught(2, VOCABULARY, size, top=7, shapes=shapes)]
    assert len({len(each.tokens) for each in both}) == 1
    return [in_float32(each.targets) for each in both], [vocabulary_of(name, seed) for seed in (1, 2)]


@pytest.mark.parametrize("name", DISTANCES)
@pytest.mark.parametrize("architecture", ["llama", "gemma2", "granite"])
def test_equal_to_all_logits(name, architecture, monkeypatch):
    """Losses, log-probabilities and every gradient, with two teachers, whatever the chunks."""
    distance = DISTANCES[name]
    model = causal_model(architecture, VOCABULARY)
    targets, vocabularies = two_teachers(name)
    batch = padded(batch_of(len(targets[0].student_groups)))
    draws = torch.Generator().manual_seed(4)
    weights = [torch.rand(each.groups, generator=draws) for each in targets]

    def gradients(log_probs, losses):
        total = -0.1 * log_probs.sum() + sum(
            (each * weight).sum() for each, weight in zip(losses, weights, strict=True)
        )
        model.zero_grad()
        total.backward()
        return {key: parameter.grad.clone() for key, parameter in model.named_parameters()}

    logits = model(**batch.inputs).logits.flatten(0, 1)[batch.states]
    expected = [
        distance(logits, batch.targets, each, vocabulary)
        for each, vocabulary in zip(targets, vocabularies, strict=True)
    ]
    log_probs = logits.log_softmax(1).gather(1, batch.targets[:, None])[:, 0]
    wanted = gradients(log_probs, expected)
    for rows in (1, 4, 7, 1000):
        monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", rows * VOCABULARY)
        found = distance_losses(model, batch, targets, distance, distance.defaults, vocabularies)
        torch.testing.assert_close(found[0], log_probs, rtol=1e-5, atol=1e-5)
        for ours, theirs in zip(found[1], expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-5)
        for key, gradient in gradients(*found).items():
            scale = wanted[key].abs().max().item()
            torch.testing.assert_close(gradient, wanted[key], rtol=1e-3, atol=1e-4 * scale, msg=f"{key}, {rows} rows")
