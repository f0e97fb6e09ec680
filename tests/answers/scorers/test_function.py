"""A function of the user's as a scorer: TRL's reward function."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.answers.scorers.function import Function, function_named
from mergekit_lite.answers.scoring.scorer import Score, ScorerOptions, ScorerSettings
from mergekit_lite.errors import RunError, UsageError
from tests.answers.scorers.asked import judged

MODULE = """
import math
import numpy
import torch
calls = []
def seen(prompts, completions, **columns):
    calls.append({"prompts": prompts, "completions": completions, **columns})
    return [float(len(prompts))] * len(prompts)
def named(completions, topic, reference=None, unknown=3):
    assert unknown == 3
    return [len(answer) + len(about) + (reference is not None) for answer, about in zip(completions, topic)]
def old(prompt, answer):
    return 1.0
def special(prompts, completions, completion_ids, **columns):
    return [0] * len(prompts)
def odd(prompts, completions, **columns):
    return [value(answer) for answer in completions]
def value(answer):
    if answer == "worse":
        raise ZeroDivisionError("division by zero")
    return {"nothing": None, "nan": math.nan, "true": True, "numpy": numpy.float32(2), "7": 7}[answer]
def returned(prompts, completions, **columns):
    return WRONG[completions[0]]
WRONG = {"number": 0.5, "none": None, "text": "11", "dict": {1: 2, 3: 4}, "short": [1.0], "long": [1, 2, 3],
         "texts": ["7", "8"], "array": numpy.array([1.5, 2.5]), "tensor": torch.tensor([1, 2]), "tuple": (3, None),
         "scalar": torch.tensor(1.0)}
number = 7
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    for name in ("my_scores", "my_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def function(name: str) -> Function:
    return Function(ScorerSettings(name="f", kind="function", model=name), ScorerOptions())


def scores(name: str, *answers: str, **prompt: Any) -> list[Score]:
    return function(name).score([judged(answer, **prompt) for answer in answers])


def test_it_gets_what_trl_gives(here: None) -> None:
    """A text where the data have one, else messages; each column as a list."""
    path = list(sys.path)
    one = judged("a", "Q?", plain=True, columns={"topic": "bread"}, reference="R", domain="d")
    other = judged("b", "P?", columns={"given": [1, 2]}, tests=("assert 1",))
    scorer = function("my_scores:seen")
    assert [score.value for score in scorer.score([one, other])] == [2, 2]
    assert scorer.score([]) == []
    assert sys.path == path
    assert sys.modules["my_scores"].calls == [
        {
            "prompts": ["Q?", [{"role": "user", "content": "P?"}]],
            "completions": ["a", [{"role": "assistant", "content": "b"}]],
            "id": ["p", "p"],
            "domain": ["d", ""],
            "reference": ["R", None],
            "tests": [[], ["assert 1"]],
            "topic": ["bread", None],
            "given": [None, [1, 2]],
        }
    ]


def test_one_without_columns_gets_what_it_names(here: None) -> None:
    found = scores("my_scores:named", "ab", "c", plain=True, columns={"topic": "bread"})
    assert [score.value for score in found] == [8, 7]


@pytest.mark.parametrize(
    ("name", "lacking"),
    [("old", "'prompt', 'answer'"), ("special", "'completion_ids'"), ("named", "'topic'")],
)
def test_what_it_takes_and_there_is_not_is_named(here: None, name: str, lacking: str) -> None:
    with pytest.raises(UsageError) as caught:
        scores(f"my_scores:{name}", "a")
    assert f"takes {lacking}, which there isn't" in str(caught.value)
    assert "f(prompts, completions, **columns)" in str(caught.value) and "`keep: [NAME]`" in str(caught.value)


def test_a_column_named_like_an_argument_is_refused(here: None) -> None:
    with pytest.raises(UsageError, match="keep a column 'completions'"):
        scores("my_scores:seen", "a", columns={"completions": 1})


def test_single_failures_are_counted(here: None) -> None:
    answers = ["nothing", "nan", "true", "numpy", "other", "worse", "7"]
    found = scores("my_scores:odd", *answers, plain=True)
    assert [score.value for score in found] == [None, None, 1, 2, None, None, 7]
    assert [score.why for score in found] == [
        "the function returned None",
        "the score is nan",
        "",
        "",
        "KeyError: 'other'",
        "ZeroDivisionError: division by zero",
        "",
    ]


def test_one_that_raises_on_its_first_answers_ends_with_its_own_traceback(here: None) -> None:
    scorer = function("my_scores:odd")
    with pytest.raises(RunError) as caught:
        scorer.score([judged("worse", plain=True)] * 3)
    lines = str(caught.value).splitlines()
    assert lines[0] == "The function my_scores:odd raised an error on its first answers:"
    assert lines[2] == "Traceback (most recent call last):" and lines[3].endswith("line 17, in odd")
    assert lines[-1] == "ZeroDivisionError: division by zero" and "function.py" not in str(caught.value)
    assert scorer.score([judged("7", plain=True)])[0].value == 7
    later = scorer.score([judged("worse", plain=True)] * 3)  # no longer its first ones
    assert [score.why for score in later] == ["ZeroDivisionError: division by zero"] * 3


@pytest.mark.parametrize(
    ("kind", "why"),
    [
        ("number", "returned float, 0.5"),
        ("none", "returned NoneType, None"),
        ("text", "returned str, '11'"),
        ("dict", "returned dict, {1: 2, 3: 4}"),
        ("short", "returned 1 scores for 2 answers"),
        ("long", "returned 3 scores for 2 answers"),
        ("texts", "returned '7', of the type str, as the score of answer 0"),
        ("scalar", "returned one number for 2 answers"),
    ],
)
def test_what_is_no_list_of_numbers_is_an_error(here: None, kind: str, why: str) -> None:
    with pytest.raises(RunError) as caught:
        scores("my_scores:returned", kind, kind, plain=True)
    assert why in str(caught.value) and "a number or None for each answer" in str(caught.value)


@pytest.mark.parametrize(("kind", "values"), [("array", [1.5, 2.5]), ("tensor", [1, 2]), ("tuple", [3, None])])
def test_numbers_may_come_in_any_sequence(here: None, kind: str, values: list[float | None]) -> None:
    assert [score.value for score in scores("my_scores:returned", kind, kind, plain=True)] == values


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("my_scores", "named module:function"),
        ("my_scores:", "named module:function"),
        ("my_scores:nothing", "has no function 'nothing'"),
        ("my_scores:number", "has no function 'number'"),
        ("not_here:length", "Can't import 'not_here'"),
        ("my_broken:length", "No module named 'nothing_of_this_name'"),
    ],
)
def test_what_is_no_function_is_refused(here: None, name: str, why: str) -> None:
    with pytest.raises(UsageError, match=why):
        function_named(name)
