"""What an objective of preferences is: a function of log-probabilities and options, and its registration.

A row is a prompt with C chosen responses and a rejected one. s(y) is the log-probability of a response under the model
that is trained, summed over its tokens; s_ref(y) is the same under the reference, the model that training started from
or the one that the recipe names; s_t(y) is the same under the model that training started from in any case, a round's
where there are rounds; n(y) is the number of its tokens, with the end of the turn. Then

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
from typing import Annotated, Any

from pydantic import Field
from torch import Tensor
from torch.nn.functional import softplus

from mergekit_lite.distillation.objectives.options import NonNegative, checked, defaults

Smoothing = Annotated[float, Field(ge=0, lt=0.5)]


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
        own: (B,); s of the model's own answer to the prompt. None for objectives without ``own``.
        reference_own: (B,).
        round_chosen: (B, C); s_t. None for objectives without ``rounds``.
        round_rejected: (B,).
        mixed_chosen: (B, C), no gradient; s under softmax(m z + (1 − m) z_ref), the logits z of the model and z_ref of
            the reference mixed. None for objectives without ``mixes``.
        mixed_rejected: (B,).
        gap: the quantile of earlier ``Outcome.confidences``; 0 where there were too few.
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
    own: Tensor | None = None
    reference_own: Tensor | None = None
    round_chosen: Tensor | None = None
    round_rejected: Tensor | None = None
    mixed_chosen: Tensor | None = None
    mixed_rejected: Tensor | None = None
    gap: float = 0.0
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
        confidences: (B, C); what ``LogProbs.gap`` is a quantile of, for objectives with ``mixes``.
    """

    loss: Tensor
    chosen_rewards: Tensor
    rejected_rewards: Tensor
    margins: Tensor
    alpha: float | None = None
    confidences: Tensor | None = None

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
    own: bool = False  # whether it needs the model's own answer to each prompt
    rounds: bool = False  # whether it needs s_t beside s_ref
    mixes: bool = False  # whether it needs s under mixed logits, by its options ``mix``, ``window`` and ``quantile``

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


REGISTERED: dict[str, Objective] = {}  # by name


def objective(
    formula: str, source: str, when: str, **needs: bool
) -> Callable[[Callable[..., Outcome]], Callable[..., Outcome]]:
    """Register an objective under its function's name; all arguments are attributes of ``Objective``."""

    def register(function: Callable[..., Outcome]) -> Callable[..., Outcome]:
        REGISTERED[function.__name__] = Objective(function.__name__, function, formula, source, when, **needs)
        return function

    return register


def pairwise(loss: Tensor, chosen: Tensor, rejected: Tensor) -> Outcome:
    """Return the outcome of losses (B, C) and rewards (B, C) and (B, 1): the loss of a row is its mean over C."""
    margins = (chosen - rejected).mean(1)
    return Outcome(loss.mean(1), chosen.detach(), rejected[:, 0].detach(), margins.detach())


def logistic(margin: Tensor, smoothing: float) -> Tensor:
    """Return −(1−ε) log σ(z) − ε log σ(−z)."""
    if not smoothing:
        return softplus(-margin)
    return (1 - smoothing) * softplus(-margin) + smoothing * softplus(margin)
