"""Objectives made for rounds of training: each round samples the model as it is by then, pairs and trains."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from mergekit_lite.distillation.objectives.log_ratios import dpo
from mergekit_lite.distillation.objectives.objective import LogProbs, Outcome, logistic, objective, pairwise
from mergekit_lite.distillation.objectives.options import Count, NonNegative, Positive, Share


@objective(
    "DPO + αβ ρ(y_own)",
    "SELM, 2405.19332",
    "rounds that explore: answers like the model's own become less likely",
    own=True,
)
def selm(rows: LogProbs, *, beta: Positive = 0.01, alpha: NonNegative = 0.001) -> Outcome:
    """Return DPO's loss + αβ ρ(y_own), y_own the answer that the model gave when the round began.

    The authors' first round is plain DPO, as α = 0 is.
    """
    assert rows.own is not None and rows.reference_own is not None
    outcome = dpo(rows, beta=beta)
    return replace(outcome, loss=outcome.loss + alpha * beta * (rows.own - rows.reference_own))


@objective(
    "(h − 1/(2η))², h = s_w − s_l − (τ/η)(s_ref,w − s_ref,l) − (1 − τ/η)(s_t,w − s_t,l)",
    "INPO, 2407.00617",
    "rounds by general preferences: near the first model and near the last round's",
    rounds=True,
)
def inpo(rows: LogProbs, *, eta: Positive = 0.005, ratio: Share = 1 / 3) -> Outcome:
    """Return (h − 1/(2η))², equation 8 of the paper; ``ratio`` is τ/η. Both defaults are the paper's.

    The rewards are η times the log-ratio to π_ref^(τ/η) π_t^(1 − τ/η). In the first round, where both are the same
    model, the loss is that of ``ipo`` with β = η and without lengths.
    """
    assert rows.round_chosen is not None and rows.round_rejected is not None
    chosen, rejected = rows.ratios()  # to π_ref
    chosen = ratio * chosen + (1 - ratio) * (rows.chosen - rows.round_chosen)
    rejected = ratio * rejected + (1 - ratio) * (rows.rejected - rows.round_rejected)[:, None]
    return pairwise((chosen - rejected - 1 / (2 * eta)) ** 2, eta * chosen, eta * rejected)


@objective(
    "DPO; with the label smoothed by ε where β(Δ_mixed − Δ_ref) is in the lowest 10 %",
    "SPA, 2406.04412",
    "rounds labelled by the model itself: it doubts its least sure pairs",
    mixes=True,
)
def spa(
    rows: LogProbs,
    *,
    beta: Positive = 0.1,
    smoothing: Share = 0.1,
    mix: Positive = 1.0,
    quantile: Share = 0.1,
    window: Count = 50,
    start: Share = 0.2,
) -> Outcome:
    """Return DPO's loss, smoothed by ε = ``smoothing`` where the model is not sure of the label, as in ``dpo``.

    It is sure of a pair where β[(s_mix,w − s_mix,l) − (s_ref,w − s_ref,l)] is above the gap, the ``quantile`` of the
    last ``window`` pairs. s_mix is under the logits m z + (1 − m) z_ref, m = ``mix``: above 1 it goes on beyond the
    model, away from the reference; 1, the released default, is the model alone. Before the share ``start`` of the steps
    is done, the loss is DPO's.
    """
    assert rows.mixed_chosen is not None and rows.mixed_rejected is not None
    assert rows.reference_chosen is not None and rows.reference_rejected is not None
    chosen, rejected = rows.ratios()
    mixed = (rows.mixed_chosen - rows.reference_chosen) - (rows.mixed_rejected - rows.reference_rejected)[:, None]
    confidences, margins = (beta * mixed).detach(), beta * (chosen - rejected)
    sure = (confidences > rows.gap) | (rows.progress < start)
    loss = logistic(margins, 0.0).where(sure, logistic(margins, smoothing))
    return replace(pairwise(loss, beta * chosen, beta * rejected), confidences=confidences)


def gap_of(confidences: Sequence[float], window: int, quantile: float) -> float:
    """Return the gap of ``spa``: the middle of two neighbours among the sorted confidences, 0 while there are too few.

    Of n confidences in ascending order, counted from 0, these are number ⌊quantile · n⌋ and the next.
    """
    if len(confidences) < window:
        return 0.0
    ordered = sorted(confidences)
    place = min(int(quantile * len(ordered)), len(ordered) - 1)
    return (ordered[place] + ordered[min(place + 1, len(ordered) - 1)]) / 2
