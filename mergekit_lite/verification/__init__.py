"""Whether an output is still what its manifest says, and whether its inputs still give it."""

from mergekit_lite.verification.steps import verify
from mergekit_lite.verification.verdict import Finding, Verdict

__all__ = ["Finding", "Verdict", "verify"]
