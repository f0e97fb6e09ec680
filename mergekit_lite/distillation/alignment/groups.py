"""Two tokenisations of one text, cut where both have consumed the same bytes.

Distributions over next tokens, and log-likelihoods of what lies between two cuts, can be compared there and nowhere
else. That is exact and linear; dynamic programming over the tokens' edit distances (FuseLLM) is neither.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    import numpy.typing as npt


@dataclass(frozen=True)
class Groups:
    """The group of each token of two tokenisations.

    Each group has at least one token of either. Both have consumed the same bytes before it, and after it.

    Attributes:
        student: (R,) int64; the group of each token, ascending from 0; −1 before the text, and at the end of it where
            the other has ended before.
        teacher: (P,) int64; of the other's.
        count: of groups.
    """

    student: npt.NDArray[np.int64]
    teacher: npt.NDArray[np.int64]
    count: int


def groups(
    student_ends: Sequence[int] | npt.NDArray[np.integer], teacher_ends: Sequence[int] | npt.NDArray[np.integer]
) -> Groups:
    """Group the tokens of two tokenisations of one text, in time and memory linear in both and in the text's bytes.

    Args:
        student_ends: the bytes consumed with each token (``alignment/spans.py``), ascending; 0 before the text.
        teacher_ends: of the other tokenisation.

    A token that consumes nothing (a blank that the other tokenizer has no token for, a line break that the template
    writes before the end of the turn) joins the group that follows; at the end, the one before.

    Raises:
        ValueError: ends descend.
    """
    ends = [_checked(student_ends), _checked(teacher_ends)]
    size = 1 + max(int(each[-1]) if len(each) else 0 for each in ends)
    cut = np.ones(size, bool)
    for each in ends:
        seen = np.zeros(size, bool)
        seen[each] = True
        cut &= seen
    cut[0] = False
    before = np.cumsum(cut) - cut  # cuts before each place: the group of a token that ends there
    count = int(cut.sum())
    student, teacher = (_numbered(each, cut, before, count) for each in ends)
    return Groups(student, teacher, count)


def _checked(given: Sequence[int] | npt.NDArray[np.integer]) -> npt.NDArray[np.int64]:
    ends = np.asarray(given, np.int64)
    if ends.size and (ends[0] < 0 or (np.diff(ends) < 0).any()):
        raise ValueError("ends of tokens must ascend from 0 on")
    return ends


def _numbered(
    ends: npt.NDArray[np.int64], cut: npt.NDArray[np.bool_], before: npt.NDArray[np.int64], count: int
) -> npt.NDArray[np.int64]:
    """Return the group of each token of one side."""
    found = before[ends]
    found[found == count] = -1
    found[ends == 0] = -1
    empty = np.diff(ends, prepend=-1) == 0
    found[empty & cut[ends] & (found >= 0) & (found < count - 1)] += 1
    return found
