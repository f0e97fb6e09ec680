"""Objectives of averages over an answer's tokens, ā, most of them without a reference."""

from __future__ import annotations

from torch import Tensor
from torch.nn.functional import relu, softplus

from mergekit_lite.distillation.objectives.logarithms import log1mexp
from mergekit_lite.distillation.objectives.objective import LogProbs, Outcome, Smoothing, logistic, objective, pairwise
from mergekit_lite.distillation.objectives.options import NonNegative, Positive


@objective(
    "−log σ(β(ā_w − ā_l) − γ)",
    "SimPO, 2405.14734",
    "no reference, so half the passes; sensitive to its options",
    reference=False,
)
def simpo(rows: LogProbs, *, beta: Positive = 2.0, gamma: NonNegative = 1.0, smoothing: Smoothing = 0.0) -> Outcome:
    """Return −log σ(β(ā_w − ā_l) − γ). The paper gives γ as γ/β."""
    chosen, rejected = rows.averages()
    return pairwise(logistic(beta * (chosen - rejected) - gamma, smoothing), beta * chosen, beta * rejected)


@objective("−ā_w − λ log σ(log-odds)", "ORPO, 2403.07691", "without SFT before", reference=False)
def orpo(rows: LogProbs, *, weight: NonNegative = 0.1) -> Outcome:
    """Return −ā_w − λ log σ(o_w − o_l), with the log-odds o = ā − log(1 − e^ā) and λ = ``weight``.

    The paper's first term covers prompt and response, here it covers the response.
    """
    chosen, rejected = rows.averages()
    odds = _log_odds(chosen) - _log_odds(rejected)
    return pairwise(-chosen + weight * softplus(-odds), weight * chosen, weight * rejected)


@objective(
    "−log σ(β(o_w − o_l))",
    "tempered ORPO, 2502.01237",
    "after SFT: ORPO without its likelihood term; β is to be tried",
    reference=False,
)
def orpo_align(rows: LogProbs, *, beta: Positive = 1.0) -> Outcome:
    """Return −log σ(β(o_w − o_l)), with o as in ``orpo``, whose second term it is with β = 1."""
    chosen, rejected = map(_log_odds, rows.averages())
    return pairwise(softplus(-beta * (chosen - rejected)), beta * chosen, beta * rejected)


@objective(
    "−log σ(βo_w) − log σ(−βo_l)",
    "tempered ASFT, 2502.01237",
    "after SFT: each answer by itself, not against the other",
    reference=False,
)
def asft_align(rows: LogProbs, *, beta: Positive = 1.0) -> Outcome:
    """Return −log σ(βo_w) − log σ(−βo_l), with o as in ``orpo``. With β = 1 that is −ā_w − log(1 − e^ā_l)."""
    chosen, rejected = map(_log_odds, rows.averages())
    loss = softplus(-beta * chosen) + softplus(beta * rejected)
    return pairwise(loss, beta * chosen, beta * rejected)


@objective(
    "−ā_w − λ(log σ(o_w) + log σ(−o_l))",
    "ASFT, 2409.10571",
    "without SFT before; `orpo` against the other answer",
    reference=False,
)
def asft(rows: LogProbs, *, weight: NonNegative = 1.0) -> Outcome:
    """Return −ā_w − λ(log σ(o_w) + log σ(−o_l)), with o as in ``orpo`` and λ = ``weight``: never below ``orpo``'s.

    Of λ in {0.1, 0.2, 0.5, 1} the last was the best for both (2502.01237, 5.1).
    """
    averages = rows.averages()
    chosen, rejected = map(_log_odds, averages)
    loss = -averages[0] + weight * (softplus(-chosen) + softplus(rejected))
    return pairwise(loss, weight * chosen, weight * rejected)


@objective("max(0, γ − (ā_w − ā_l))", "RePO, 2503.07426", "SimPO with one option less", reference=False)
def repo(rows: LogProbs, *, gamma: NonNegative = 0.5) -> Outcome:
    """Return max(0, γ − (ā_w − ā_l)), the limit of SimPO as β → ∞."""
    chosen, rejected = rows.averages()
    return pairwise(relu(gamma - (chosen - rejected)), chosen, rejected)


@objective(
    "−log σ(β(ā_w − ā_l − log(1 + e^K))), K = ā_ref,w − ā_ref,l",
    "MIPO, 2409.17545",
    "pairs that the reference has right already are held to it, others are free; β 5 to 25",
)
def mipo(rows: LogProbs, *, beta: Positive = 10.0) -> Outcome:
    """Return −log σ(β(ā_w − ā_l − log(1 + e^K))) with K = ā_ref,w − ā_ref,l, averages like ā.

    Where K ≪ 0 the reference has no say, where K ≫ 0 it is ``dpo_norm``.
    """
    assert rows.reference_chosen is not None and rows.reference_rejected is not None
    chosen, rejected = rows.averages()
    reference = rows.reference_chosen / rows.chosen_lengths - (rows.reference_rejected / rows.rejected_lengths)[:, None]
    return pairwise(softplus(-beta * (chosen - rejected - softplus(reference))), beta * chosen, beta * rejected)


def _log_odds(average: Tensor) -> Tensor:
    """Return o = ā − log(1 − e^ā)."""
    return average - log1mexp(average)
