"""The loss of on-policy distillation: by hand, by enumeration of a vocabulary, and by differences in float64."""

from __future__ import annotations

import random

import pytest
import torch

from mergekit_lite.distillation.objectives.on_policy import group_log_ratios, policy_gradient, token_log_ratios


@pytest.fixture(autouse=True)
def seeded():
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)


def reverse_kl(logits: torch.Tensor, teacher: torch.Tensor) -> torch.Tensor:
    """KL(student ‖ teacher) of each row, whole."""
    return (logits.softmax(-1) * (logits.log_softmax(-1) - teacher)).sum(-1)


@pytest.mark.parametrize("coef", [1.0, 0.3])
def test_the_expected_gradient_is_that_of_the_reverse_kl(coef):
    """At the first step: each token of the vocabulary drawn once, weighed by how likely the draw is."""
    logits = torch.randn(5, 7, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(5, 7, dtype=torch.float64).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    drawn = log_probs.detach()
    advantages = -coef * token_log_ratios(drawn, teacher)
    losses = policy_gradient(log_probs.flatten(), drawn.flatten(), advantages.flatten()).losses.view(5, 7)
    (found,) = torch.autograd.grad((drawn.exp() * losses).sum(), logits)
    (expected,) = torch.autograd.grad(coef * reverse_kl(logits, teacher).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_weights_keep_the_expectation_when_the_student_has_moved():
    """With advantages of the moved student, draws of the earlier one have the gradient of its own."""
    logits = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    drawn = torch.randn(4, 6, dtype=torch.float64).log_softmax(-1)  # another policy drew
    teacher = torch.randn(4, 6, dtype=torch.float64).log_softmax(-1)
    log_probs = logits.log_softmax(-1)
    advantages = -token_log_ratios(log_probs.detach(), teacher)
    losses = policy_gradient(log_probs.flatten(), drawn.flatten(), advantages.flatten()).losses.view(4, 6)
    (found,) = torch.autograd.grad((drawn.exp() * losses).sum(), logits)
    (expected,) = torch.autograd.grad(reverse_kl(logits, teacher).sum(), logits)
    torch.testing.assert_close(found, expected, rtol=1e-12, atol=1e-14)


def test_whole_chunks_have_the_gradient_of_the_kl_between_chunks():
    """Two tokens of the student are one of the teacher: all 9 chunks enumerated. ``even`` is half of it."""
    first = torch.randn(3, dtype=torch.float64, requires_grad=True)
    second = torch.randn(3, 3, dtype=torch.float64, requires_grad=True)
    teacher = torch.randn(9, dtype=torch.float64).log_softmax(-1)  # of the chunks
    one, two = first.log_softmax(-1), second.log_softmax(-1)
    chunks = (one[:, None] + two).flatten()
    (expected,) = torch.autograd.grad((chunks.exp() * (chunks - teacher)).sum(), first, retain_graph=True)
    for spread, share in (("whole", 1.0), ("even", 0.5)):
        total = torch.zeros((), dtype=torch.float64)
        for a in range(3):
            for b in range(3):
                log_probs = torch.stack([one[a], two[a, b]])
                drawn = log_probs.detach()
                ratios = group_log_ratios(drawn, torch.tensor([0, 0]), teacher[3 * a + b : 3 * a + b + 1], spread)
                total = total + drawn.sum().exp() * policy_gradient(log_probs, drawn, -ratios).losses.sum()
        (found,) = torch.autograd.grad(total, first, retain_graph=True)
        torch.testing.assert_close(found, share * expected, rtol=1e-12, atol=1e-14)


def naive(drawn: list[float], groups: list[int], teacher: list[float], spread: str) -> list[float]:
    found = []
    for group in groups:
        members = [value for value, other in zip(drawn, groups, strict=True) if other == group]
        ratio = sum(members) - teacher[group] if group >= 0 else float("nan")
        found.append(ratio / len(members) if spread == "even" else ratio)
    return found


@pytest.mark.parametrize("spread", ["even", "whole"])
def test_groups_beside_a_naive_loop(spread):
    for _ in range(20):
        sizes = torch.randint(1, 4, (6,)).tolist()
        groups = [-1, *(group for group, size in enumerate(sizes) for _ in range(size)), -1]
        drawn = -torch.rand(len(groups), dtype=torch.float64)
        teacher = -torch.rand(len(sizes), dtype=torch.float64)
        found = group_log_ratios(drawn, torch.tensor(groups), teacher, spread)
        expected = torch.tensor(naive(drawn.tolist(), groups, teacher.tolist(), spread), dtype=torch.float64)
        torch.testing.assert_close(found, expected, equal_nan=True)
        if spread == "even":
            inside = torch.tensor(groups) >= 0
            torch.testing.assert_close(found[inside].sum(), drawn[inside].sum() - teacher.sum())


def test_groups_of_one_token_are_the_tokens():
    drawn, teacher = -torch.rand(5), -torch.rand(5)
    for spread in ("even", "whole"):
        found = group_log_ratios(drawn, torch.arange(5), teacher, spread)
        torch.testing.assert_close(found, token_log_ratios(drawn, teacher))


@pytest.mark.parametrize("clip", [None, 0.2])
def test_gradients_by_differences(clip):
    log_probs = -torch.rand(12, dtype=torch.float64, requires_grad=True)
    drawn, advantages = -torch.rand(12, dtype=torch.float64), torch.randn(12, dtype=torch.float64)
    assert torch.autograd.gradcheck(lambda given: policy_gradient(given, drawn, advantages, clip).losses, log_probs)


def test_by_hand():
    drawn = torch.tensor([-1.0, -1.0, -1.0, -1.0])
    log_probs = (drawn + torch.tensor([0.5, 0.5, -0.5, 0.0])).requires_grad_()
    advantages = torch.tensor([2.0, -2.0, -2.0, 2.0])
    plain = policy_gradient(log_probs, drawn, advantages)
    torch.testing.assert_close(plain.losses, torch.tensor([-3.2974425, 3.2974425, 1.2130613, -2.0]))
    clipped = policy_gradient(log_probs, drawn, advantages, 0.2)
    torch.testing.assert_close(clipped.losses, torch.tensor([-2.4, 3.2974425, 1.6, -2.0]))
    assert clipped.clipped.tolist() == [True, False, True, False]
    clipped.losses.sum().backward()
    assert (log_probs.grad != 0).tolist() == [False, True, False, True]
    assert plain.ratios[3] == 1
