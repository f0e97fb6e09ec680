"""SELM, INPO, SPA, MIPO, tempered ORPO and ASFT: beside plain formulas, their authors' code, and what they derive from.

The figures of the authors come from their own functions, run in float64 on ``ROWS``: ``optimistic_dpo_loss`` of
shenao-zhang/SELM (0ba546a), ``dpo_loss`` and ``confidence_update`` of kingdy2002/SPA (38553eb), and MIPO's as its
trainer is posted. ORPO, ASFT and INPO have no such code; their formulas are those of the papers.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from mergekit_lite.distillation.objectives.preference import OBJECTIVES, LogProbs, gap_of
from tests.distill.test_objectives import exact, one_chosen, random_rows, run

ROWS = LogProbs(
    chosen=exact([[-80], [-55]]),
    rejected=exact([-90, -70]),
    chosen_lengths=exact([[100], [100]]),
    rejected_lengths=exact([50, 50]),
    reference_chosen=exact([[-82], [-57]]),
    reference_rejected=exact([-85, -66]),
    own=exact([-40, -30]),
    reference_own=exact([-42, -25]),
    mixed_chosen=exact([[-81], [-62]]),
    mixed_rejected=exact([-89, -69]),
    progress=0.5,
)


def sigmoid(x):
    return 1 / (1 + np.exp(-x))


def odds(average):
    return average - np.log(1 - np.exp(average))


FORMULAS = {  # of the averages of a pair, and those of the reference
    "mipo": lambda w, r, ref_w, ref_r: -np.log(sigmoid(10 * (w - r - np.log(1 + np.exp(ref_w - ref_r))))),
    "orpo_align": lambda w, r, *_: -np.log(sigmoid(odds(w) - odds(r))),
    "asft_align": lambda w, r, *_: -w - np.log(1 - np.exp(r)),
    "asft": lambda w, r, *_: -2 * w - np.log(1 - np.exp(r)),
}


@pytest.mark.parametrize("name", FORMULAS)
def test_as_the_plain_formula(name):
    rows = one_chosen(random_rows(1))
    sums = (rows.chosen, rows.rejected, rows.reference_chosen, rows.reference_rejected)
    lengths = (rows.chosen_lengths, rows.rejected_lengths) * 2
    averages = ((each / length).flatten().numpy() for each, length in zip(sums, lengths, strict=True))
    expected = FORMULAS[name](*averages)
    np.testing.assert_allclose(run(name, rows).loss.numpy(), expected, rtol=1e-10)


@pytest.mark.parametrize(
    ("name", "options", "rows", "losses"),
    [
        ("selm", {}, {}, (0.6587795555486972, 0.6635471130761409)),
        ("selm", {"beta": 0.1, "alpha": 0.5}, {}, (0.5031860488854579, 0.18748795048588562)),
        ("spa", {}, {"progress": 0.01}, (0.4031860488854579, 0.4374879504858856)),
        ("spa", {}, {}, (0.4031860488854579, 0.4974879504858857)),
        ("spa", {}, {"gap": 0.35}, (0.4031860488854579, 0.4974879504858857)),
        ("spa", {}, {"gap": 2.0}, (0.4731860488854579, 0.4974879504858857)),
        ("mipo", {"beta": 5}, {}, (1.4136180898169546, 1.6480694596530931)),
        ("mipo", {}, {}, (2.3681001105355404, 2.9239291458521106)),
        ("mipo", {"beta": 25}, {}, (5.677829341553021, 7.172542816420613)),
    ],
)
def test_as_the_authors_code_has_it(name, options, rows, losses):
    assert run(name, replace(ROWS, **rows), **options).loss.tolist() == pytest.approx(losses, rel=1e-12)


def test_the_confidences_of_spa():
    assert run("spa", ROWS).confidences.flatten().tolist() == pytest.approx([0.5, -0.2])


def test_the_gap_is_the_authors():
    shuffled = [(7 * number) % 50 / 100 for number in range(50)]
    assert gap_of(shuffled, 50, 0.1) == pytest.approx(0.055)
    assert gap_of(shuffled[:-1], 50, 0.1) == 0  # too few
    assert gap_of([3.0], 1, 1.0) == 3  # the last has no next


def test_selm_makes_own_answers_less_likely():
    """Descending raises the loss's other term: an own answer loses probability, where a wrong sign would raise it."""
    own = ROWS.own.clone().requires_grad_()
    run("selm", replace(ROWS, own=own), beta=0.1, alpha=0.5).loss.sum().backward()
    torch.testing.assert_close(own.grad, exact([0.05, 0.05]))
    torch.testing.assert_close(run("selm", ROWS, alpha=0).loss, run("dpo", ROWS, beta=0.01).loss)


def test_mipo_does_not_overflow():
    """log(1 + eᴷ) is K for large K, where e^K is infinite."""
    rows = replace(ROWS, reference_chosen=exact([[0], [0]]), reference_rejected=exact([-1e5, -1e5]))
    loss = run("mipo", rows, beta=1.0).loss
    torch.testing.assert_close(loss, exact([2000 - 1.0, 2000 - 0.85]), rtol=1e-12, atol=0)


def test_mipo_lies_between_no_reference_and_its_whole():
    for shift, name, options in ((-1e4, "simpo", {"gamma": 0.0}), (1e4, "dpo_norm", {})):
        # Moves K by ±200, and leaves what is compared as it is.
        rows = replace(ROWS, reference_rejected=ROWS.reference_rejected - shift)
        if name == "dpo_norm":
            rows = replace(rows, rejected=rows.rejected - shift)
        torch.testing.assert_close(run("mipo", rows, beta=2.0).loss, run(name, rows, beta=2.0, **options).loss)


def test_one_stage_and_two_stages():
    """ORPO is its term and the likelihood of the chosen answer; ASFT likewise, and never below ORPO (2502.01237, D)."""
    rows = random_rows(3)
    torch.testing.assert_close(run("orpo", rows, weight=1.0).loss, run("orpo_align", rows, nll=1.0).loss)
    torch.testing.assert_close(run("asft", rows).loss, run("asft_align", rows, nll=1.0).loss)
    assert (run("asft", rows, weight=0.3).loss > run("orpo", rows, weight=0.3).loss).all()


def test_beta_scales_log_odds():
    rows = one_chosen(random_rows(4))
    chosen, rejected = (odds(each.flatten().numpy()) for each in rows.averages())
    pairwise = -np.log(sigmoid(0.7 * (chosen - rejected)))
    pointwise = -np.log(sigmoid(0.7 * chosen)) - np.log(sigmoid(-0.7 * rejected))
    np.testing.assert_allclose(run("orpo_align", rows, beta=0.7).loss.numpy(), pairwise, rtol=1e-10)
    np.testing.assert_allclose(run("asft_align", rows, beta=0.7).loss.numpy(), pointwise, rtol=1e-10)


def test_inpo_is_ipo_in_the_first_round():
    rows = random_rows(5)
    first = replace(rows, round_chosen=rows.reference_chosen, round_rejected=rows.reference_rejected)
    expected = run("ipo", first, beta=0.005, length_normalised=False).loss
    torch.testing.assert_close(run("inpo", first, ratio=0.7).loss, expected)
    # Without KL to the first model it is IPO to the round's.
    to_round = replace(rows, reference_chosen=rows.round_chosen, reference_rejected=rows.round_rejected)
    expected = run("ipo", to_round, beta=0.005, length_normalised=False).loss
    torch.testing.assert_close(run("inpo", rows, ratio=0.0).loss, expected)


def test_inpo_is_least_where_mirror_descent_goes():
    """Over all pairs of y, y' ~ π_t its gradient is 0 at π_t+1 ∝ e^(P(y ≻ π_t)/η) π_ref^(τ/η) π_t^(1 − τ/η)."""
    draws = torch.Generator().manual_seed(6)
    eta, ratio, count = 0.5, 0.3, 5
    reference, now = (torch.randn(count, generator=draws, dtype=torch.float64).log_softmax(0) for _ in range(2))
    prefers = torch.rand(count, count, generator=draws, dtype=torch.float64)
    prefers = (prefers + 1 - prefers.T) / 2  # P(y ≻ y'), no order of answers behind it
    goal = (prefers @ now.exp()) / eta + ratio * reference + (1 - ratio) * now
    better, worse = (each.flatten() for each in torch.meshgrid(torch.arange(count), torch.arange(count), indexing="ij"))
    weights = (now[better] + now[worse]).exp() * prefers[better, worse]

    def gradient(logits):
        log_probs = logits.clone().requires_grad_()
        policy = log_probs.log_softmax(0)
        ones = torch.ones(count * count, dtype=torch.float64)
        rows = LogProbs(
            policy[better, None],
            policy[worse],
            ones[:, None],
            ones,
            reference_chosen=reference[better, None],
            reference_rejected=reference[worse],
            round_chosen=now[better, None],
            round_rejected=now[worse],
        )
        (weights * OBJECTIVES["inpo"](rows, eta=eta, ratio=ratio).loss).sum().backward()
        return log_probs.grad

    assert gradient(goal).abs().max() < 1e-12
    assert gradient(now).abs().max() > 1e-3


def test_spa_smooths_only_what_it_doubts():
    rows = replace(random_rows(7), gap=0.5)
    loss, plain = run("spa", rows, smoothing=0.2).loss, run("dpo", rows).loss
    chosen, rejected = rows.ratios()
    doubted = 0.1 * (chosen - rejected) <= 0.5
    assert doubted.any() and not doubted.all()
    smoothed = run("dpo", rows, smoothing=0.2)
    torch.testing.assert_close(loss[doubted.all(1)], smoothed.loss[doubted.all(1)])
    torch.testing.assert_close(loss[~doubted.any(1)], plain[~doubted.any(1)])
    torch.testing.assert_close(run("spa", replace(rows, progress=0.19)).loss, plain)


def test_options_of_shares_are_held_to_them():
    problems: list[str] = []
    OBJECTIVES["inpo"].options({"ratio": 1.5, "eta": 0}, problems)
    OBJECTIVES["spa"].options({"quantile": 2, "window": 0, "mix": 0}, problems)
    assert len(problems) == 5
