"""What the methods take, from their signatures."""

from __future__ import annotations

from mergekit_lite.plan.merge import method_parameters

METHODS = method_parameters()
