"""A function of the user's as a scorer."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from mergekit_lite.answers.scorers.function import Function, function_named
from mergekit_lite.answers.scoring.scorer import Score, ScorerOptions, ScorerSettings
from mergekit_lite.errors import UsageError
from tests.answers.scorers.asked import judged

MODULE = """
import math
def length(prompt, answer):
    return len(answer) / len(prompt.messages)
def odd(prompt, answer):
    if answer == "worse":
        raise ZeroDivisionError("division by zero")
    return {"nothing": None, "nan": math.nan, "text": "7", "true": True}[answer]
number = 7
"""


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "my_scores.py").write_text(MODULE)
    (tmp_path / "my_broken.py").write_text("import nothing_of_this_name")
    monkeypatch.chdir(tmp_path)
    for name in ("my_scores", "my_broken"):
        monkeypatch.delitem(sys.modules, name, raising=False)


def scores(function: str, *answers: str) -> list[Score]:
    scorer = Function(ScorerSettings(name="f", kind="function", model=function), ScorerOptions())
    return scorer.score([judged(answer) for answer in answers])


def test_values(here: None) -> None:
    path = list(sys.path)
    assert [score.value for score in scores("my_scores:length", "four")] == [4]
    assert sys.path == path


def test_what_is_no_number_gives_no_score(here: None) -> None:
    answers = ["nothing", "nan", "text", "true", "other", "worse"]
    found = scores("my_scores:odd", *answers)
    assert [score.value for score in found] == [None, None, 7, 1, None, None]
    assert [score.why for score in found] == [
        "the function returned None",
        "the score is nan",
        "",
        "",
        "KeyError: 'other'",
        "ZeroDivisionError: division by zero",
    ]


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
