"""Plans: recipes resolved against the headers of their checkpoints."""

from mergekit_lite.planning.pair import plan
from mergekit_lite.planning.plan import Job, Plan

__all__ = ["Job", "Plan", "plan"]
