"""The distances to what teachers say, by their names in recipes."""

from __future__ import annotations

from mergekit_lite.distillation.objectives import alm, divergences, fusellm
from mergekit_lite.distillation.objectives.distance import REGISTERED
from mergekit_lite.distillation.objectives.fusellm import combined_weights

FAMILIES = (fusellm, divergences, alm)  # their order is that of the documentation
DISTANCES = dict(REGISTERED)

__all__ = ["DISTANCES", "FAMILIES", "combined_weights"]
