"""Scores of which lower is better: kept with the other sign, and only where that makes sense."""

from __future__ import annotations

import pytest

from mergekit_lite.answers.scoring.registry import open_scorer, wrong_settings
from mergekit_lite.answers.scoring.scorer import ScorerSettings
from tests.answers.scorers.asked import judged


def mistakes(completions: list[list[dict[str, str]]], **_: object) -> list[float | None]:
    """How many x an answer has; no score for a blank one."""
    answers = [completion[0]["content"] for completion in completions]
    return [float(answer.count("x")) if answer else None for answer in answers]


def test_higher_is_better_once_it_is_opened() -> None:
    settings = ScorerSettings(name="mistakes", kind="function", model=f"{__name__}:mistakes")
    answers = [judged(text) for text in ("xx", "right", "")]
    with open_scorer(settings) as plain, open_scorer(settings.model_copy(update={"minimise": True})) as minimised:
        assert minimised.name == "mistakes"
        assert [score.value for score in plain.score(answers)] == [2.0, 0.0, None]
        found = minimised.score(answers)
        assert [score.value for score in found] == [-2.0, 0.0, None]
        assert str(found[1].value) == "0.0" and found[2].why == plain.score(answers)[2].why


@pytest.mark.parametrize("kind", ["exact", "maths"])
def test_right_answers_are_not_minimised(kind: str) -> None:
    [wrong] = wrong_settings(ScorerSettings(name="a", kind=kind, minimise=True))
    assert wrong.at == ("minimise",) and "has no effect" in wrong.text
