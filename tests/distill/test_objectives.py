"""Objectives: the published numbers, gradients, and which way each pushes."""

from __future__ import annotations

from dataclasses import fields, replace

import pytest
import torch

from mergekit_lite.distillation.objectives.logarithms import log1mexp
from mergekit_lite.distillation.objectives.preference import OBJECTIVES, LogProbs, scheduled

ALL = sorted(OBJECTIVES)
PAIRWISE = [name for name in ALL if not OBJECTIVES[name].fuses]  # those that take a single chosen response
FAR = {"beta": 0.002, "gamma": 3.0}  # margins and targets beyond those of random rows, by option
FLOAT32 = 6e-8  # the published numbers were computed in it


def exact(values) -> torch.Tensor:
    return torch.tensor(values, dtype=torch.float64)


# Two rows, [source, target] chosen: fusion of WRPO as its authors' code has it.
PUBLISHED = LogProbs(
    chosen=exact([[-120, -80], [-60, -55]]),
    rejected=exact([-90, -70]),
    reference_chosen=exact([[-150, -82], [-58, -57]]),
    reference_rejected=exact([-85, -66]),
    chosen_lengths=exact([[300, 100], [300, 100]]),
    rejected_lengths=exact([50, 50]),
)


def run(name: str, rows: LogProbs, **options):
    return OBJECTIVES[name](rows, **options)


def one_chosen(rows: LogProbs, column: int = -1) -> LogProbs:
    return replace(
        rows,
        **{
            field.name: getattr(rows, field.name)[:, column, None]
            for field in fields(rows)
            if "chosen" in field.name and getattr(rows, field.name) is not None
        },
    )


def random_rows(seed: int, chosen: int = 2) -> LogProbs:
    """Eight rows with margins on both sides of 0; plain enough for every objective."""
    draws = torch.Generator().manual_seed(seed)

    def drawn(*shape, low, high):
        return torch.rand(shape, generator=draws, dtype=torch.float64) * (high - low) + low

    lengths, rejected_lengths = drawn(8, chosen, low=5, high=30).round(), drawn(8, low=5, high=30).round()
    rows = LogProbs(
        chosen=-lengths * drawn(8, chosen, low=0.2, high=2),
        rejected=-rejected_lengths * drawn(8, low=0.2, high=2),
        chosen_lengths=lengths,
        rejected_lengths=rejected_lengths,
        reference_chosen=-lengths * drawn(8, chosen, low=0.2, high=2),
        reference_rejected=-rejected_lengths * drawn(8, low=0.2, high=2),
        chosen_squares=drawn(8, chosen, low=-2, high=-0.1),
        rejected_squares=drawn(8, low=-2, high=-0.1),
        own=-drawn(8, low=5, high=30),
        reference_own=-drawn(8, low=5, high=30),
        round_chosen=-lengths * drawn(8, chosen, low=0.2, high=2),
        round_rejected=-rejected_lengths * drawn(8, low=0.2, high=2),
        progress=0.5,
    )
    return replace(rows, mixed_chosen=rows.chosen, mixed_rejected=rows.rejected)


@pytest.mark.parametrize(
    ("options", "progress", "losses"),
    [
        ({}, 0.0, (0.65875953, 0.66359711)),
        ({}, 0.5, (0.65202892, 0.66456765)),
        ({}, 1.0, (0.64534718, 0.66553915)),
        ({"alpha": 0.5, "schedule": "constant"}, 0.3, (0.59364957, 0.67334712)),
        ({"alpha": 0.5, "schedule": "constant", "beta": 0.1, "smoothing": 0.1}, 0.3, (0.32551953, 0.55301523)),
    ],
)
def test_wrpo_as_published(options, progress, losses):
    outcome = run("wrpo", replace(PUBLISHED, progress=progress), **options)
    assert outcome.loss.tolist() == pytest.approx(losses, abs=FLOAT32)
    assert outcome.accuracies.tolist() == [1.0, 1.0]


def test_wrpo_gradients_as_published():
    chosen, rejected = PUBLISHED.chosen.clone().requires_grad_(), PUBLISHED.rejected.clone().requires_grad_()
    run("wrpo", replace(PUBLISHED, chosen=chosen, rejected=rejected, progress=0.5)).loss.mean().backward()
    expected = [[-0.000119753, -0.002275309], [-0.000121376, -0.002306144]]
    torch.testing.assert_close(chosen.grad, exact(expected), rtol=0, atol=5e-10)
    torch.testing.assert_close(rejected.grad, exact([0.002395062, 0.002427520]), rtol=0, atol=5e-10)


def test_two_dpo_losses_as_published():
    assert run("dpo", PUBLISHED, beta=0.01).loss.tolist() == pytest.approx([0.59607083, 0.67339718], abs=FLOAT32)


def test_schedules():
    assert [scheduled(0.1, "linear", step / 10) for step in (0, 1, 5, 10, 11)] == pytest.approx(
        [0, 0.01, 0.05, 0.1, 0.1]
    )
    assert [scheduled(0.1, "constant", step / 10) for step in (0, 5, 11)] == [0.1, 0.1, 0.1]
    assert [scheduled(1, "cosine", step / 4) for step in range(5)] == pytest.approx([0, 0.1464466, 0.5, 0.8535534, 1])


@pytest.mark.parametrize(
    ("column", "beta", "margin", "loss"),
    [(1, 10, 1.2, 0.26328247), (1, 0.1, None, 0.68716518), (0, 10, 2.0, 0.12692801)],
)
def test_length_normalised_dpo_as_published(column, beta, margin, loss):
    outcome = run("dpo_norm", one_chosen(PUBLISHED, column), beta=beta)
    assert outcome.loss[0].item() == pytest.approx(loss, abs=FLOAT32)
    if margin:
        assert outcome.margins[0].item() == pytest.approx(margin)


def test_length_normalised_wrpo_as_published():
    outcome = run("wrpo", replace(PUBLISHED, progress=1.0), beta=10, length_normalised=True)
    assert outcome.margins[0].item() == pytest.approx(1.28)
    assert outcome.loss[0].item() == pytest.approx(0.24532554, abs=FLOAT32)


def test_accuracies_of_the_published_example():
    """The target's rewards (.3, −.1) beat (.2, −.2) in both rows; the authors' metric says .75."""
    rows = replace(
        PUBLISHED,
        chosen=exact([[0, 0.3], [0, -0.1]]),
        reference_chosen=exact([[0, 0], [0, 0]]),
        rejected=exact([0.2, -0.2]),
        reference_rejected=exact([0, 0]),
    )
    outcome = run("wrpo", rows, beta=1.0, alpha=0.0)
    assert outcome.accuracies.tolist() == [1.0, 1.0]
    assert outcome.chosen_accuracies[:, 1].tolist() == [1.0, 1.0]


@pytest.mark.parametrize("name", ALL)
def test_shapes(name):
    outcome = run(name, random_rows(1))
    assert (
        outcome.loss.shape
        == outcome.rejected_rewards.shape
        == outcome.margins.shape
        == outcome.accuracies.shape
        == (8,)
    )
    assert outcome.chosen_rewards.shape == outcome.chosen_accuracies.shape == (8, 2)
    assert not outcome.margins.requires_grad and not outcome.chosen_rewards.requires_grad
    assert (outcome.loss == outcome.loss).all() and 0 < outcome.accuracies.mean() < 1


@pytest.mark.parametrize("name", ALL)
def test_gradients(name):
    rows = random_rows(2)
    # Weights of at most 1 have no gradient: hold them at 1.
    rows = replace(rows, chosen_squares=rows.chosen_squares - 9, rejected_squares=rows.rejected_squares - 9)

    def loss(chosen, rejected):
        return run(name, replace(rows, chosen=chosen, rejected=rejected)).loss

    inputs = (rows.chosen.clone().requires_grad_(), rows.rejected.clone().requires_grad_())
    assert torch.autograd.gradcheck(loss, inputs)


@pytest.mark.parametrize(("name", "chosen"), [(name, 3) for name in ALL] + [(name, 1) for name in PAIRWISE])
def test_chosen_go_up_and_rejected_down(name, chosen):
    """Raising a chosen log-probability lowers the loss of an unsatisfied pair, raising the rejected one raises it."""
    rows = random_rows(3, chosen)
    inputs = (rows.chosen.clone().requires_grad_(), rows.rejected.clone().requires_grad_())
    options = {option: value for option, value in FAR.items() if option in OBJECTIVES[name].defaults}
    run(name, replace(rows, chosen=inputs[0], rejected=inputs[1]), **options).loss.sum().backward()
    assert (inputs[0].grad < 0).all() and (inputs[1].grad > 0).all()


@pytest.mark.parametrize("name", PAIRWISE)
def test_several_chosen_are_the_mean_of_pairs(name):
    rows = random_rows(4)
    pairs = [run(name, one_chosen(rows, column)).loss for column in range(2)]
    torch.testing.assert_close(run(name, rows).loss, torch.stack(pairs).mean(0))


@pytest.mark.parametrize("name", ALL)
def test_nll_is_that_of_a_chosen_token(name):
    """Its gradient is −nll / n at each chosen response, shared by several, and nothing at the rejected one."""
    rows = random_rows(9)
    plain, added = (
        replace(rows, chosen=rows.chosen.clone().requires_grad_(), rejected=rows.rejected.clone().requires_grad_())
        for _ in range(2)
    )
    without, outcome = run(name, plain), run(name, added, nll=0.2)
    torch.testing.assert_close(
        outcome.loss - without.loss, 0.2 * (-rows.chosen / rows.chosen_lengths).mean(1), check_dtype=False
    )
    without.loss.sum().backward()
    outcome.loss.sum().backward()
    torch.testing.assert_close(added.chosen.grad - plain.chosen.grad, -0.2 / 2 / rows.chosen_lengths)
    torch.testing.assert_close(added.rejected.grad, plain.rejected.grad)
    assert torch.equal(outcome.margins, without.margins)


def test_ipo_divides_by_lengths_unless_told():
    rows = one_chosen(random_rows(10))
    for normalised in (True, False):
        chosen, rejected = rows.ratios(normalised)
        options = {} if normalised else {"length_normalised": False}
        expected = (chosen - rejected)[:, 0] - 5
        torch.testing.assert_close(run("ipo", rows, beta=0.1, **options).loss, expected**2)


def test_wrpo_without_sources_share_is_dpo():
    rows = random_rows(5)
    torch.testing.assert_close(run("wrpo", rows, alpha=0.0, beta=0.1).loss, run("dpo", one_chosen(rows), beta=0.1).loss)


def test_wrpo_divides_alpha_among_sources():
    rows = random_rows(6, chosen=3)
    only_second = run("wrpo", rows, alpha=1.0, schedule="constant", weights=(0, 2), beta=0.1)
    torch.testing.assert_close(only_second.loss, run("dpo", one_chosen(rows, 1), beta=0.1).loss)
    same_twice = replace(rows, chosen=rows.chosen[:, [0, 0, 2]], reference_chosen=rows.reference_chosen[:, [0, 0, 2]])
    two = replace(rows, chosen=rows.chosen[:, [0, 2]], reference_chosen=rows.reference_chosen[:, [0, 2]])
    torch.testing.assert_close(run("wrpo", same_twice).loss, run("wrpo", two).loss)


@pytest.mark.parametrize("weights", [(1.0,), (0.0, 0.0)])
def test_wrpo_refuses_weights_that_fit_no_sources(weights):
    with pytest.raises(ValueError, match="a weight for each of 2 sources"):
        run("wrpo", random_rows(6, chosen=3), weights=weights)


def test_wpo_weighs_at_most_1():
    rows = one_chosen(random_rows(7))
    likely = replace(rows, chosen_squares=rows.chosen_squares - 9, rejected_squares=rows.rejected_squares - 9)
    torch.testing.assert_close(run("wpo", likely, beta=0.1).loss, run("dpo", rows, beta=0.1).loss)
    unlikely = replace(rows, chosen_squares=rows.chosen_squares * 0, rejected_squares=rows.rejected_squares * 0)
    weights = torch.exp((rows.chosen / rows.chosen_lengths)[:, 0] + rows.rejected / rows.rejected_lengths)
    torch.testing.assert_close(run("wpo", unlikely, beta=0.1).loss, weights * run("dpo", rows, beta=0.1).loss)


def test_sppo_takes_probabilities():
    rows = one_chosen(random_rows(8))
    even = replace(rows, chosen_wins=torch.full((8, 1), 0.5), rejected_wins=torch.full((8,), 0.5))
    chosen, rejected = rows.ratios()
    torch.testing.assert_close(run("sppo", even).loss, ((chosen**2 + rejected**2) / 2)[:, 0])


def test_log_of_one_minus_exp():
    x = exact([-1e-12, -1e-3, -0.69, -0.7, -5, -40])
    expected = exact([-27.631021115928547, -6.908255237312434, -0.6963054, -0.6863364, -0.0067607, -4.248354e-18])
    torch.testing.assert_close(log1mexp(x), expected, rtol=1e-4, atol=0)
    x = torch.tensor([0.0, -1e-30, -200.0], requires_grad=True)
    log1mexp(x).sum().backward()
    assert torch.isfinite(log1mexp(x)).all() and torch.isfinite(x.grad).all()


def test_options_are_held_to_the_signature():
    problems: list[str] = []
    assert OBJECTIVES["wrpo"].options({"alpha": 0.2, "weights": [1, 2]}, problems)["weights"] == (1, 2)
    assert not problems
    OBJECTIVES["wrpo"].options({"aplha": 0.2, "beta": -1, "schedule": "cubic"}, problems)
    assert len(problems) == 3
    assert "no option 'aplha'. Did you mean 'alpha'?" in problems[0]
    assert "beta: Input should be greater than 0, got -1" in problems[1]
    assert "schedule: Input should be 'linear', 'constant' or 'cosine'" in problems[2]
