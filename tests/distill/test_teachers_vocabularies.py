"""A teacher's tokens as a student's: heads and tokenizers of other widths, ends of turn, what is asked of which."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from mergekit_lite.distillation.objectives.distances import DISTANCES
from mergekit_lite.distillation.training.vocabularies import (
    as_students,
    ends_of_turn,
    has_vocabulary_of,
    vocabulary_of,
)
from tests.distill.teachers import in_float32, taught
from tests.distill.teaching_models import other_tokenizer
from tests.tokenizers import tokenizer

ROWS = 340


def test_tokens_that_a_head_lacks_are_none():
    """A tokenizer may have more tokens than its model has rows."""
    student, teacher = tokenizer("chatml"), other_tokenizer()
    for how in ("exact", "edit_distance"):
        whole, less = (vocabulary_of(DISTANCES["gold"], student, teacher, how, (rows, 320)) for rows in (ROWS, 100))
        kept = whole.student_ids < 100
        assert (less.student_ids[kept] == whole.student_ids[kept]).all() and (less.student_ids[~kept] == -1).all()
        assert not kept.all()
    assert len(vocabulary_of(DISTANCES["p_kl"], student, teacher, "exact", (100, 320)).teacher_ids) == 100


@pytest.mark.parametrize("name", ["forward_kl", "cross_entropy", "uld", "alm"])
def test_who_asks_which_token_is_which(name):
    """Padding of a wider head is left out where ids are compared; ULD sorts them all, whatever they are."""
    targets = in_float32(taught(1, 29, 29, 6).targets)
    found = as_students(targets, DISTANCES[name], None, 10)
    if DISTANCES[name].vocabulary == "any":
        assert found is targets
    else:
        beyond = targets.top_ids >= 10
        assert beyond.any() and (found.top_ids < 10).all()
        assert found.top_log_probs[beyond].isneginf().all()
        assert torch.equal(found.top_log_probs[~beyond], targets.top_log_probs[~beyond])


@pytest.mark.parametrize("name", ["reverse_kl", "gold"])
def test_ends_of_turn_are_one(name):
    """Two models of one vocabulary may end their turns by different tokens of it."""
    student, teacher = tokenizer("chatml"), tokenizer("llama-3")
    assert has_vocabulary_of(student, teacher) and ends_of_turn(student, student) is None
    own, theirs = (student.convert_tokens_to_ids(token) for token in ("<|im_end|>", "<|eot_id|>"))
    assert ends_of_turn(student, teacher) == (own, theirs)
    assert vocabulary_of(DISTANCES[name], student, teacher, "exact", (ROWS, ROWS)) is None
    text = taught(1, ROWS, ROWS, 6)
    ids = text.targets.top_ids.masked_fill(text.targets.top_ids == own, ROWS - 1)
    ids[:, 0], ids[:, 1] = theirs, own
    found = as_students(in_float32(replace(text.targets, top_ids=ids)), DISTANCES[name], None, ROWS, (own, theirs))
    assert (found.top_ids[:, 0] == own).all() and (found.top_ids[:, 1] == theirs).all()
    assert torch.equal(found.top_ids[:, 2:], ids[:, 2:])
