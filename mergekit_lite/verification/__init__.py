"""Whether an output is still what its manifest says, and whether its inputs still give it."""

from mergekit_lite.verification.result import Finding, Verdict
from mergekit_lite.verification.verification import verify

__all__ = ["Finding", "Verdict", "verify"]
