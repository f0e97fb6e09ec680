"""Result of a verification."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """One fault: something that is not as it was when the output was made.

    Attributes:
        file: a file of the output, or an input's reference with or without a file.
        what: what is wrong with it.
        tensor: name of the tensor, if the fault is in one.
        bytes: the first byte in the file and the one after the last, if they are known.
    """

    file: str
    what: str
    tensor: str | None = None
    bytes: tuple[int, int] | None = None

    def __str__(self) -> str:
        place = self.file
        if self.tensor is not None:
            place += f": {self.tensor}"
        if self.bytes is not None:
            place += f", bytes {self.bytes[0]:,} to {self.bytes[1]:,}"
        return f"{place}: {self.what}"


@dataclass(frozen=True, slots=True)
class Verification:
    """Result of a verification.

    Attributes:
        output: path of the output.
        findings: the faults; empty for an output that is sound.
        notes: facts that may explain a fault, or that the user should know.
        unchecked: what could not be checked, and why.
        tensors, nbytes: number of tensors whose digests were compared with the manifest's, and of their bytes.
        recomputed: names of the tensors that were made again from the inputs.
        seed: of the choice of these tensors.
        seconds: duration.
    """

    output: Path
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]
    unchecked: tuple[str, ...]
    tensors: int
    nbytes: int
    recomputed: tuple[str, ...]
    seed: int
    seconds: float

    @property
    def sound(self) -> bool:
        """True where no fault was found."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        return {"sound": self.sound, **asdict(self), "output": str(self.output), "seconds": round(self.seconds, 3)}
