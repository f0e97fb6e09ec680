"""Plans: recipes resolved against the headers of their checkpoints."""

from mergekit_lite.planning.plan import Job, Plan
from mergekit_lite.planning.planner import make_plan

__all__ = ["Job", "Plan", "make_plan"]
