"""A teacher's vocabulary in terms of a student's."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt


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
        teacher_ids: (V_student, 4) int32; −1 where a row has fewer.
        weights: (V_student, 4) float32; 0 there.
    """

    teacher_ids: npt.NDArray[np.int32]
    weights: npt.NDArray[np.float32]
