"""What a distance needs of a teacher's vocabulary: nothing, a map to the student's, or a projection."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch

from mergekit_lite.distillation.alignment.edit_distance import edit_distance_map
from mergekit_lite.distillation.alignment.projection import projection
from mergekit_lite.distillation.alignment.spelling import spelling_of
from mergekit_lite.distillation.alignment.vocabulary import NOBODY, Projection, VocabularyMap, exact_map
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
        rows: of both heads. They may have more than tokenizers have tokens; of the student's, those beyond are none.
    """
    if distance.vocabulary == "projection":
        found = projection(student, teacher, rows=rows[0], width=rows[1])
        return Projection(found.teacher_ids[: rows[0]], found.weights[: rows[0]], found.width)
    if distance.vocabulary != "map" or has_vocabulary_of(student, teacher):
        return None
    own = (exact_map if how == "exact" else edit_distance_map)(student, teacher, rows=rows[1]).student_ids
    return VocabularyMap(np.where(own < rows[0], own, NOBODY))


def ends_of_turn(student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase) -> tuple[int, int] | None:
    """Return the tokens that end the student's turn and the teacher's where they differ, else None."""
    own, theirs = (spelling_of(each).roles.get("end_of_turn") for each in (student, teacher))
    return None if own is None or theirs is None or own == theirs else (own, theirs)


def as_students(
    targets: Targets, distance: Distance, vocabulary: Any, rows: int, ends: tuple[int, int] | None = None
) -> Targets:
    """Return a teacher's targets as a distance reads them that takes the teacher's ids as the student's.

    Tokens that the student's head has no row for, the padding of a wider head, are left out. The ends of turn change
    places: a base model and one for chats may have one vocabulary, and end a turn by different tokens of it.

    Args:
        targets: of the teacher.
        distance: those that map tokens, or don't ask which one is which, read the targets as they are.
        vocabulary: as of ``vocabulary_of``.
        rows: of the student's head.
        ends: as of ``ends_of_turn``.
    """
    if vocabulary is not None or distance.vocabulary == "any":
        return targets
    ids = targets.top_ids
    if ends is not None:
        own, theirs = ends
        ids = ids.masked_fill(targets.top_ids == own, theirs).masked_fill(targets.top_ids == theirs, own)
    beyond = ids >= rows
    return replace(
        targets,
        top_ids=ids.masked_fill(beyond, 0),
        top_log_probs=targets.top_log_probs.masked_fill(beyond, -torch.inf),
    )
