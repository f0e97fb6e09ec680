"""Options of an extraction of a task vector."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, get_args

from mergekit_lite.checkpoint.encodings.low_rank import MAX_RANK
from mergekit_lite.errors import UsageError

VectorFormat = Literal["dense", "sparse", "lowrank", "sign", "lora"]
VectorTokens = Literal["base", "tuned"]


@dataclass(frozen=True)
class ExtractSettings:
    """Options of an extraction; those that the format doesn't take are None."""

    format: VectorFormat = "dense"
    density: float | None = None
    threshold: float | None = None
    rank: int | None = None
    energy: float | None = None
    seed: int = 0
    tokenizer_source: VectorTokens | None = None

    def __post_init__(self) -> None:
        """Raise UsageError where an option is out of bounds, or the format doesn't take it."""
        if self.format not in get_args(VectorFormat):
            raise UsageError(f"Unknown format {self.format!r}: expected one of {', '.join(get_args(VectorFormat))}.")
        if self.tokenizer_source not in (None, *get_args(VectorTokens)):
            raise UsageError(f"tokenizer_source expects base or tuned, got {self.tokenizer_source!r}.")
        takes = {"sparse": ("density", "threshold"), "lowrank": ("rank", "energy"), "lora": ("rank", "energy")}
        choices = takes.get(self.format, ())
        given = [name for name in ("density", "threshold", "rank", "energy") if getattr(self, name) is not None]
        if strange := [name for name in given if name not in choices]:
            raise UsageError(f"--format {self.format} takes no --{strange[0]}.")
        if choices and len(given) != 1:
            raise UsageError(f"--format {self.format} takes one of --{choices[0]} and --{choices[1]}.")
        for name, most in (("density", 1), ("energy", 1), ("rank", MAX_RANK), ("threshold", 1e38)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise UsageError(f"--{name}: expected a number above 0 up to {most:g}, got {value:g}.")
