"""What preference training minimises: pure functions of log-probabilities, by name.

A row is a prompt with C chosen responses and a rejected one. s(y) is the log-probability of a response under the model
that is trained, summed over its tokens; s_ref(y) the same under the reference, the model that training started from;
n(y) the number of its tokens, the end of the turn included. Then

    ρ(y) = s(y) − s_ref(y)      ρ̄ = ρ / n      ā = s / n      softplus(x) = log(1 + eˣ) = −log σ(−x)

Every objective takes ``LogProbs`` and its own numbers as keywords, which are the recipe's ``options``, and gives an
``Outcome``. Where a row has several chosen responses, ``wrpo`` weighs their rewards; all others take the mean of the
losses of each with the rejected one.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Annotated, Any, get_type_hints

import torch
from pydantic import Field, TypeAdapter, ValidationError
from torch import Tensor
from torch.nn.functional import relu, softplus

from mergekit_lite.distillation.schedules import Schedule, scheduled
from mergekit_lite.errors import nearest

Positive = Annotated[float, Field(gt=0)]
NonNegative = Annotated[float, Field(ge=0)]
Share = Annotated[float, Field(ge=0, le=1)]
Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


@dataclass(frozen=True)
class LogProbs:
    """What a batch of B rows with C chosen responses each comes to; all floating.

    Attributes:
        chosen: (B, C); s of the chosen responses: where sources' and the target's stand together, sources first.
        rejected: (B,); s of the rejected responses.
        chosen_lengths: (B, C).
        rejected_lengths: (B,).
        reference_chosen: (B, C); s_ref. None for objectives without reference.
        reference_rejected: (B,).
        chosen_squares: (B, C); mean_t log Σ_v π(v)², for ``wpo`` only.
        rejected_squares: (B,).
        chosen_wins: (B, C); how probably a response beats the others to its prompt, for ``sppo``. None for 1.
        rejected_wins: (B,). None for 0.
        progress: the share of training's steps that are done.
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
        """ρ of the chosen (B, C) and, for each of them to be held against, the rejected (B, 1); or ρ̄."""
        assert self.reference_chosen is not None and self.reference_rejected is not None
        chosen = self.chosen - self.reference_chosen
        rejected = self.rejected - self.reference_rejected
        if normalised:
            chosen, rejected = chosen / self.chosen_lengths, rejected / self.rejected_lengths
        return chosen, rejected[:, None]

    def averages(self) -> tuple[Tensor, Tensor]:
        """ā of the chosen (B, C) and the rejected (B, 1)."""
        return self.chosen / self.chosen_lengths, (self.rejected / self.rejected_lengths)[:, None]


@dataclass(frozen=True)
class Outcome:
    """A batch's loss and what is told about it.

    Attributes:
        loss: (B,).
        chosen_rewards: (B, C); what the objective calls reward, without gradient, as all that follows.
        rejected_rewards: (B,).
        margins: (B,); how far the chosen rewards, taken together, are above the rejected one.
        alpha: the weight of the sources, where the objective has one.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    alpha: float | None = None

    @property
    def accuracies(self) -> Tensor:
        """(B,); 1 where the chosen are above the rejected."""
        return (self.margins > 0).to(self.margins.dtype)

    @property
    def chosen_accuracies(self) -> Tensor:
        """(B, C); the same for each chosen response by itself."""
        return (self.chosen_rewards > self.rejected_rewards[:, None]).to(self.margins.dtype)


@dataclass(frozen=True)
class Objective:
    """An objective by its name in recipes.

    Attributes:
        name: of the function.
        function: ``LogProbs`` and keywords to ``Outcome``.
        reference: whether it needs s_ref.
        squares: whether it needs log Σ π².
    """

    name: str
    function: Callable[..., Outcome]
    reference: bool = True
    squares: bool = False

    @property
    def defaults(self) -> dict[str, Any]:
        """The options with the values they have by default."""
        parameters = inspect.signature(self.function).parameters.values()
        return {one.name: one.default for one in parameters if one.kind is one.KEYWORD_ONLY}

    def options(self, given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        """The keywords for ``function``; what is wrong with the given ones goes to ``problems``."""
        kinds = get_type_hints(self.function, include_extras=True)
        options = self.defaults
        for name, value in given.items():
            if name not in options:
                known = f"It has {', '.join(options)}."
                problems.append(f"objective {self.name} has no option {name!r}.{nearest(name, options)} {known}")
                continue
            try:
                options[name] = TypeAdapter(kinds[name]).validate_python(value)
            except ValidationError as error:
                why = "; ".join(entry["msg"] for entry in error.errors())
                problems.append(f"objective {self.name}, option {name}: {why}, got {value!r}.")
        return options


OBJECTIVES: dict[str, Objective] = {}


def objective(
    *, reference: bool = True, squares: bool = False
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Register an objective under its function's name."""

    def register(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        name = function.__name__
        OBJECTIVES[name] = Objective(name, function, reference, squares)
        return function

    return register


@objective()
def dpo(rows: LogProbs, *, beta: Positive = 0.1, smoothing: Smoothing = 0.0) -> Outcome:
    """−(1−ε) log σ(z) − ε log σ(−z), z = β(ρ_w − ρ_l). Rafailov et al., 2305.18290; ε as in conservative DPO."""
    chosen, rejected = rows.ratios()
    return _pairwise(_logistic(beta * (chosen - rejected), smoothing), beta * chosen, beta * rejected)


@objective()
def dpo_norm(rows: LogProbs, *, beta: Positive = 10.0, smoothing: Smoothing = 0.0) -> Outcome:
    """DPO with each log-ratio divided by its response's length: z = β(ρ̄_w − ρ̄_l).

    Tülu 3, 2411.15124; FuseChat-3.0's Llama targets at β = 10.
    """
    chosen, rejected = rows.ratios(normalised=True)
    return _pairwise(_logistic(beta * (chosen - rejected), smoothing), beta * chosen, beta * rejected)


@objective()
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
    """−log σ(z), z = β[α_t Σ_i v_i ρ(y_i) + (1 − α_t) ρ(y_t) − ρ(y_l)]. WRPO, 2412.03187.

    The chosen responses are the sources', y_i, and last the target's own, y_t. α_t grows to ``alpha`` by the
    ``schedule``; ``weights`` divides it among several sources, evenly by default. ρ̄ in the place of ρ where
    ``length_normalised``. Smoothing as in ``dpo``.

    Raises:
        ValueError: fewer than two chosen, or another number of weights than of sources.
    """
    sources = rows.chosen.shape[1] - 1
    if sources < 1:
        raise ValueError("wrpo needs a source's and the target's chosen response in every row")
    if weights is not None and (len(weights) != sources or not sum(weights)):
        raise ValueError(f"wrpo needs a weight for each of {sources} sources, not all 0, got {weights}")
    shares = rows.chosen.new_tensor(weights or (1.0,) * sources)
    alpha_t = scheduled(alpha, schedule, rows.progress)
    chosen, rejected = rows.ratios(length_normalised)
    together = alpha_t * (chosen[:, :-1] * (shares / shares.sum())).sum(1) + (1 - alpha_t) * chosen[:, -1]
    margins = beta * (together - rejected[:, 0])
    return Outcome(
        _logistic(margins, smoothing),
        (beta * chosen).detach(),
        (beta * rejected[:, 0]).detach(),
        margins.detach(),
        alpha_t,
    )


@objective(reference=False)
def simpo(rows: LogProbs, *, beta: Positive = 2.0, gamma: NonNegative = 1.0, smoothing: Smoothing = 0.0) -> Outcome:
    """−log σ(β(ā_w − ā_l) − γ). SimPO, 2405.14734, where γ is given as γ/β."""
    chosen, rejected = rows.averages()
    return _pairwise(_logistic(beta * (chosen - rejected) - gamma, smoothing), beta * chosen, beta * rejected)


@objective()
def ipo(rows: LogProbs, *, beta: Positive = 0.1, length_normalised: bool = False) -> Outcome:
    """(ρ_w − ρ_l − 1/(2β))². Azar et al., 2310.12036; TRL takes ρ̄, which is ``length_normalised`` here."""
    chosen, rejected = rows.ratios(length_normalised)
    return _pairwise((chosen - rejected - 1 / (2 * beta)) ** 2, beta * chosen, beta * rejected)


@objective(reference=False)
def orpo(rows: LogProbs, *, weight: NonNegative = 0.1) -> Outcome:
    """−ā_w − λ log σ(o_w − o_l), with the log-odds o = ā − log(1 − e^ā) and λ = ``weight``. ORPO, 2403.07691.

    The original takes the first term over prompt and response; here it is over the response.
    """
    chosen, rejected = rows.averages()
    odds = (chosen - _log1mexp(chosen)) - (rejected - _log1mexp(rejected))
    return _pairwise(-chosen + weight * softplus(-odds), weight * chosen, weight * rejected)


@objective(reference=False)
def repo(rows: LogProbs, *, gamma: NonNegative = 0.5) -> Outcome:
    """max(0, γ − (ā_w − ā_l)). RePO, 2503.07426: SimPO as β → ∞."""
    chosen, rejected = rows.averages()
    return _pairwise(relu(gamma - (chosen - rejected)), chosen, rejected)


@objective(squares=True)
def wpo(rows: LogProbs, *, beta: Positive = 0.01, smoothing: Smoothing = 0.0) -> Outcome:
    """min(1, u_w u_l) · DPO, u = exp(mean_t (log π(y_t) − log Σ_v π(v)²)), without gradient. WPO, 2406.11827.

    TRL leaves the bound of 1 out.
    """
    assert rows.chosen_squares is not None and rows.rejected_squares is not None
    chosen, rejected = rows.ratios()
    average_chosen, average_rejected = rows.averages()
    log_weights = (average_chosen - rows.chosen_squares) + (average_rejected - rows.rejected_squares[:, None])
    loss = log_weights.detach().clamp(max=0).exp() * _logistic(beta * (chosen - rejected), smoothing)
    return _pairwise(loss, beta * chosen, beta * rejected)


@objective()
def sppo(rows: LogProbs, *, beta: Positive = 0.001) -> Outcome:
    """½[(ρ_w − (P_w − ½)/β)² + (ρ_l − (P_l − ½)/β)²], P: how probably a response beats the others. SPPO, 2405.00675.

    Rows that don't tell P have 1 and 0, as TRL's ``sppo_hard``, which doesn't halve the sum.
    """
    chosen, rejected = rows.ratios()
    wins = torch.ones_like(chosen) if rows.chosen_wins is None else rows.chosen_wins
    losses = torch.zeros_like(rejected) if rows.rejected_wins is None else rows.rejected_wins[:, None]
    loss = ((chosen - (wins - 0.5) / beta) ** 2 + (rejected - (losses - 0.5) / beta) ** 2) / 2
    return _pairwise(loss, beta * chosen, beta * rejected)


@objective()
def rdpo(rows: LogProbs, *, beta: Positive = 0.1, alpha: NonNegative = 0.02) -> Outcome:
    """−log σ(β(ρ_w − ρ_l) + α(n_w − n_l)): a pair whose chosen response is longer is pushed less. R-DPO, 2403.19159."""
    chosen, rejected = rows.ratios()
    longer = rows.chosen_lengths - rows.rejected_lengths[:, None]
    return _pairwise(_logistic(beta * (chosen - rejected) + alpha * longer, 0.0), beta * chosen, beta * rejected)


def _pairwise(loss: Tensor, chosen: Tensor, rejected: Tensor) -> Outcome:
    """The mean over the chosen responses of ``loss`` (B, C), and rewards (B, C) and (B, 1)."""
    margins = (chosen - rejected).mean(1)
    return Outcome(loss.mean(1), chosen.detach(), rejected[:, 0].detach(), margins.detach())


def _logistic(margin: Tensor, smoothing: float) -> Tensor:
    """−(1−ε) log σ(z) − ε log σ(−z)."""
    if not smoothing:
        return softplus(-margin)
    return (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)


def _log1mexp(x: Tensor) -> Tensor:
    """log(1 − eˣ) for x < 0, exact at both ends (Mächler 2012); x = 0 is taken for the last number before it."""
    x = x.clamp(max=-torch.finfo(x.dtype).tiny)
    near = x > -0.6931471805599453
    # Each branch sees only what it is good for: a gradient of the other's would be infinity times 0.
    small = torch.log(-torch.expm1(torch.where(near, x, -1.0)))
    return torch.where(near, small, torch.log1p(-torch.exp(torch.where(near, -1.0, x))))
