"""Exact match."""

from __future__ import annotations

import pytest
from pydantic import ValidationError

from mergekit_lite.answers.scorers.exact import Exact, Options
from mergekit_lite.answers.scoring.scorer import ScorerSettings
from tests.answers.scorers.asked import judged

SETTINGS = ScorerSettings(name="exact", kind="exact")


@pytest.mark.parametrize(
    ("pattern", "answer", "reference", "value"),
    [
        (None, "  4 apples\n", "4 apples", 1),
        (None, "4   apples", "4\napples", 1),
        (None, "4 Apples", "4 apples", 0),
        (None, "it is 4", "4", 0),
        (r"-?\d+", "first 3, then -4.", "-4", 1),
        (r"-?\d+", "first -4, then 3.", "-4", 0),
        (r"#### (.*)", "so it is\n#### 72", "72", 1),
        (r"#### (.*)", "so it is 72", "72", 0),
        (r"a(b)?", "a", "", 1),
    ],
)
def test_values(pattern: str | None, answer: str, reference: str, value: float) -> None:
    scorer = Exact(SETTINGS, Options(pattern=pattern))
    assert scorer.score([judged(answer, reference=reference)])[0].value == value


def test_a_prompt_without_reference_has_no_score() -> None:
    found = Exact(SETTINGS, Options()).score([judged("4"), judged("4", reference="4")])
    assert found[0].value is None and "no reference" in found[0].why and found[1].value == 1


def test_a_broken_pattern_is_refused() -> None:
    with pytest.raises(ValidationError, match="not a regular expression: unterminated character set"):
        Options(pattern="[")
