"""Guards on answers whose faults are known."""

from __future__ import annotations

import dataclasses
import re
from pathlib import Path

import pytest

from mergekit_lite.boosting.candidates.candidate import ItemRow
from mergekit_lite.boosting.search.guards import (
    ADDED,
    NAMES,
    Guards,
    Limits,
    beyond,
    guards,
    limits,
    losses,
    repetition,
)
from mergekit_lite.errors import UsageError


def answers(*texts: str, finish: str = "stop") -> dict[str, ItemRow]:
    return {str(i): ItemRow(item=str(i), values={"s": 1.0}, text=text, finish=finish) for i, text in enumerate(texts)}


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", 0.0),
        ("one two three", 0.0),
        ("one two three four five", 0.0),
        ("a b c d a b c d", 1 - 4 / 5),
        ("yes " * 103, 1 - 1 / 100),
        ("!" * 103, 1 - 1 / 100),
        ("好" * 103, 1 - 1 / 100),
        ("today, today, today, today", 1 - 2 / 4),
    ],
)
def test_repetition_is_the_share_of_4_grams_said_before(text: str, expected: float) -> None:
    assert repetition(text) == pytest.approx(expected)


def test_figures_of_answers() -> None:
    base = answers("abcd", "efgh", "ijkl", "mnop")
    rows = answers("abcd", "xx", "xx", "mnopmnop")
    rows["3"]["finish"] = "length"
    rows["2"]["values"]["s"] = None
    found = guards(rows, base, "s")
    assert found.answers == 4 and found.length == 4 and found.growth == 1
    assert found.truncated == 0.25 and found.ended == 0.75
    assert found.identical == 0.5, "both of the two that are alike"
    assert found.unchanged == 0.25 and found.unscored == 0.25
    assert found.kl is None and found.kl_per_token is None


def test_growth_is_over_the_items_that_both_answered() -> None:
    base = answers("ab", "a" * 1000)
    rows = answers("abcd")
    assert guards(rows, base, "s").growth == 2


def test_kl_is_the_mean_log_ratio() -> None:
    rows = answers("a", "b")
    rows["0"] |= ItemRow(log_prob=-10.0, aligned_log_prob=-12.0, tokens=5)  # type: ignore[typeddict-item]
    rows["1"] |= ItemRow(log_prob=-11.0, aligned_log_prob=-11.5, tokens=20)  # type: ignore[typeddict-item]
    found = guards(rows, rows, "s")
    assert found.kl == pytest.approx(1.25) and found.kl_per_token == pytest.approx(0.1)
    assert found.kl_error == pytest.approx(0.75) and found.kl_answers == 2


def test_answers_to_one_prompt_make_kl_no_surer() -> None:
    """Its standard error is that of the prompts' means."""
    ratios = [(f"{prompt}#{answer}", float(prompt + answer)) for prompt in range(4) for answer in range(8)]
    rows = {item: ItemRow(item=item, text="a", log_prob=ratio, aligned_log_prob=0.0) for item, ratio in ratios}
    found = guards(rows, rows, "s")
    assert found.kl == pytest.approx(5.0) and found.kl_answers == 32
    assert found.kl_error == pytest.approx((5 / 3) ** 0.5 / 2)


def test_items_without_answers_have_no_figures() -> None:
    rows = {"a": ItemRow(item="a", values={"s": 0.5})}
    found = guards(rows, rows, "s")
    assert found == Guards(unscored=0.0) and beyond(found, found, Limits()) == []


def test_each_limit_is_passed_by_what_it_names_and_by_nothing_else() -> None:
    base = Guards(answers=4, growth=1.0, truncated=0.2, repetition=0.1, identical=0.1, unscored=0.0, kl=0.0)
    held = Limits(growth=1.5, truncated=0.1, repetition=0.1, identical=0.1, unscored=0.1, kl=2.0, kl_per_token=0.1)
    assert beyond(base, base, held) == []
    bad = Guards(growth=1.6, truncated=0.31, repetition=0.21, identical=0.21, unscored=0.11, kl=2.1, kl_per_token=0.2)
    said = beyond(bad, base, held)
    names = ["growth", "truncated", "repetition", "identical", "unscored", "kl", "kl_per_token"]
    assert [one.split()[0] for one in said] == names
    nothing = Limits(growth=None, truncated=None, repetition=None, identical=None, unscored=None)
    assert beyond(bad, base, nothing) == []


def test_the_papers_own_choices_are_within_the_limits() -> None:
    """Mean lengths on AlpacaEval before and after the chosen alpha, of its tables."""
    for before, after in [(863, 1397), (958, 2163), (1125, 2138), (1502, 2119), (1570, 1706), (2591, 3335)]:
        assert beyond(Guards(growth=after / before), Guards(growth=1.0), Limits()) == []


def test_a_scorer_may_not_lose_more_than_its_limit() -> None:
    held = limits(["loss:maths=0.02"])
    assert losses({"maths": -0.02, "s": -9.0}, held) == []
    assert losses({"maths": -0.03}, held) == ["maths loses 0.03, more than 0.02"]


def test_limits_are_read() -> None:
    found = limits(["growth=1.5", "kl=none", "truncated=NONE", "loss:a=b=0.5"])
    assert found == Limits(growth=1.5, kl=None, truncated=None, loss={"a=b": 0.5})


def test_every_limit_that_can_not_be_read_is_told() -> None:
    with pytest.raises(UsageError) as caught:
        limits(["grwth=2", "kl=much", "loss:x=none", "truncated=-1", "repetition=inf"])
    message = str(caught.value)
    for part in ("'grwth=2'", "'growth'", "'kl=much'", "'loss:x=none'", "'truncated=-1'", "'repetition=inf'"):
        assert part in message


def test_the_table_of_docs_boost_has_the_figures_and_their_limits() -> None:
    page = (Path(__file__).parents[3] / "docs/boost.md").read_text(encoding="utf-8")
    section = page.partition("\n## Guards\n")[2].partition("\n## ")[0]
    rows = [row.split("|")[1:-1] for row in re.findall(r"^\| `.*", section, re.MULTILINE)]
    shown_limits = {name: limit.strip() for names, _, limit in rows for name in re.findall("`([^`]+)`", names)}
    assert shown_limits.keys() - {"ended", "unchanged", "loss:SCORER"} == set(NAMES)
    assert shown_limits.keys() - {"loss:SCORER"} <= {field.name for field in dataclasses.fields(Guards)}
    for name in NAMES:
        limit = getattr(Limits(), name)
        shown = "none" if limit is None else f"{100 * limit:g} points above" if name in ADDED else f"{limit:g}:"
        assert shown_limits[name].startswith(shown), name
