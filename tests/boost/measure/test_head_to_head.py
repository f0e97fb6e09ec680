"""Candidates against the baseline, head to head: a judge of pairs behind a server, and the order of the measuring."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import pytest

from mergekit_lite.answers import server as server_module
from mergekit_lite.boosting.boosting import search_and_write
from mergekit_lite.boosting.candidates.candidate import NONE, ItemRow, Params, Rivals, label
from mergekit_lite.boosting.measure.nulls import null_tests
from mergekit_lite.boosting.measure.scores import parse
from mergekit_lite.boosting.request import prepare
from mergekit_lite.boosting.search.search import Same, Search, grid
from tests.answers.fake_server import Fake, fake_server
from tests.boost.end_to_end import write_models, write_prompts
from tests.boost.measure.test_nulls import PROMPTS
from tests.boost.measure.test_serving import request_of
from tests.boost.search.test_measuring import Shuffled, compared, search
from tests.boost.synthetic import SyntheticEvaluator


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    write_prompts(root, 8)
    return root


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.002)


def shown(text: str) -> tuple[str, str]:
    first, second = (text.split(f"<answer_{place}>\n")[1].split(f"\n</answer_{place}>")[0] for place in "ab")
    return first, second


def wordy(text: str, seed: int) -> str:
    """A judge that likes answers with more words; of the third question the first one it sees."""
    first, second = (answer.count("word") for answer in shown(text))
    if "What is 3?" in text:
        return "Better: A"
    return f"Better: {'tie' if first == second else 'A' if first > second else 'B'}"


def test_a_judge_sees_the_answers_of_candidate_and_baseline(models: Path, tmp_path: Path) -> None:
    with fake_server(Fake(say=wordy)) as judge:
        request = request_of(
            models, tmp_path / "out", search="grid", grid={"alpha": (0.5, 1.0)},
            scores=(f"pairwise:m,server={judge.url},against=rivals",),
        )  # fmt: skip
        boosted = search_and_write(prepare(request))
        seen = [shown(body["messages"][-1]["content"]) for body in judge.bodies]
        asked = len(seen)
        search_and_write(prepare(request))
        assert len(judge.bodies) == asked, "what was judged is kept"
    result = boosted.result
    assert result.baseline.score.mean == 0.5 and boosted.result.chosen == {"alpha": 0.5}
    assert [point.gain.mean for point in result.points] == [0.5 * 7 / 8] * 2, "one order each is a tie"
    assert [point.win_rates and point.win_rates.raw for point in result.points] == [100 * 7.5 / 8] * 2
    answers = [pair for pair in seen if all("alpha" in answer for answer in pair)]  # without the null test's
    assert len(answers) == 2 * 2 * 8 and {pair[::-1] for pair in answers} == {*answers}
    for pair in answers:
        alphas = [float(re.findall("alpha ([0-9.]+)", answer)[0]) for answer in pair]
        assert min(alphas) == 0 and max(alphas) in (0.5, 1.0)
    ledger = (tmp_path / "out.boost" / "candidates" / "alpha=0.jsonl").read_text().splitlines()
    assert {row["values"]["pairwise"] for row in map(json.loads, ledger)} == {0.5}
    assert "head to head, in both orders" in boosted.page.read_text()


class Meeting(SyntheticEvaluator):
    """Candidates whose scores are differences to what they met."""

    def measure(
        self, params: Params, items: Sequence[str], wanted: frozenset[str], rivals: Rivals = NONE
    ) -> Iterator[ItemRow]:
        for row in super().measure(params, items, wanted):
            if params["alpha"]:
                assert {*rivals} == wanted, "each item is measured once the baseline has answered it"
                own = self.row({"alpha": 0.0}, row["item"])
                assert rivals[row["item"]] == own["text"]
                row["values"] = {name: _minus(value, own["values"][name]) for name, value in row["values"].items()}
            else:
                assert rivals == {}
                row["values"] = dict.fromkeys(row["values"], 0.0)
            yield row


def _minus(value: float | None, other: float | None) -> float:
    assert value is not None and other is not None
    return value - other


def bowl(params: Mapping[str, float]) -> float:
    return -8 * (params["alpha"] - 0.5) ** 2


def several(same: Same) -> Search:
    return grid({"alpha": [0.25, 0.5, 1.0]})


@pytest.mark.parametrize("size", [1, 3])
def test_no_item_is_measured_before_its_rival(tmp_path: Path, size: int) -> None:
    """Held-out items too, of which baseline and chosen candidate are wanted at once; the team changes nothing."""
    found = []
    for name, seed in (("alone", None), ("team", 5)):
        evaluator = Meeting(bowl, items=160)
        team = Shuffled(evaluator, size, seed) if seed is not None else None
        result = search(tmp_path / name, several, evaluator, team, head_to_head=("score",))
        assert result.held_out is not None and result.chosen is not None
        baseline = [item for name, item in evaluator.measured if name == label({"alpha": 0.0})]
        assert len(baseline) == 160
        found.append(compared(result))
    assert found[0] == found[1]


def test_a_constant_meets_the_baselines_answer(tmp_path: Path) -> None:
    rows = {each.id: ItemRow(item=each.id, values={"pairwise": 0.5}, text=f"It is {each.id}.") for each in PROMPTS}
    with fake_server(Fake(say=lambda text, seed: f"Better: {'B' if 'It is q' in shown(text)[0] else 'A'}")) as judge:
        scores = parse([f"pairwise:m,server={judge.url},against=rivals"])
        found = null_tests(scores, PROMPTS, tmp_path, rows)
        assert all("It is q" in body["messages"][-1]["content"] for body in judge.bodies)
    assert "is broken: it grades a refusal" in found["pairwise"]
