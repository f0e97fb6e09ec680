"""A teacher's vocabulary in terms of a student's.

Tokens are compared by the bytes that they stand for, never by their ids or by how the vocabulary writes them: GPT-2's
``Ġthe``, SentencePiece's ``▁the`` and WordPiece's ``the`` are one. Special tokens are compared by their role.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from mergekit_lite.distillation.alignment.spelling import Spelling, spelling_of

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

NOBODY = -1


@dataclass(frozen=True)
class VocabularyMap:
    """The student's token for each of the teacher's.

    Attributes:
        student_ids: (V_teacher,) int32; −1 where the student has none.
    """

    student_ids: npt.NDArray[np.int32]


@dataclass(frozen=True)
class Projection:
    """W, student × teacher, at most four entries a row, each row's sum 1 (X-Token, 2605.21699).

    Attributes:
        teacher_ids: (V_student, 4) int32, the largest weight first; −1 where a row has fewer.
        weights: (V_student, 4) float32; 0 there.
        width: V_teacher, of its head.
    """

    teacher_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
    width: int


def exact_map(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, rows: int | None = None
) -> VocabularyMap:
    """Map each of the teacher's tokens to the student's that stands for the same bytes.

    Special tokens go by their role, the end of the turn first; then by their text, special to special. Where two of the
    student's tokens are the same bytes, the one that is no byte's stand-in is taken, then the one of the lower id. Two
    of the teacher's may have one of the student's in common: their probabilities are to be summed.

    Args:
        student: its tokenizer.
        teacher: its tokenizer.
        rows: of the teacher's head, where it has more than its tokenizer has tokens.
    """
    own, other = spelling_of(student), spelling_of(teacher)
    found = np.full(max(other.rows, rows or 0), NOBODY, np.int32)
    for token in range(other.rows):
        found[token] = next((own.numbers[read] for read in other.readings(token) if read in own.numbers), NOBODY)
    for token, number in special_pairs(own, other).items():
        found[token] = number
    return VocabularyMap(found)


def special_pairs(own: Spelling, other: Spelling) -> dict[int, int]:
    """Return the ids of special tokens of ``own`` for those of ``other``: by role, then by text."""
    texts = {own.text(token): token for token in sorted(own.special, reverse=True)}
    found = {token: texts[other.text(token)] for token in other.special if other.text(token) in texts}
    by_role = {other.roles[role]: own.roles[role] for role in reversed(other.roles) if role in own.roles}
    return found | by_role
