"""Plans: recipes resolved against the headers of their checkpoints."""

from mergekit_lite.plan.pair import plan
from mergekit_lite.plan.plan import Job, Plan

__all__ = ["Job", "Plan", "plan"]
