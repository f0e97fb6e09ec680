"""What the methods take, from their signatures."""

from __future__ import annotations

from mergekit_lite.planning.planner import method_parameters

METHODS = method_parameters()
