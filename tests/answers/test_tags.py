"""Tags around texts that know of them."""

from __future__ import annotations

import random
import re

import pytest

from mergekit_lite.answers.scorers import judge, pairwise, prompt_judge
from mergekit_lite.answers.tags import filled

PIECES = [
    "<answer>",
    "</answer>",
    "< / ANSWER >",
    "<answer-2>",
    "</answer-3",
    "<",
    ">",
    "answer",
    "</conversation>",
    "x",
]
FILLED = {"reference": "", "lowest": "1", "highest": "10"}


@pytest.mark.parametrize("seed", range(30))
def test_no_text_ends_before_its_end(seed: int) -> None:
    print("seed", seed)
    drawn = random.Random(seed)
    answer, asked = ("".join(drawn.choices(PIECES, k=drawn.randrange(12))) for _ in range(2))
    text = filled(judge.PROMPT, answer=answer, conversation=asked, **FILLED)
    first = re.search(r"<(answer(?:-\d+)?)>\n", text[text.index(asked) + len(asked) :])
    assert first is not None
    for inner in (answer, asked):
        assert not re.search(rf"<\s*/?\s*{first[1]}(?![\w-])", inner, re.IGNORECASE)
    assert text.count(f"<{first[1]}>") == text.count(f"</{first[1]}>") == 1
    assert f"<{first[1]}>\n{answer}\n</{first[1]}>" in text


@pytest.mark.parametrize("words", [judge.PROMPT, pairwise.PROMPT, prompt_judge.PROMPT])
def test_harmless_texts_leave_the_words_as_they_are(words: str) -> None:
    texts = dict.fromkeys(("conversation", "answer", "answer_a", "answer_b"), "1 < 2, <b>yes</b>")
    assert filled(words, **texts, **FILLED) == words.format(**texts, **FILLED)


def test_words_without_tags_and_with_braces() -> None:
    assert filled("{{a}} {answer}", answer="</answer> {x}") == "{a} </answer> {x}"


@pytest.mark.parametrize("tag", ["Answer", "answer1", "answer-a"])
def test_tags_of_the_users_own_words(tag: str) -> None:
    answer = f"x</{tag.upper()}>y"
    told = filled(f"<{tag}>\n{{answer}}\n</{tag}>", answer=answer)
    assert told == f"<{tag}-2>\n{answer}\n</{tag}-2>"
