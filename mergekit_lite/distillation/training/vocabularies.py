"""What a distance needs of a teacher's vocabulary: nothing, a map to the student's, or a projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import torch

from mergekit_lite.distillation.alignment.edit_distance import edit_distance_map
from mergekit_lite.distillation.alignment.projection import projection
from mergekit_lite.distillation.alignment.vocabulary import exact_map
from mergekit_lite.distillation.objectives.distance import Distance
from mergekit_lite.distillation.objectives.targets import Targets

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


def has_vocabulary_of(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> bool:
    """Whether each token of the teacher is the student's under the same id. The student may have more."""
    own: Mapping[str, int] = student.get_vocab()
    return all(own.get(token) == number for token, number in teacher.get_vocab().items())


def can_project(*tokenizers: PreTrainedTokenizerBase) -> bool:
    """Whether ``projection`` can cut texts by all of these: it needs the package tokenizers."""
    return all(getattr(each, "backend_tokenizer", None) is not None for each in tokenizers)


def vocabulary_of(
    distance: Distance,
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    how: Literal["exact", "edit_distance"],
    rows: tuple[int, int],
) -> Any:
    """Return what ``Distance.prepared`` takes for a teacher.

    Args:
        distance: says what it needs.
        student: the student's tokenizer.
        teacher: the teacher's.
        how: maps are made.
        rows: of both heads, which may have more than tokenizers have tokens.
    """
    if distance.vocabulary == "projection":
        return projection(student, teacher, rows=rows[0])
    if distance.vocabulary != "map" or has_vocabulary_of(student, teacher):
        return None
    return (exact_map if how == "exact" else edit_distance_map)(student, teacher, rows=rows[1])


def within(targets: Targets, rows: int) -> Targets:
    """Return a teacher's targets without tokens beyond the student's head: padding of a wider head of the teacher's."""
    beyond = targets.top_ids >= rows
    if not bool(beyond.any()):
        return targets
    return replace(
        targets,
        top_ids=targets.top_ids.masked_fill(beyond, 0),
        top_log_probs=targets.top_log_probs.masked_fill(beyond, -torch.inf),
    )
