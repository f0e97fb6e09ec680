"""What a verification found."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True, slots=True)
class Finding:
    """Something that is not as it was when the output was made.

    Attributes:
        file: where: a file of the output, or an input's reference with or without a file.
        what: what is wrong with it.
        tensor: which tensor, if it is about one.
        bytes: the first byte in the file and the one behind the last, if they are known.
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
class Verdict:
    """What was looked at, and what was found.

    Attributes:
        output: its path.
        findings: what is wrong; nothing for an output that is sound.
        notes: what may explain a finding, or is good to know.
        unchecked: what could not be looked at, and why.
        tensors, nbytes: whose digests were compared with the manifest's.
        recomputed: the tensors that were made again from the inputs.
        seed: that chose them.
        seconds: it took.
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
        """Whether nothing is wrong with what was looked at."""
        return not self.findings

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        return {"sound": self.sound, **asdict(self), "output": str(self.output), "seconds": round(self.seconds, 3)}
