"""Random teachers for tests of distances: groups of every shape, positions in none, and all or some of their tokens."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from mergekit_lite.distillation.alignment.vocabulary import Projection, VocabularyMap
from mergekit_lite.distillation.objectives.targets import Targets

# The student's and the teacher's tokens of each group; (0, 1) and (1, 0): a group that one side lacks.
SHAPES = ((1, 1), (2, 1), (1, 1), (1, 3), (1, 1), (3, 2), (1, 0), (0, 1), (1, 1), (2, 2))


@dataclass(frozen=True)
class Taught:
    """A student's and a teacher's logits of one text, in float64, and what is kept of the teacher."""

    logits: Tensor  # (R, V)
    tokens: Tensor  # (R,)
    teacher: Tensor  # (P, V_teacher)
    targets: Targets


def taught(
    seed: int,
    student: int = 29,
    teacher: int | None = None,
    top: int | None = None,
    shapes: tuple[tuple[int, int], ...] = SHAPES,
    spread: float = 2.0,
) -> Taught:
    """Make a text in groups of the shapes, some positions in none; ``top`` of the teacher's tokens are kept."""
    draws = torch.Generator().manual_seed(seed)
    teacher = student if teacher is None else teacher

    def groups(side: int) -> Tensor:
        each = [torch.full((shape[side],), place) for place, shape in enumerate(shapes)]
        none = torch.tensor([-1])
        return torch.cat([none, *each[:4], none, *each[4:], none])

    def drawn(positions: int, vocabulary: int) -> tuple[Tensor, Tensor]:
        logits = torch.randn(positions, vocabulary, generator=draws, dtype=torch.float64) * spread
        return logits, torch.randint(vocabulary, (positions,), generator=draws)

    mine, theirs = groups(0), groups(1)
    logits, tokens = drawn(len(mine), student)
    dense, taught_tokens = drawn(len(theirs), teacher)
    log_p = dense.log_softmax(1)
    top_log_probs, top_ids = log_p.topk(teacher if top is None else top, 1)
    log_probs = log_p.gather(1, taught_tokens[:, None])[:, 0]
    targets = Targets(mine, theirs, taught_tokens, log_probs, top_ids, top_log_probs, len(shapes))
    return Taught(logits, tokens, dense, targets)


def of_both(count: int, mine: Tensor, theirs: Tensor) -> list[tuple[list[int], list[int]]]:
    """The student's and the teacher's positions of each group."""
    return [
        ((mine == group).nonzero()[:, 0].tolist(), (theirs == group).nonzero()[:, 0].tolist()) for group in range(count)
    ]


def mapping(seed: int, student: int, teacher: int, twice: bool = False) -> VocabularyMap:
    """A map of two thirds of the teacher's tokens; ``twice`` lets two of them be one token of the student."""
    draws = np.random.default_rng(seed)
    ids = draws.permutation(max(student, teacher))[:teacher].astype(np.int32)
    ids[(ids >= student) | (draws.random(teacher) < 1 / 3)] = -1
    if twice:
        ids[1] = ids[0] = 3
        ids[2:][ids[2:] == 3] = -1
    return VocabularyMap(ids)


def projection(seed: int, student: int, teacher: int) -> Projection:
    """One to four entries a row that sum to 1; some rows have 1 in one place."""
    draws = np.random.default_rng(seed)
    ids = np.full((student, 4), -1, np.int32)
    weights = np.zeros((student, 4), np.float32)
    for row in range(student):
        entries = draws.integers(1, 5) if row % 3 else 1
        ids[row, :entries] = draws.permutation(teacher)[:entries]
        shares = np.sort(draws.random(entries))[::-1]
        weights[row, :entries] = shares / shares.sum()
    return Projection(ids, weights, teacher)


def in_float32(targets: Targets) -> Targets:
    """The same, as the teachers' files have it."""
    return replace(targets, log_probs=targets.log_probs.float(), top_log_probs=targets.top_log_probs.float())
