"""How firm a choice is, against the rule itself and by its limits."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from mergekit_lite.answers.intervals import of_differences
from mergekit_lite.boosting.search import flips
from mergekit_lite.boosting.search.flips import stays
from mergekit_lite.boosting.search.search import grid
from mergekit_lite.boosting.summary import verdict
from tests.boost.search.test_choice import SyntheticEvaluator, search


def gains(mean: float, n: int = 400, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(mean, 1, n)


def test_a_large_gain_stays_and_a_close_call_doesn_t() -> None:
    sure = stays({"a": gains(1.0)}, {"a": 1.0}, gains(1.0, seed=1), "a", 0.95)
    assert set(sure.values()) == {(1.0, 1.0)}
    close = stays({"a": gains(0.5), "b": gains(0.5, seed=2)}, {"a": 2.0, "b": 1.0}, None, "b", 0.95)
    assert 0.3 < close[0.25].same <= close[0.1].same < 1
    weak = stays({"a": gains(0.2)}, {"a": 1.0}, gains(0.2, seed=1), "a", 0.95)
    assert weak[0.25] < weak[0.1] < (1, 1)
    assert weak[0.1].same == weak[0.1].as_good, "there is no other"


def test_one_of_several_equals_stays_as_good_and_what_is_surely_worse_doesn_t_count() -> None:
    """Eight candidates that are one, but for their noise: hardly ever the same, nearly always one as good."""
    common = gains(0.5)
    noise = np.random.default_rng(5).normal(0, 0.05, (8, 400))
    equal = {f"{place}": common + row - row.mean() for place, row in enumerate(noise)}
    away = {name: 1 + 0.01 * float(name) for name in equal}
    kept = stays(equal, away, None, "0", 0.95)[0.25]
    assert kept.same < 0.7 and kept.as_good > 0.99
    # Two candidates where the nearer one is surely worse, and chosen in some draws.
    worse = {"far": common, "near": common - 0.1 + noise[0] - noise[0].mean()}
    kept = stays(worse, {"far": 2.0, "near": 1.0}, None, "far", 0.95)[0.25]
    assert kept.same == kept.as_good < 0.95


def test_the_share_is_that_of_the_rule_on_flipped_items(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second way: how often the real interval of flipped differences is above 0."""
    x = np.random.default_rng(3).choice([-1.0, 0.0, 1.0], size=300, p=[0.1, 0.65, 0.25])
    rng = np.random.default_rng(4)
    flipped = [of_differences(np.where(rng.random(300) < 0.1, -x, x)).above for _ in range(400)]
    monkeypatch.setattr(flips, "DRAWS", 400)
    assert stays({"a": x}, {"a": 1.0}, None, "a", 0.95)[0.1].same == pytest.approx(np.mean(flipped), abs=0.08)


def test_items_without_a_score_are_left_out() -> None:
    x = gains(0.3)
    holes = np.concatenate([x, np.full(100, np.nan)])
    found, expected = (stays({"a": each}, {"a": 1.0}, None, "a", 0.95) for each in (holes, x))
    assert [kept.same for kept in found.values()] == pytest.approx([kept.same for kept in expected.values()], abs=0.08)


def test_a_search_says_how_firm_its_choice_is(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(lambda params: 0.2 * params["alpha"], noise=0.5, items=300)
    result = search(evaluator, tmp_path, lambda same: grid({"alpha": [0.5, 1.0, 2.0]}))
    assert result.chosen == {"alpha": 2.0}
    before = len(evaluator.measured)
    assert 0.9 < result.stays[0.1].same <= 1 and result.stays[0.25] <= result.stays[0.1]
    assert len(evaluator.measured) == before
    [said] = [line for line in verdict(result) if "labels flipped" in line]
    assert said.startswith("With 10 % of the labels flipped the same is chosen in ")
    assert "of 200 draws, the same or one as good in " in said and "; with 25 % of " in said
    nothing = search(SyntheticEvaluator(lambda params: -params["alpha"]), tmp_path / "none")
    assert nothing.stays == {}
