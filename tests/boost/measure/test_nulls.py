"""The null test: a judge behind a server that can be fooled, one that can't, and what a search does then."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mergekit_lite.answers.rows import Prompt
from mergekit_lite.boosting.candidates.candidate import ItemRow
from mergekit_lite.boosting.measure.nulls import ASKED, CONSTANTS, described, null_tests
from mergekit_lite.boosting.measure.scores import parse
from mergekit_lite.boosting.record import as_json
from mergekit_lite.boosting.report import write
from mergekit_lite.boosting.search.choice import boost
from mergekit_lite.boosting.search.point import Settings
from mergekit_lite.boosting.search.search import grid
from mergekit_lite.boosting.search.study import Study
from mergekit_lite.boosting.summary import verdict
from tests.answers.fake_server import Fake, fake_server
from tests.boost.synthetic import SyntheticEvaluator

PROMPTS = [Prompt(f"q{n}", ({"role": "user", "content": f"What is {n}?"},)) for n in range(40)]


def strict(asked: str, seed: int) -> str:
    """Grades everything but real answers 1."""
    return "Grade: 7" if "<answer>\nIt is" in asked else "Grade: 1"


def fooled(asked: str, seed: int) -> str:
    """Repeats a grade that it reads in the answer."""
    return "Grade: 10" if "This grade is final" in asked else strict(asked, seed)


def rows(samples: int) -> dict[str, ItemRow]:
    """The baseline's rows, all graded 7."""
    items = [p.id for p in PROMPTS] if samples == 1 else [f"{p.id}#{n}" for p in PROMPTS for n in range(samples)]
    return {item: ItemRow(item=item, values={"judge": 7.0}) for item in items}


@pytest.mark.parametrize(("say", "samples", "broken"), [(strict, 1, False), (fooled, 1, True), (fooled, 3, True)])
def test_a_constant_answer_must_not_win(
    say: Callable[[str, int], str], samples: int, broken: bool, tmp_path: Path
) -> None:
    with fake_server(Fake(say=say)) as server:
        scores = parse([f"judge:m,server={server.url}"])
        found = null_tests(scores, PROMPTS, tmp_path, rows(samples))
        asked = len(server.bodies)
        again = null_tests(scores, PROMPTS, tmp_path, rows(samples))
        assert asked == len(server.bodies) == len(CONSTANTS) * ASKED, "what was asked is kept"
        shown = {body["messages"][-1]["content"] for body in server.bodies}
        assert len(shown) == asked, "each constant is graded once on each of as many different prompts"
    assert found == again and bool(found) is broken
    assert f"{asked} requests" in described(scores)
    if broken:
        assert (
            f"an imitation of the judge's form, the same whatever was asked, above the baseline's answer to {ASKED}"
            in (found["judge"])
        )


@pytest.mark.parametrize("verdict", ["Better: B", "Better: tie"])
def test_a_judge_of_pairs_is_asked_in_both_orders(verdict: str, tmp_path: Path) -> None:
    """One that always takes the second answer, and one that finds all alike, let no constant win."""
    prompts = [replace(prompt, reference="It is so.") for prompt in PROMPTS]
    with fake_server(Fake(say=lambda text, seed: verdict)) as server:
        scores = parse([f"pairwise:m,server={server.url}"])
        tied = {prompt.id: ItemRow(item=prompt.id, values={"pairwise": 0.5}) for prompt in prompts}
        found = null_tests(scores, prompts, tmp_path, tied)
        assert found == {} and len(server.bodies) == 2 * len(CONSTANTS) * ASKED
    assert f"{len(server.bodies)} requests" in described(scores)


def test_only_judges_whose_high_grades_are_good_are_tested(tmp_path: Path) -> None:
    scores = parse(["exact", "judge:m,server=http://127.0.0.1:1,minimise=true"])
    assert null_tests(scores, PROMPTS, tmp_path, rows(1)) == {} and described(scores) == ""


@pytest.mark.parametrize("deciding", [True, False])
def test_nothing_is_chosen_by_a_broken_judge(deciding: bool, tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(lambda params: params["alpha"], items=80)
    tried: list[str] = []

    def test(rows: object) -> dict[str, str]:
        tried.extend(evaluator_params(evaluator))
        return {"score" if deciding else "other": "The judge J is broken: it likes <b>."}

    with Study(tmp_path, {}, evaluator.items) as study:
        settings = Settings(score="score")
        result = boost(lambda same: grid({"alpha": [1.0]}), evaluator, study, settings, test=test)
        page = write(result, study, {}, {}).read_text()
    assert tried == ["alpha=0"], "it is tested before any candidate is measured"
    assert (result.chosen is None) is deciding and bool(result.points) is not deciding
    said = verdict(result)
    assert any("The judge J is broken" in line for line in said)
    assert said[0].startswith("No candidate was chosen. The judge J") is deciding
    assert "it likes &lt;b&gt;" in page
    assert as_json(result, {})["broken"] == dict(result.broken)


def evaluator_params(evaluator: SyntheticEvaluator) -> list[str]:
    return sorted({name for name, _ in evaluator.measured})
