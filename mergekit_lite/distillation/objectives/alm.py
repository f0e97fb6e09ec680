"""Approximate likelihood matching (2503.20083): teachers of any vocabulary, by the likelihood of the text alone."""

from __future__ import annotations

from mergekit_lite.distillation.objectives.distance import Ask, Steps, distance
from mergekit_lite.distillation.objectives.groups import sizes, summed
from mergekit_lite.distillation.objectives.logarithms import log1mexp
from mergekit_lite.distillation.objectives.options import NonNegative, Positive
from mergekit_lite.distillation.objectives.targets import Targets


@distance(
    "−[e^(ℓ_t/T) ℓ_s/T + (1 − e^(ℓ_t/T)) log(1 − e^(ℓ_s/T))]",
    "ALM, 2503.20083",
    "the first to try across tokenizers; servers that tell little",
    "any",
    top=False,
)
def alm(
    targets: Targets, vocabulary: None = None, *, temperature: Positive = 100.0, epsilon: NonNegative = 1e-6
) -> Steps:
    """Return the binary cross entropy of a group's likelihood under the student with that under the teacher.

    ℓ_t and ℓ_s are the sums of log p and log q over the group's tokens. As in tokenkit, ε is taken off ℓ/T of both, so
    that a text that is certain has a finite loss and gradient. The loss is at its least where ℓ_s = ℓ_t, and isn't 0
    there: it is the teacher's entropy.

    The published default leaves out groups that a pair of tokenizers biases; that needs tables which are made of the
    tokenizers and isn't done here.
    """
    student = yield Ask()
    teacher = summed(targets.log_probs.to(student.log_probs.dtype), targets.teacher_groups, targets.groups)
    own = summed(student.log_probs, targets.student_groups, targets.groups)
    log_p, log_q = teacher / temperature - epsilon, own / temperature - epsilon
    losses = -(log_p.exp() * log_q - log_p.expm1() * log1mexp(log_q))
    both = sizes(targets.student_groups, targets.groups) * sizes(targets.teacher_groups, targets.groups) > 0
    return losses.where(both, 0.0)
