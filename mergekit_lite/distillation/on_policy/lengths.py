"""The lengths of a round's answers, by which a student shows early that it collapses: to nothing, or to the limit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from mergekit_lite.distillation.on_policy.answers import OwnAnswer

HALF = 0.5  # of the answers cut, or empty
DRIFT = 4.0  # times as long, or as short, as in the first round


class Lengths(NamedTuple):
    """The lengths of answers."""

    answers: int
    mean: float  # in tokens
    cut: float  # share that the limit of tokens cut
    empty: float  # share without a text

    @classmethod
    def of(cls, answers: Iterable[OwnAnswer]) -> Lengths:
        """Return those of some answers, of at least one."""
        every = list(answers)
        number = len(every)
        return cls(
            number,
            sum(len(answer.tokens) for answer in every) / number,
            sum(answer.cut for answer in every) / number,
            sum(not answer.text.strip() for answer in every) / number,
        )

    def signs(self, first: Lengths, limit: int) -> dict[str, str]:
        """Return the signs of a collapse by their kind, given those of the first round and the limit of tokens."""
        signs = {}
        if self.empty >= HALF:
            signs["empty"] = f"{self.empty:.0%} of the answers are empty: the student ends at once"
        if self.cut >= HALF:
            signs["cut"] = f"{self.cut:.0%} of the answers are cut by max_tokens, {limit:,}: too few, or it never ends"
        if self.mean * DRIFT <= first.mean:
            signs["short"] = f"answers have {self.mean:.3g} tokens in the mean, in the first round {first.mean:.3g}"
        if self.mean >= DRIFT * first.mean:
            signs["long"] = f"answers have {self.mean:.3g} tokens in the mean, in the first round {first.mean:.3g}"
        return signs
