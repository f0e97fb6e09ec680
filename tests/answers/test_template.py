"""Conversations as tokens under the chat templates of the well-known families."""

from __future__ import annotations

import pytest

from mergekit_lite.answers.template import ChatTemplate, LengthLimits, TemplateError, Tokens, fitted
from tests.tokenizers import TEMPLATES, tokenizer

USER = {"role": "user", "content": "What is one and one?"}
TALK = [USER, {"role": "assistant", "content": "two"}, {"role": "user", "content": "And one more?"}]

# style: what the model reads before its answer "It is two.", and what is scored
SINGLE = {
    "chatml": ("<|im_start|>user\nWhat is one and one?<|im_end|>\n<|im_start|>assistant\n", "It is two.<|im_end|>"),
    "chatml without header": (
        "<|im_start|>user\nWhat is one and one?<|im_end|>\n<|im_start|>assistant\n",
        "It is two.<|im_end|>",
    ),
    "qwen2.5": (
        "<|im_start|>system\nYou are helpful.<|im_end|>\n"
        "<|im_start|>user\nWhat is one and one?<|im_end|>\n<|im_start|>assistant\n",
        "It is two.<|im_end|>",
    ),
    "llama-3": (
        "<bos><|start_header_id|>user<|end_header_id|>\n\nWhat is one and one?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n",
        "It is two.<|eot_id|>",
    ),
    "gemma": (
        "<bos><start_of_turn>user\nWhat is one and one?<end_of_turn>\n<start_of_turn>model\n",
        "It is two.<end_of_turn>",
    ),
    "mistral": ("<bos>[INST] What is one and one? [/INST]", " It is two.<eos>"),
    "phi-3": ("<|user|>\nWhat is one and one?<|end|>\n<|assistant|>\n", "It is two.<|end|>"),
    "thinking": ("<bos><|user|>What is one and one?<|assistant|><think>\n", "\n</think>\n\nIt is two.<eos>"),
}


@pytest.mark.parametrize("style", TEMPLATES)
def test_prompt_and_response(style):
    tok = tokenizer(style)
    template = ChatTemplate(tok)
    row = template.tokens([USER], "It is two.")
    assert (tok.decode(row.prompt), tok.decode(row.response)) == SINGLE[style]
    assert template.prompt([USER]) == row.prompt
    assert template.notes == []


@pytest.mark.parametrize("style", TEMPLATES)
def test_the_turn_ends_once_and_the_header_is_the_prompts(style):
    tok = tokenizer(style)
    for messages in ([USER], TALK):
        row = ChatTemplate(tok).tokens(messages, " \n It is\n\ntwo. ")
        special = [token for token in row.response if token in tok.added_tokens_decoder]
        assert special == [row.response[-1]]
        assert row.prompt == ChatTemplate(tok).prompt(messages)


def test_what_a_template_takes_from_an_answer_is_scored_all_the_same():
    tok = tokenizer("thinking")
    row = ChatTemplate(tok).tokens([USER], "one, two</think>two")
    assert tok.decode(row.response) == "one, two</think>two<eos>"
    row = ChatTemplate(tok).tokens([USER], "<think>\none, two\n</think>\n\ntwo")
    assert tok.decode(row.response) == "one, two\n</think>\n\ntwo<eos>"


def test_tokens_do_not_span_the_border():
    """Line breaks that merge with the header's would move the border into the prompt."""
    tok = tokenizer("chatml")
    row = ChatTemplate(tok).tokens([USER], "\n\nIt is two.")
    assert row.prompt == ChatTemplate(tok).prompt([USER])
    assert tok.decode(row.response) == "\n\nIt is two.<|im_end|>"


@pytest.mark.parametrize("style", ["gemma", "mistral"])
def test_a_conversation_that_the_template_refuses(style):
    with pytest.raises(TemplateError, match=r"refuses a conversation of roles user, user: .*must alternate"):
        ChatTemplate(tokenizer(style)).tokens([USER, USER], "two")


@pytest.mark.parametrize("text", ["{{ 1 / 0 }}", "{% macro a() %}{{ a() }}{% endmacro %}{{ a() }}", "{% if %}"])
def test_a_template_that_fails_refuses(text):
    tok = tokenizer("chatml")
    tok.chat_template = text
    with pytest.raises(TemplateError, match="refuses a conversation of roles user"):
        ChatTemplate(tok).tokens([USER], "two")


def test_an_answer_that_ends_twice_is_refused():
    with pytest.raises(TemplateError, match="holds the token that ends turns"):
        ChatTemplate(tokenizer("chatml")).tokens([USER], "It is<|im_end|>two.")


def test_a_template_without_answers_is_refused_by_name():
    tok = tokenizer("chatml")
    tok.chat_template = "{{ messages[0].content }}"
    tok.name_or_path = "some/tokenizer"
    with pytest.raises(TemplateError, match=r"some/tokenizer doesn't show the assistant's answer"):
        ChatTemplate(tok).tokens([USER], "two")


def test_without_template_plain_text():
    tok = tokenizer(None)
    template = ChatTemplate(tok)
    row = template.tokens(TALK, "It is two.")
    assert tok.decode(row.prompt) == "What is one and one?\n\ntwo\n\nAnd one more?\n\n"
    assert tok.decode(row.response) == "It is two.<eos>"
    assert "plain text" in template.notes[0]


def rows(prompt: int, *responses: int) -> list[Tokens]:
    return [Tokens(tuple(range(prompt)), tuple(range(100, 100 + length))) for length in responses]


def test_rows_that_fit_are_left_alone():
    assert fitted(rows(10, 5, 10), LengthLimits(20)) == (tuple(rows(10, 5, 10)), False)
    assert fitted(rows(10, 5, 10), LengthLimits(20, prompt=10)) == (tuple(rows(10, 5, 10)), False)


def test_rows_that_are_too_long_are_dropped():
    assert fitted(rows(10, 5, 11), LengthLimits(20)) is None
    assert fitted(rows(10, 5), LengthLimits(20, prompt=9)) is None


def test_rows_that_are_too_long_are_cut():
    """The prompt loses its beginning, responses their end."""
    cut = fitted(rows(15, 3, 30), LengthLimits(20, too_long="cut"))
    assert cut.cut
    assert {row.prompt for row in cut.rows} == {tuple(range(5, 15))}
    assert [row.response for row in cut.rows] == [(100, 101, 102), tuple(range(100, 110))]
    assert [len(row.prompt) for row in fitted(rows(5, 30), LengthLimits(20, prompt=12, too_long="cut")).rows] == [5]
    assert [len(row.response) for row in fitted(rows(5, 30), LengthLimits(20, prompt=12, too_long="cut")).rows] == [15]
