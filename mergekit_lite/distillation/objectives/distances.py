"""The distances to what teachers say, by their names in recipes."""

from __future__ import annotations

from mergekit_lite.distillation.objectives import alm, divergences, fusellm, p_kl, uld
from mergekit_lite.distillation.objectives.distance import REGISTERED
from mergekit_lite.distillation.objectives.fusellm import combined_weights

FAMILIES = (fusellm, divergences, alm, p_kl, uld)
DISTANCES = dict(REGISTERED)

__all__ = ["DISTANCES", "FAMILIES", "combined_weights"]
