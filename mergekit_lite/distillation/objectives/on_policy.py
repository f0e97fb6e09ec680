"""The loss of on-policy distillation, as pure functions of log-probabilities by token.

The student π answers prompts itself, and a teacher p reads the very tokens y it drew. With π₀ for the student at the
time of the draw, position t of an answer has

    d_t = log π₀(y_t | x, y_<t) − log p(y_t | x, y_<t)      the log-ratio, one draw of KL(π₀ ‖ p) at this position
    A_t = −coef · d_t                                       its advantage
    L_t = −r_t A_t,  r_t = π(y_t) / π₀(y_t)                 its loss, which steps minimise

(Lu et al., On-Policy Distillation, Thinking Machines 2025; ``incorporate_kl_penalty`` and the loss
``importance_sampling`` of tinker-cookbook). r_t is the importance weight: at the first step after the draw it is 1, and
then E[∇L_t] = coef · ∇KL(π ‖ p) at t exactly, as the mean of ∇log π · 1 is zero (Williams 1992): the test enumerates a
vocabulary. What a token does to later positions is not counted, as with discount 0 there. The full-vocabulary reverse
KL of GKD or TRL's DistillationTrainer has the same gradient in the mean, without the noise of the draw, but needs all
logits of the teacher; this needs one number a token, which servers give.

With ``clip`` ε the loss is PPO's, −min(r A, clamp(r, 1 − ε, 1 + ε) A) (1707.06347; ``ppo`` of tinker-cookbook): a token
that has moved by ε the way its advantage points gets no more gradient.

**Another tokenizer** [derived, published nowhere that we know of]. ALM (2503.20083) compares the likelihoods of chunks,
the groups of tokens that consume the same bytes in both tokenizers. Its log-ratio is the natural one of a chunk c:

    d_c = Σ_{t in c} log π₀(y_t) − Σ_{u in c} log p(z_u),  z: the same text in the teacher's tokens

Each of the chunk's n student tokens has d_c / n (``even``: the sum of the advantages is that of the log-ratios, and
their mean is nats a token as in the case of one tokenizer), or d_c (``whole``: E[∇L] is then coef times the gradient of
the KL between chunks, where these don't depend on what follows; long chunks pull harder). With chunks of one token both
are the formula above. Both take the teacher's own tokenisation of the text for its probability of the text: the mass of
its other tokenisations is left out, as in ALM. rLLM (``align_teacher_logprobs``) differs: it shares Σ log p among
the tokens that overlap in bytes, and subtracts each token's own log π₀.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

Spread = Literal["even", "whole"]


@dataclass(frozen=True)
class PolicyGradient:
    """The loss of R tokens and what it was made of.

    Attributes:
        losses: (R,); differentiable.
        ratios: (R,); r, no gradient.
        clipped: (R,) bool; where ``clip`` took the gradient away.
    """

    losses: Tensor
    ratios: Tensor
    clipped: Tensor


def policy_gradient(log_probs: Tensor, drawn: Tensor, advantages: Tensor, clip: float | None = None) -> PolicyGradient:
    """Return −r A of each token, or PPO's clipped form.

    Args:
        log_probs: (R,); log π of the tokens under the model that is trained.
        drawn: (R,); log π₀, the same under the model that drew them. No gradient flows through it.
        advantages: (R,); no gradient flows through them.
        clip: ε; None for no bound.
    """
    ratios = (log_probs - drawn.detach()).exp()
    gains = ratios * advantages.detach()
    if clip is None:
        return PolicyGradient(-gains, ratios.detach(), torch.zeros_like(ratios, dtype=torch.bool))
    bounded = ratios.clamp(1 - clip, 1 + clip) * advantages.detach()
    return PolicyGradient(-torch.minimum(gains, bounded), ratios.detach(), (bounded < gains).detach())


def token_log_ratios(drawn: Tensor, teacher: Tensor) -> Tensor:
    """Return d of each token, (R,), where the teacher scored the student's tokens themselves."""
    return drawn - teacher


def group_log_ratios(drawn: Tensor, groups: Tensor, teacher: Tensor, spread: Spread = "even") -> Tensor:
    """Return d of each token, (R,), where the teacher has tokens of its own; NaN at tokens of no group.

    Args:
        drawn: (R,); log π₀ of the student's tokens.
        groups: (R,) int64; the group of each of them; −1 for those of none, whose d is unknown.
        teacher: (G,); the teacher's log p summed over the tokens of each group. A group without student tokens has no
            part in the result.
        spread: how the log-ratio of a group is given to its tokens.
    """
    inside = groups >= 0
    taken = groups[inside]
    sums = torch.zeros_like(teacher).index_add(0, taken, drawn[inside].to(teacher.dtype)) - teacher
    if spread == "even":
        sums = sums / torch.bincount(taken, minlength=len(teacher)).clamp(min=1)
    ratios = torch.full_like(drawn, torch.nan)
    ratios[inside] = sums[taken].to(drawn.dtype)
    return ratios
