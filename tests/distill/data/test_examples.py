"""One row of data, in every form that others write it in."""

from __future__ import annotations

from typing import Any

import pytest

from mergekit_lite.distillation.data.examples import Example, example_of

USER = {"role": "user", "content": "one and one?"}
SYSTEM = {"role": "system", "content": "Be helpful."}
EARLIER = [{"role": "user", "content": "What?"}, {"role": "assistant", "content": "That."}]
TWO, THREE = ({"role": "assistant", "content": text} for text in ("two", "three"))
HUMAN, GPT = {"from": "human", "value": "one and one?"}, {"from": "gpt", "value": "two"}
THOUGHT = "<think>\nwhy not\n</think>\n\ntwo"

PREFERENCES = {
    "TRL": {"prompt": [USER], "chosen": [TWO], "rejected": [THREE]},
    "TRL, implicit prompt": {"chosen": [USER, TWO], "rejected": [USER, THREE]},
    "TRL, texts": {"prompt": "one and one?", "chosen": "two", "rejected": "three"},
    "TRL, texts, implicit prompt": {"chosen": "one and one? two", "rejected": "one and one? three"},
    "HH": {
        "chosen": "\n\nHuman: one and one?\n\nAssistant: two",
        "rejected": "\n\nHuman: one and one?\n\nAssistant: three",
    },
    "UltraFeedback, binarized": {
        "prompt": "one and one?",
        "prompt_id": "0",
        "chosen": [USER, TWO],
        "rejected": [USER, THREE],
        "messages": [USER, TWO],
        "score_chosen": 8.0,
        "score_rejected": 3.5,
    },
    "WRPO, one chosen": {"prompt_id": "0", "prompt": USER, "chosen": [TWO], "rejected": [THREE]},
    "LLaMA-Factory": {"conversations": [HUMAN], "chosen": GPT, "rejected": {"from": "gpt", "value": "three"}},
    "LLaMA-Factory, Alpaca": {"instruction": "one and one?", "input": "", "chosen": "two", "rejected": "three"},
    "ours": {
        "prompt": "an id",
        "messages": [USER],
        "chosen": [{"text": "two", "role": "source", "source": "a", "score": 8}],
        "rejected": [{"text": "three", "role": "source", "source": "a", "score": 3.5}],
    },
}
ANSWERED = {
    "TRL": {"prompt": [USER], "completion": [TWO]},
    "TRL, texts": {"prompt": "one and one?", "completion": "two"},
    "messages": {"messages": [USER, TWO]},
    "messages in parts": {"messages": [{"role": "user", "content": [{"type": "text", "text": "one and one?"}]}, TWO]},
    "ShareGPT": {"conversations": [HUMAN, GPT]},
    "ShareGPT, system": {"conversations": [HUMAN, GPT], "system": ""},
    "Alpaca": {"instruction": "one and one?", "output": "two"},
    "ours": {"prompt": "an id", "messages": [USER], "response": "two"},
    "with null columns": {"messages": [USER, TWO], "chosen": None, "prompt": None},
}


def said(example: Example) -> tuple[Any, ...]:
    return example.prompt.messages, *([given.text for given in side] for side in (example.chosen, example.rejected))


@pytest.mark.parametrize("form", PREFERENCES)
def test_preferences(form: str) -> None:
    example = example_of(PREFERENCES[form])
    assert said(example) == ((USER,), ["two"], ["three"])
    scores = [given.score for given in (*example.chosen, *example.rejected)]
    assert scores == ([8, 3.5] if form in ("UltraFeedback, binarized", "ours") else [None, None])


def test_prompts_are_as_those_that_a_recipe_names() -> None:
    row = {"prompt": "one", "reference": 4, "tests": ["assert True"], "completion": "two"}
    prompt = example_of(row).prompt
    assert (prompt.reference, prompt.tests, prompt.plain) == ("4", ("assert True",), True)
    ours = {"prompt": "an id", "messages": [USER], "response": "two"}
    with_system = {"system": "Be brief.", "instruction": "one", "output": "two"}
    assert not any(example_of(row).prompt.plain for row in (ours, with_system, {"messages": [USER, TWO]}))


def test_a_role_of_other_data_is_none_of_ours() -> None:
    sides = {name: [{"text": name, "role": role}] for name, role in (("chosen", "target"), ("rejected", "assistant"))}
    assert [given.role for given in example_of({"messages": [USER], **sides}).all] == ["target", ""]


def test_answers_that_end_in_their_thoughts_are_cut() -> None:
    for text, cut in (("<think> and so", True), ("<think>so</think> 4", False), ("4", False)):
        (given,) = example_of({"prompt": "one", "completion": text}).answers
        assert given.cut is cut
    ours = {"messages": [USER], "response": "4", "cut": True}
    assert [given.cut for given in example_of(ours).answers] == [True]


@pytest.mark.parametrize("form", ANSWERED)
def test_answers(form: str) -> None:
    example = example_of(ANSWERED[form], "sums")
    assert (example.prompt.messages, [given.text for given in example.answers]) == ((USER,), ["two"])
    assert example.prompt.domain == "sums"
    assert example.prompt.id == example_of(PREFERENCES["TRL"]).prompt.id  # whatever form it comes in


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": [SYSTEM, *EARLIER, USER], "chosen": [TWO], "rejected": [THREE]},
        {"chosen": [SYSTEM, *EARLIER, USER, TWO], "rejected": [SYSTEM, *EARLIER, USER, THREE]},
        {"prompt": "What?", "chosen": [SYSTEM, *EARLIER, USER, TWO], "rejected": [SYSTEM, *EARLIER, USER, THREE]},
        {
            "system": "Be helpful.",
            "conversations": [{"from": "human", "value": "What?"}, {"from": "gpt", "value": "That."}, HUMAN],
            "chosen": GPT,
            "rejected": {"from": "gpt", "value": "three"},
        },
    ],
)
def test_long_conversations(row: dict[str, Any]) -> None:
    assert said(example_of(row)) == ((SYSTEM, *EARLIER, USER), ["two"], ["three"])


def test_several_chosen_as_wrpo_has_them() -> None:
    example = example_of({"prompt": USER, "chosen": [TWO, THREE], "rejected": [TWO]})
    assert said(example) == ((USER,), ["two", "three"], ["two"])


def test_answers_of_several_models_with_scores() -> None:
    completions = [
        {"model": "a", "response": "two", "overall_score": 8.5, "principle": "honesty"},
        {"model": "b", "response": "three", "overall_score": "N/A"},
    ]
    example = example_of({"instruction": "one and one?", "completions": completions, "models": ["a", "b"]})
    assert [(g.text, g.model, g.score) for g in example.answers] == [("two", "a", 8.5), ("three", "b", None)]
    row = {"prompt": "one and one?", "all_generated_responses": ["two", "three"], "all_rm_scores": [0.2, 0.1]}
    assert [given.score for given in example_of(row).answers] == [0.2, 0.1]


@pytest.mark.parametrize("key", ["reasoning_content", "thinking"])
def test_thoughts_that_are_apart(key: str) -> None:
    assert example_of({"messages": [USER, {**TWO, key: "why not"}]}).answers[0].text == THOUGHT


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"question": "one?", "answer": "two"}, "the columns 'question', 'answer' are none of those that are known"),
        ({"chosen": "two", "rejected": "three"}, "begin with nothing in common"),
        ({"chosen": [TWO], "rejected": "three", "prompt": "?"}, "message 1: expected {role, content}"),
        ({"prompt": "?", "chosen": [], "rejected": [TWO]}, "both texts, or both lists of messages"),
        ({"prompt": "What else?", "chosen": [USER, TWO], "rejected": [USER, THREE]}, "'prompt' isn't what"),
        ({"chosen": [USER, TWO, USER], "rejected": [USER, THREE]}, "a turn of the role 'user' follows the answer"),
        ({"chosen": [USER, TWO], "rejected": [SYSTEM, THREE]}, "don't begin with the same turn of a user"),
        ({"messages": [USER, TWO, USER]}, "the last message is of the role 'user': there is no answer"),
        ({"messages": [USER, {"role": "tool", "content": "2"}]}, "message 2: the role is 'tool', expected one of"),
        ({"messages": [USER, {**TWO, "tool_calls": [1]}]}, "message 2: it calls tools"),
        ({"messages": [USER, {"role": "assistant", "content": None}]}, "message 2: the content is 'None'"),
        ({"prompt": [USER, TWO], "completion": "three"}, "what is answered has to end with a turn of the user"),
        ({"prompt": "?", "all_generated_responses": ["two"], "all_rm_scores": []}, "1 answers have 0 scores"),
        ({"conversations": "two"}, "expected a list of messages"),
    ],
)
def test_what_is_refused(row: dict[str, Any], why: str) -> None:
    with pytest.raises(ValueError, match=r"^.*$") as error:
        example_of(row)
    assert why in str(error.value)
