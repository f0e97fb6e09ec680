"""The published losses of preference training, by their names in recipes."""

from __future__ import annotations

from mergekit_lite.distillation.objectives import averages, iterated, log_ratios
from mergekit_lite.distillation.objectives.iterated import gap_of
from mergekit_lite.distillation.objectives.log_ratios import scheduled
from mergekit_lite.distillation.objectives.objective import REGISTERED, LogProbs, Objective, Outcome

FAMILIES = (log_ratios, averages, iterated)  # in the order of the documentation
OBJECTIVES = {
    name: each
    for family in FAMILIES
    for name, each in REGISTERED.items()
    if each.function.__module__ == family.__name__
}

__all__ = ["OBJECTIVES", "LogProbs", "Objective", "Outcome", "gap_of", "scheduled"]
