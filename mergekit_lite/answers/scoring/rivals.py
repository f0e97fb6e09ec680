"""Whom an answer is compared with, by scorers that compare: the prompt's ``reference``, or its rivals.

Rivals are the other answers to the same prompt: in ``distill`` those of all sources, or the target's own; in ``boost``
the one that the baseline gave.
"""

from __future__ import annotations

from typing import Literal, TypeAlias

from mergekit_lite.answers.scoring.registry import kind_of
from mergekit_lite.answers.scoring.scorer import Judged, Score, ScorerSettings

Against: TypeAlias = Literal["reference", "rivals"]  # the option ``against``
RIVALS: Against = "rivals"


def meets_rivals(settings: ScorerSettings) -> bool:
    """Return whether the scorer compares an answer with its rivals, so that its score depends on them."""
    against = kind_of(settings.kind).options.model_fields.get("against")
    return against is not None and settings.options.get("against", against.default) == RIVALS


def opponents(judged: Judged, against: Against) -> tuple[str, ...] | Score:
    """Return the answers to compare with, or no score and the reason why there is none."""
    if against == RIVALS:
        return judged.rivals or Score(None, "there is no other answer to the prompt to compare with")
    reference = judged.prompt.reference
    return (
        Score(None, "the prompt has no reference, which is the answer to beat") if reference is None else (reference,)
    )
