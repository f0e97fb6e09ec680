"""The contract of a scorer."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from mergekit_lite.answers.rows import Prompt


class Judged(NamedTuple):
    """What a scorer sees: a prompt and one answer to it."""

    prompt: Prompt
    answer: str


class Score(NamedTuple):
    """A verdict. ``value`` is None where none can be given, and ``why`` tells the reason."""

    value: float | None
    why: str = ""


class Scorer(Protocol):
    """Judges answers. A verdict depends on prompt and answer alone, not on what else is judged with them."""

    name: str

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """A verdict for each, in order."""


def finite(value: float) -> Score:
    """The value as a verdict; none where it is NaN or infinite."""
    return Score(value) if math.isfinite(value) else Score(None, f"the score is {value}")
