"""The published losses of preference training, as pure functions of log-probabilities.

A row is a prompt with C chosen responses and a rejected one. s(y) is the log-probability of a response under the model
that is trained, summed over its tokens; s_ref(y) is the same under the reference, the model that training started from;
n(y) is the number of its tokens, with the end of the turn. Then

    ρ(y) = s(y) − s_ref(y)      ρ̄ = ρ / n      ā = s / n      softplus(x) = log(1 + eˣ) = −log σ(−x)

The index w marks a chosen response, l the rejected one. Every objective takes ``LogProbs`` and its options as keyword
arguments, which are the recipe's ``options``, and returns an ``Outcome``. With several chosen responses in a row,
``wrpo`` weighs their rewards; all others return the mean of the losses of each with the rejected one.

The option ``nll`` of every objective adds nll · (−ā_w), the negative log-likelihood of a token of the chosen response,
averaged over several of them. It keeps chosen responses likely, where the loss alone would be content with making the
rejected ones unlikely faster (RPO, 2404.19733, whose α it is; ``rpo_alpha`` of earlier versions of TRL, ``pref_ftx`` of
LLaMA-Factory).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import cos, pi
from typing import Annotated, Any, Literal

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import relu, softplus

from mergekit_lite.distillation.objectives.logarithms import log1mexp
from mergekit_lite.distillation.objectives.options import NonNegative, Positive, Share, checked, defaults

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]
Schedule = Literal["linear", "constant", "cosine"]


@dataclass(frozen=True)
class LogProbs:
    """The log-probabilities of a batch of B rows with C chosen responses each; all tensors are floating.

    Attributes:
        chosen: (B, C); s of the chosen responses, sources' before the target's own.
        rejected: (B,); s of the rejected responses.
        chosen_lengths: (B, C).
        rejected_lengths: (B,).
        reference_chosen: (B, C); s_ref. None for objectives without reference.
        reference_rejected: (B,).
        chosen_squares: (B, C); mean_t log Σ_v π(v)². None for objectives without ``squares``.
        rejected_squares: (B,).
        chosen_wins: (B, C); the probability that a response beats the others to its prompt. None stands for 1.
        rejected_wins: (B,). None stands for 0.
        progress: the share of the training's steps that are done.
    """

    chosen: Tensor
    rejected: Tensor
    chosen_lengths: Tensor
    rejected_lengths: Tensor
    reference_chosen: Tensor | None = None
    reference_rejected: Tensor | None = None
    chosen_squares: Tensor | None = None
    rejected_squares: Tensor | None = None
    chosen_wins: Tensor | None = None
    rejected_wins: Tensor | None = None
    progress: float = 0.0

    def ratios(self, normalised: bool = False) -> tuple[Tensor, Tensor]:
        """Return ρ of the chosen (B, C) and the rejected (B, 1) responses, or ρ̄ if ``normalised``."""
        assert self.reference_chosen is not None and self.reference_rejected is not None
        chosen = self.chosen - self.reference_chosen
        rejected = self.rejected - self.reference_rejected
        if normalised:
            chosen, rejected = chosen / self.chosen_lengths, rejected / self.rejected_lengths
        return chosen, rejected[:, None]

    def averages(self) -> tuple[Tensor, Tensor]:
        """Return ā of the chosen (B, C) and the rejected (B, 1) responses."""
        return self.chosen / self.chosen_lengths, (self.rejected / self.rejected_lengths)[:, None]


@dataclass(frozen=True)
class Outcome:
    """The loss of a batch, and figures for the log, which have no gradient.

    Attributes:
        loss: (B,).
        chosen_rewards: (B, C); rewards as the objective defines them.
        rejected_rewards: (B,).
        margins: (B,); the chosen rewards, taken together, minus the rejected one.
        alpha: the weight of the sources, for objectives that have one.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    alpha: float | None = None

    @property
    def accuracies(self) -> Tensor:
        """(B,); 1 where the margin is positive, else 0."""
        return (self.margins > 0).to(self.margins.dtype)

    @property
    def chosen_accuracies(self) -> Tensor:
        """(B, C); 1 where a chosen reward is above the rejected one, else 0."""
        return (self.chosen_rewards > self.rejected_rewards[:, None]).to(self.margins.dtype)


@dataclass(frozen=True)
class Objective:
    """An objective by its name in recipes."""

    name: str  # of the function
    function: Callable[..., Outcome]  # of LogProbs and keyword arguments
    formula: str  # the loss of one chosen and the rejected response
    source: str  # the paper, or what the formula is taken from
    when: str  # the case that the objective is good for
    reference: bool = True  # whether it needs s_ref
    squares: bool = False  # whether it needs log Σ π²
    fuses: bool = False  # whether it weighs chosen responses of sources against one of the target: it needs both

    def __call__(self, rows: LogProbs, *, nll: float = 0.0, **options: Any) -> Outcome:
        """Return the outcome of ``function`` under its options, with nll · (−ā_w) added to the loss."""
        outcome = self.function(rows, **options)
        return replace(outcome, loss=outcome.loss + nll * -rows.averages()[0].mean(1)) if nll else outcome

    @property
    def defaults(self) -> dict[str, Any]:
        """The default values of the options."""
        return defaults(self.function) | {"nll": 0.0}

    def options(self, given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        """Return all keyword arguments of ``function``; wrong names and values become ``problems``."""
        return checked(f"objective {self.name}", self.function, given, problems, {"nll": (NonNegative, 0.0)})


OBJECTIVES: dict[str, Objective] = {}


def objective(
    formula: str, source: str, when: str, **needs: bool
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Register an objective under its function's name; all arguments are attributes of ``Objective``."""

    def register(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        OBJECTIVES[function.__name__] = Objective(function.__name__, function, formula, source, when, **needs)
        return function

    return register


@objective("−log σ(β(ρ_w − ρ_l))", "DPO, 2305.18290", "the baseline; β 0.01 to 0.1")
def dpo(rows: LogProbs, *, beta: Positive = 0.1, smoothing: Smoothing = 0.0) -> Outcome:
    """Return −(1−ε) log σ(z) − ε log σ(−z), z = β(ρ_w − ρ_l), with the smoothing ε of conservative DPO."""
    chosen, rejected = rows.ratios()
    return _pairwise(_logistic(beta * (chosen - rejected), smoothing), beta * chosen, beta * rejected)


@objective("−log σ(β(ρ̄_w − ρ̄_l))", "Tülu 3, 2411.15124", "lengths of chosen and rejected differ much; β 5 to 10")
def dpo_norm(rows: LogProbs, *, beta: Positive = 10.0, smoothing: Smoothing = 0.0) -> Outcome:
    """Return the loss of DPO with each log-ratio divided by its response's length: z = β(ρ̄_w − ρ̄_l).

    FuseChat-3.0 trains its Llama targets so, with β = 10.
    """
    chosen, rejected = rows.ratios(normalised=True)
    return _pairwise(_logistic(beta * (chosen - rejected), smoothing), beta * chosen, beta * rejected)


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
    return Outcome(_logistic(margins, smoothing), rewards, rejected_rewards, margins.detach(), alpha_t)


@objective(
    "−log σ(β(ā_w − ā_l) − γ)",
    "SimPO, 2405.14734",
    "no reference, so half the passes; sensitive to its options",
    reference=False,
)
def simpo(rows: LogProbs, *, beta: Positive = 2.0, gamma: NonNegative = 1.0, smoothing: Smoothing = 0.0) -> Outcome:
    """Return −log σ(β(ā_w − ā_l) − γ). The paper gives γ as γ/β."""
    chosen, rejected = rows.averages()
    return _pairwise(_logistic(beta * (chosen - rejected) - gamma, smoothing), beta * chosen, beta * rejected)


@objective("(ρ̄_w − ρ̄_l − 1/(2β))²", "IPO, 2310.12036", "noisy labels: it doesn't push a pair on for ever")
def ipo(rows: LogProbs, *, beta: Positive = 0.1, length_normalised: bool = True) -> Outcome:
    """Return (ρ̄_w − ρ̄_l − 1/(2β))², or the same with ρ without ``length_normalised``.

    The paper's formula has ρ. Its authors told TRL's that they ran it with averages over tokens, as TRL has it.
    """
    chosen, rejected = rows.ratios(length_normalised)
    return _pairwise((chosen - rejected - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected)


@objective("−ā_w − λ log σ(log-odds)", "ORPO, 2403.07691", "without SFT before", reference=False)
def orpo(rows: LogProbs, *, weight: NonNegative = 0.1) -> Outcome:
    """Return −ā_w − λ log σ(o_w − o_l), with the log-odds o = ā − log(1 − e^ā) and λ = ``weight``.

    The paper's first term covers prompt and response, here it covers the response.
    """
    chosen, rejected = rows.averages()
    odds = (chosen - log1mexp(chosen)) - (rejected - log1mexp(rejected))
    return _pairwise(-chosen + weight * softplus(-odds), weight * chosen, weight * rejected)


@objective("max(0, γ − (ā_w − ā_l))", "RePO, 2503.07426", "SimPO with one option less", reference=False)
def repo(rows: LogProbs, *, gamma: NonNegative = 0.5) -> Outcome:
    """Return max(0, γ − (ā_w − ā_l)), the limit of SimPO as β → ∞."""
    chosen, rejected = rows.averages()
    return _pairwise(relu(gamma - (chosen - rejected)), chosen, rejected)


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
    loss = log_weights.detach().clamp(max=0).exp() * _logistic(beta * (chosen - rejected), smoothing)
    return _pairwise(loss, beta * chosen, beta * rejected)


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
    return _pairwise(loss, beta * chosen, beta * rejected)


@objective("−log σ(β(ρ_w − ρ_l) + α(n_w − n_l))", "R-DPO, 2403.19159", "answers get longer and longer")
def rdpo(rows: LogProbs, *, beta: Positive = 0.1, alpha: NonNegative = 0.02) -> Outcome:
    """Return −log σ(β(ρ_w − ρ_l) + α(n_w − n_l)): pairs whose chosen response is longer have smaller gradients."""
    chosen, rejected = rows.ratios()
    longer = rows.chosen_lengths - rows.rejected_lengths[:, None]
    return _pairwise(_logistic(beta * (chosen - rejected) + alpha * longer, 0.0), beta * chosen, beta * rejected)


def scheduled(final: float, schedule: Schedule, progress: float) -> float:
    """Return the value of a number that grows to ``final`` over training.

    With t the share of steps done, held to [0, 1]: ``linear`` (WRPO's) is t · final, ``constant`` is final from the
    start, and ``cosine`` is (1 − cos πt) / 2 · final.
    """
    t = min(max(progress, 0.0), 1.0)
    return final * {"linear": t, "constant": 1.0, "cosine": (1 - cos(pi * t)) / 2}[schedule]


def _pairwise(loss: Tensor, chosen: Tensor, rejected: Tensor) -> Outcome:
    """Return the outcome of losses (B, C) and rewards (B, C) and (B, 1): the loss of a row is its mean over C."""
    margins = (chosen - rejected).mean(1)
    return Outcome(loss.mean(1), chosen.detach(), rejected[:, 0].detach(), margins.detach())


def _logistic(margin: Tensor, smoothing: float) -> Tensor:
    """Return −(1−ε) log σ(z) − ε log σ(−z)."""
    if not smoothing:
        return softplus(-margin)
    return (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)
