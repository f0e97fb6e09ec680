"""Why a model wins: what is counted, the fit beside a naive one, and that known reasons are found."""

from __future__ import annotations

import numpy as np
import pytest

from mergekit_lite.answers.traits import LEAST, PRIOR, TRAITS, Compared, posterior, reasons

TEXT = """\
Sure! Perhaps **this** helps, or it might not. Is it so?

## Steps

1. first
- second, __maybe__

```python
x = 2 * 3 ** 2  # no ** bold **
```
"""


def test_what_is_counted() -> None:
    found = {name.partition(",")[0]: measure(TEXT) for name, measure in TRAITS.items()}
    assert found["length"] == pytest.approx(np.log(1 + len(TEXT)))
    assert found["hedging"] == pytest.approx(100 * 2 / len(TEXT.split()))
    counts = ("items of lists", "headings", "bold passages", "blocks of code", "exclamation marks", "questions")
    assert [found[name] for name in counts] == [2, 1, 2, 1, 1, 1]
    assert (found["begins with a courtesy"], found["begins with a refusal"]) == (1, 0)
    assert TRAITS["begins with a refusal"]("“I’m sorry, but no.”") == TRAITS["begins with a refusal"]("I can't.") == 1
    assert {measure("") for measure in TRAITS.values()} == {0}


def naive(z: np.ndarray, preferred: np.ndarray) -> np.ndarray:
    """Gradient descent on the same posterior, item by item."""
    precision = [PRIOR**-2] + [1.0] * (z.shape[1] - 1)
    weights = np.zeros(z.shape[1])
    for _ in range(20000):
        slope = np.array(precision) * weights
        for row, y in zip(z, preferred, strict=True):
            slope = slope + (1 / (1 + np.exp(-row @ weights)) - y) * row
        if np.abs(slope).max() < 1e-9:
            break
        weights = weights - 0.05 * slope
    return weights


def test_the_fit_beside_a_naive_one() -> None:
    rng = np.random.default_rng(1)
    z = np.column_stack([np.ones(30), rng.normal(size=(30, 3))])
    preferred = rng.choice([0, 0.5, 1], size=30)
    weights, covariance = posterior(z, preferred)
    assert weights == pytest.approx(naive(z, preferred), abs=1e-7)
    p = 1 / (1 + np.exp(-z @ weights))
    curvature = sum(q * (1 - q) * np.outer(row, row) for q, row in zip(p, z, strict=True))
    assert covariance == pytest.approx(np.linalg.inv(curvature + np.diag([PRIOR**-2, 1, 1, 1])))


def test_all_won_has_a_fit() -> None:
    weights, _ = posterior(np.ones((40, 1)), np.ones(40))
    assert 3 < weights[0] < 20


def test_intervals_cover_the_truth() -> None:
    rng = np.random.default_rng(2)
    covered = []
    for _ in range(200):
        truth = rng.normal(size=4) * [PRIOR / 5, 1, 1, 1]
        z = np.column_stack([np.ones(200), rng.normal(size=(200, 3))])
        preferred = (rng.random(200) < 1 / (1 + np.exp(-z @ truth))).astype(float)
        weights, covariance = posterior(z, preferred)
        covered.append(np.abs(weights - truth) < 1.96 * np.sqrt(np.diag(covariance)))
    assert 0.92 < np.mean(covered) < 0.98


def compared(seed: int, by: str, count: int = 200) -> list[Compared]:
    """Answers that differ in length and in lists, each by itself; one of the two decides."""
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(count):
        lengths, items = rng.integers(5, 60, size=2), rng.integers(0, 5, size=2)
        texts = ["\n".join(["word " * n, *["- item"] * k]) for n, k in zip(lengths, items, strict=True)]
        decides = {"length": [len(text) for text in texts], "lists": items, "nothing": rng.random(2)}[by]
        right = rng.random() < 0.9  # judges err
        rows.append(Compared(*texts, 0.5 if decides[0] == decides[1] else float((decides[0] > decides[1]) == right)))
    return rows


@pytest.mark.parametrize(("by", "trait"), [("length", "length, log of characters"), ("lists", "items of lists")])
def test_the_reason_is_found(by: str, trait: str) -> None:
    found = reasons(compared(3, by))
    assert found is not None and found.effects[0].trait == trait
    assert found.effects[0].weight.above and not any(effect.weight.above for effect in found.effects[1:])
    assert {effect.trait for effect in found.effects} == {"length, log of characters", "items of lists"}


def test_a_win_by_form_alone_is_none_between_answers_that_are_alike() -> None:
    rows = [Compared(each.ours + "\n- one more" * 4, each.theirs, 1.0) for each in compared(4, "nothing")]
    rows += compared(5, "lists")
    found = reasons(rows)
    assert found is not None and found.win_rate > 0.7 and found.effects[0].trait == "items of lists"
    assert found.alike.mean < found.win_rate - 0.1 and found.effects[0].part > 0.1


def test_the_other_model_has_the_other_reasons() -> None:
    rows = compared(6, "length")
    found = reasons(rows)
    turned = reasons([Compared(each.theirs, each.ours, 1 - each.preferred) for each in rows])
    assert found is not None and turned is not None
    assert turned.win_rate == pytest.approx(1 - found.win_rate)
    assert turned.alike.mean == pytest.approx(1 - found.alike.mean)
    for ours, theirs in zip(found.effects, turned.effects, strict=True):
        assert (ours.ours, ours.theirs) == pytest.approx((theirs.theirs, theirs.ours))
        assert ours.weight[:3] == pytest.approx(theirs.weight[:3]) and ours.part == pytest.approx(-theirs.part)


def test_few_prompts_and_equal_answers() -> None:
    assert reasons(compared(7, "length", LEAST - 1)) is None
    found = reasons([Compared("a", "a", 0.5)] * LEAST)
    assert found is not None and found.effects == () and found.alike.mean == found.win_rate == 0.5


def test_thoughts_are_no_part_of_it() -> None:
    found = reasons([Compared("<think>- a\n- b</think>yes", "yes", float(number % 2)) for number in range(LEAST)])
    assert found is not None and found.effects == ()
