"""A teacher's part in a batch, as the distances to it take it."""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Targets:
    """What one teacher says of a batch whose student is scored at R positions; the teacher has P positions for them.

    The positions of both are cut into G groups where both have consumed the same bytes of the text
    (``alignment/groups.py``). Position r of the student predicts its token r, position p of the teacher its token p.

    Attributes:
        student_groups: (R,) int64; the group of each of the student's positions, ascending; −1 in none.
        teacher_groups: (P,) int64; of the teacher's.
        tokens: (P,) int64; the text in the teacher's tokens.
        log_probs: (P,) float32; the teacher's log p of these tokens.
        top_ids: (P, K) int64; its likeliest tokens, in its own vocabulary; K may be 0.
        top_log_probs: (P, K) float32; −inf where a row has fewer.
        groups: G.
    """

    student_groups: Tensor
    teacher_groups: Tensor
    tokens: Tensor
    log_probs: Tensor
    top_ids: Tensor
    top_log_probs: Tensor
    groups: int
