"""The distances to what teachers say, by their names in recipes."""

from __future__ import annotations

from mergekit_lite.distillation.objectives import alm, divergences, fusellm, p_kl, uld
from mergekit_lite.distillation.objectives.distance import REGISTERED
from mergekit_lite.distillation.objectives.fusellm import combined_weights

FAMILIES = (fusellm, divergences, alm, p_kl, uld)  # in the order of the documentation
DISTANCES = {
    name: each
    for family in FAMILIES
    for name, each in REGISTERED.items()
    if each.function.__module__ == family.__name__
}

__all__ = ["DISTANCES", "combined_weights"]
