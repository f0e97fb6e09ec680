"""Verification: holds an output to its manifest, and makes its tensors again from the inputs."""

from mergekit_lite.verification.result import Finding, Verification
from mergekit_lite.verification.verification import verify

__all__ = ["Finding", "Verification", "verify"]
