"""One vocabulary in terms of another, beside naive second implementations."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_lite.distillation.alignment.projection import projection
from mergekit_lite.distillation.alignment.vocabulary import exact_map
from tests.distill.alignment.ten_tokenizers import RULES, tokenizer
from tests.tokenizers import TEMPLATES


def found(student: str, teacher: str, token: str) -> str | None:
    made = exact_map(tokenizer(student), tokenizer(teacher)).student_ids
    number = tokenizer(teacher).convert_tokens_to_ids(token)
    return None if made[number] < 0 else str(tokenizer(student).convert_ids_to_tokens(int(made[number])))


@pytest.mark.parametrize(
    ("student", "teacher", "token", "same"),
    [
        ("gpt-2", "llama-3", "Ġ", "Ġ"),
        ("llama-2", "gpt-2", "Ġ", "▁"),
        ("gpt-2", "llama-2", "▁", "Ġ"),
        ("gpt-2", "llama-2", "<0xC3>", "Ã"),
        ("llama-2", "gpt-2", "Ã", "<0xC3>"),
        ("llama-2", "gpt-2", "e", "e"),  # not <0x65>
        ("gpt-2", "llama-2", "<0x65>", "e"),
        ("llama-2", "gpt-2", "Ċ", "\n"),
        ("bert", "llama-3", "Ġcat", "cat"),
        ("bert", "llama-3", "The", "The"),
        ("llama-3", "bert", "cat", "Ġcat"),
        ("llama-3", "bert", "##s", "s"),
        ("gpt-2", "bert", "<unk>", None),
        ("gpt-2", "unigram", "<|im_end|>", "<|im_end|>"),
    ],
)
def test_tokens_are_the_same_by_what_they_stand_for(student: str, teacher: str, token: str, same: str | None) -> None:
    assert found(student, teacher, token) == same


def test_what_has_the_same_bytes_is_found_and_nothing_else() -> None:
    """A second implementation: each tokenizer's own decoder says what a token is, where it is text."""
    for student in ("gpt-2", "o200k"):
        for teacher in ("llama-3", "qwen2"):
            own, other = tokenizer(student), tokenizer(teacher)
            texts = [
                {
                    text: number
                    for number in set(range(len(each))) - set(each.all_special_ids)
                    if "\ufffd" not in (text := each.decode([number]))
                }
                for each in (own, other)
            ]
            made = exact_map(own, other).student_ids
            assert len(texts[1]) > 250
            for text, number in texts[1].items():
                assert made[number] == texts[0].get(text, -1), text


def test_special_tokens_go_by_their_role() -> None:
    own = tokenizer("gpt-2", TEMPLATES["chatml"], eos_token="</s>")
    other = tokenizer("gemma", TEMPLATES["phi-3"].replace("<|end|>", "[MASK]"), eos_token="<pad>", bos_token="<|user|>")
    made = exact_map(own, other).student_ids
    ids = {name: int(made[other.convert_tokens_to_ids(name)]) for name in ("[MASK]", "<pad>", "<|user|>", "</s>")}
    assert own.convert_ids_to_tokens(ids["[MASK]"]) == "<|im_end|>"  # ends the turn
    assert own.convert_ids_to_tokens(ids["<pad>"]) == "</s>"  # ends the text
    assert own.convert_ids_to_tokens(ids["<|user|>"]) == "<s>"  # begins it
    assert own.convert_ids_to_tokens(ids["</s>"]) == "</s>"  # by its text
    assert len(exact_map(own, other, rows=len(other) + 9).student_ids) == len(other) + 9


def pieces(made, token: int, by) -> list[int]:
    """The pieces of a byte-level token by another byte-level tokenizer; of bytes that are no text by its model."""
    written = made.convert_ids_to_tokens(token)
    text = made.backend_tokenizer.decoder.decode([written])
    if "\ufffd" in text:
        return [piece.id for piece in by.backend_tokenizer.model.tokenize(written)]
    return by(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize(("student", "teacher"), [("gpt-2", "llama-3"), ("o200k", "qwen2")])
@pytest.mark.parametrize("entries", [1, 4])
def test_the_projection_is_that_of_a_dense_matrix(student: str, teacher: str, entries: int) -> None:
    own, other = tokenizer(student), tokenizer(teacher)
    dense = np.zeros((len(own), len(other)))
    special = (set(own.added_tokens_decoder), set(other.added_tokens_decoder))
    for i in set(range(len(own))) - special[0]:
        for place, j in enumerate(pieces(own, i, other)[:entries]):
            dense[i, j] += 0.9 * 0.1**place
    for j in set(range(len(other))) - special[1]:
        for place, i in enumerate(pieces(other, j, own)[:entries]):
            dense[i, j] += 0.9 * 0.1**place
    numbers = other.get_vocab()
    for i in range(len(own)):
        if (j := numbers.get(own.convert_ids_to_tokens(i))) is not None:
            dense[i] = 0
            dense[i, j] = 1
    made = projection(own, other, entries)
    assert made.teacher_ids.shape == made.weights.shape == (len(own), entries)
    for i in range(len(own)):
        order = np.lexsort((np.arange(len(other)), -dense[i].round(9)))[:entries]
        kept = [j for j in order if dense[i, j] > 0]
        assert made.teacher_ids[i].tolist() == kept + [-1] * (entries - len(kept)), own.convert_ids_to_tokens(i)
        expected = dense[i, kept] / dense[i, kept].sum() if kept else []
        np.testing.assert_allclose(made.weights[i], [*expected, *[0] * (entries - len(kept))], rtol=1e-6)


def test_any_two_tokenizers_have_a_projection() -> None:
    for student in RULES:
        other = "llama-3" if student != "llama-3" else "unigram"
        made = projection(tokenizer(student), tokenizer(other), rows=1000)
        sums, used = made.weights.sum(1), (made.teacher_ids >= 0).any(1)
        assert len(sums) == 1000
        np.testing.assert_allclose(sums, used, atol=1e-6)
        assert (made.weights[made.teacher_ids < 0] == 0).all() and (np.diff(made.weights, axis=1) <= 0).all()
        assert used.sum() > 0.8 * len(tokenizer(student)), student
    digits = projection(tokenizer("llama-3"), tokenizer("qwen2"))
    own, other = tokenizer("llama-3"), tokenizer("qwen2")
    row = digits.teacher_ids[own.convert_tokens_to_ids("202")]  # three digits at once, and each by itself
    assert row[:2].tolist() == [other.convert_tokens_to_ids("2"), other.convert_tokens_to_ids("0")]
    assert digits.weights[own.convert_tokens_to_ids("202")].tolist() == pytest.approx(
        [0.909 / 0.999, 0.09 / 0.999, 0, 0]
    )
