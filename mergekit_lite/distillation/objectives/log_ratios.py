"""Objectives of log-ratios to a reference, ρ."""

from __future__ import annotations

from math import cos, pi
from typing import Literal

import torch

from mergekit_lite.distillation.objectives.objective import LogProbs, Outcome, Smoothing, logistic, objective, pairwise
from mergekit_lite.distillation.objectives.options import NonNegative, Positive, Share

Schedule = Literal["linear", "constant", "cosine"]


@objective("−log σ(β(ρ_w − ρ_l))", "DPO, 2305.18290", "the baseline; β 0.01 to 0.1")
def dpo(rows: LogProbs, *, beta: Positive = 0.1, smoothing: Smoothing = 0.0) -> Outcome:
    """Return −(1−ε) log σ(z) − ε log σ(−z), z = β(ρ_w − ρ_l), with the smoothing ε of conservative DPO."""
    chosen, rejected = rows.ratios()
    return pairwise(logistic(beta * (chosen - rejected), smoothing), beta * chosen, beta * rejected)


@objective("−log σ(β(ρ̄_w − ρ̄_l))", "Tülu 3, 2411.15124", "lengths of chosen and rejected differ much; β 5 to 10")
def dpo_norm(rows: LogProbs, *, beta: Positive = 10.0, smoothing: Smoothing = 0.0) -> Outcome:
    """Return the loss of DPO with each log-ratio divided by its response's length: z = β(ρ̄_w − ρ̄_l).

    FuseChat-3.0 trains its Llama targets so, with β = 10.
    """
    chosen, rejected = rows.ratios(normalised=True)
    return pairwise(logistic(beta * (chosen - rejected), smoothing), beta * chosen, beta * rejected)


@objective(
    "−log σ(β(α Σ_i v_i ρ(y_i) + (1 − α) ρ(y_t) − ρ_l))",
    "WRPO, 2412.03187",
    "pairs of the rule `wrpo`: chosen responses of sources, y_i, and of the target, y_t",
    fuses=True,
)
def wrpo(
    rows: LogProbs,
    *,
    beta: Positive = 0.01,
    alpha: Share = 0.1,
    schedule: Schedule = "linear",
    weights: tuple[NonNegative, ...] | None = None,
    length_normalised: bool = False,
    smoothing: Smoothing = 0.0,
) -> Outcome:
    """Return −log σ(z), z = β[α_t Σ_i v_i ρ(y_i) + (1 − α_t) ρ(y_t) − ρ(y_l)].

    The chosen responses are the sources', y_i, and last the target's own, y_t. α_t grows to ``alpha`` by the
    ``schedule``. ``weights`` divides it among several sources, evenly by default. ``length_normalised`` takes ρ̄ for ρ.
    The smoothing is that of ``dpo``.

    Raises:
        ValueError: fewer than two chosen responses, or not one weight for each source.
    """
    sources = rows.chosen.shape[1] - 1
    if sources < 1:
        raise ValueError("wrpo needs a source's and the target's chosen response in every row")
    if weights is not None and (len(weights) != sources or not sum(weights)):
        raise ValueError(f"wrpo needs a weight for each of {sources} sources, not all 0, got {weights}")
    shares = rows.chosen.new_tensor(weights or (1.0,) * sources)
    alpha_t = scheduled(alpha, schedule, rows.progress)
    chosen, rejected = rows.ratios(length_normalised)
    fused = alpha_t * (chosen[:, :-1] * (shares / shares.sum())).sum(1) + (1 - alpha_t) * chosen[:, -1]
    margins = beta * (fused - rejected[:, 0])
    rewards, rejected_rewards = (beta * chosen).detach(), (beta * rejected[:, 0]).detach()
    return Outcome(logistic(margins, smoothing), rewards, rejected_rewards, margins.detach(), alpha_t)


@objective("(ρ̄_w − ρ̄_l − 1/(2β))²", "IPO, 2310.12036", "noisy labels: it doesn't push a pair on for ever")
def ipo(rows: LogProbs, *, beta: Positive = 0.1, length_normalised: bool = True) -> Outcome:
    """Return (ρ̄_w − ρ̄_l − 1/(2β))², or the same with ρ without ``length_normalised``.

    The paper's formula has ρ. Its authors told TRL's that they ran it with averages over tokens, as TRL has it.
    """
    chosen, rejected = rows.ratios(length_normalised)
    return pairwise((chosen - rejected - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected)


@objective(
    "min(1, u_w u_l) · DPO",
    "WPO, 2406.11827",
    "off-policy pairs: u tells how likely a response is to the model",
    squares=True,
)
def wpo(rows: LogProbs, *, beta: Positive = 0.01, smoothing: Smoothing = 0.0) -> Outcome:
    """Return min(1, u_w u_l) · DPO, u = exp(mean_t (log π(y_t) − log Σ_v π(v)²)), without gradient through u.

    TRL has no bound of 1.
    """
    assert rows.chosen_squares is not None and rows.rejected_squares is not None
    chosen, rejected = rows.ratios()
    average_chosen, average_rejected = rows.averages()
    log_weights = (average_chosen - rows.chosen_squares) + (average_rejected - rows.rejected_squares[:, None])
    loss = log_weights.detach().clamp(max=0).exp() * logistic(beta * (chosen - rejected), smoothing)
    return pairwise(loss, beta * chosen, beta * rejected)


@objective(
    "½[(ρ_w − (P_w − ½)/β)² + (ρ_l − (P_l − ½)/β)²]",
    "SPPO, 2405.00675",
    "best and worst of many own samples; P: the probability that a response beats the others",
)
def sppo(rows: LogProbs, *, beta: Positive = 0.001) -> Outcome:
    """Return ½[(ρ_w − (P_w − ½)/β)² + (ρ_l − (P_l − ½)/β)²]; P is the probability that a response beats the others.

    Rows without P have 1 and 0, as in TRL's ``sppo_hard``, which doesn't halve the sum.
    """
    chosen, rejected = rows.ratios()
    wins = torch.ones_like(chosen) if rows.chosen_wins is None else rows.chosen_wins
    losses = torch.zeros_like(rejected) if rows.rejected_wins is None else rows.rejected_wins[:, None]
    loss = ((chosen - (wins - 0.5) / beta) ** 2 + (rejected - (losses - 0.5) / beta) ** 2) / 2
    return pairwise(loss, beta * chosen, beta * rejected)


@objective("−log σ(β(ρ_w − ρ_l) + α(n_w − n_l))", "R-DPO, 2403.19159", "answers get longer and longer")
def rdpo(rows: LogProbs, *, beta: Positive = 0.1, alpha: NonNegative = 0.02) -> Outcome:
    """Return −log σ(β(ρ_w − ρ_l) + α(n_w − n_l)): pairs whose chosen response is longer have smaller gradients."""
    chosen, rejected = rows.ratios()
    longer = rows.chosen_lengths - rows.rejected_lengths[:, None]
    return pairwise(logistic(beta * (chosen - rejected) + alpha * longer, 0.0), beta * chosen, beta * rejected)


def scheduled(final: float, schedule: Schedule, progress: float) -> float:
    """Return the value of a number that grows to ``final`` over training.

    With t the share of steps done, held to [0, 1]: ``linear`` (WRPO's) is t · final, ``constant`` is final from the
    start, and ``cosine`` is (1 − cos πt) / 2 · final.
    """
    t = min(max(progress, 0.0), 1.0)
    return final * {"linear": t, "constant": 1.0, "cosine": (1 - cos(pi * t)) / 2}[schedule]
