"""The report of synthetic searches: the page opens, asks for nothing, and says what was found."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.boosting.candidates.candidate import ItemRow, Params
from mergekit_lite.boosting.report import write
from mergekit_lite.boosting.search.choice import Result, boost
from mergekit_lite.boosting.search.point import Settings
from mergekit_lite.boosting.search.search import bracket, grid
from mergekit_lite.boosting.search.study import Study, candidate_file
from tests.boost.search.test_choice import peak
from tests.boost.synthetic import SyntheticEvaluator
from tests.browser import Browser

HOSTILE = '<script>alert(1)</script> & "quoted" $x^2$ 好'


class Answering(SyntheticEvaluator):
    """Answers with words in them that no page may take for its own; beyond alpha 3 they never end."""

    def row(self, params: Params, item: str) -> ItemRow:
        made = super().row(params, item)
        alpha = params.get("alpha", 0.0)
        made["text"] = f"{HOSTILE} {made['text']}" + " and so on" * (60 if alpha > 3 else 0)
        made["finish"] = "length" if alpha > 3 else "stop"
        return made


@pytest.fixture(scope="module")
def reported(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Result]:
    evaluator = Answering(peak, items=300)
    folder = tmp_path_factory.mktemp("boosted.boost")
    with Study(folder, {}, evaluator.items) as study:
        result = boost(lambda same: bracket(same=same), evaluator, study, Settings(score="score"))
        about = {"SFT": "org/sft", "aligned": "org/<dpo>"}
        page = write(result, study, about, {item: f"What is {item}? {HOSTILE}" for item in evaluator.items})
    assert page == folder / "report.html"
    return folder, result


@pytest.fixture(scope="module")
def shown(reported: tuple[Path, Result]) -> Iterator[Browser]:
    with Browser() as browser:
        browser.open(reported[0] / "report.html")
        yield browser


def test_the_page_opens_without_errors_or_requests(shown: Browser) -> None:
    assert shown.errors == []
    assert all(url.startswith("file:") for url in shown.requests)


def test_the_page_says_the_answer_first(reported: tuple[Path, Result], shown: Browser) -> None:
    chosen = reported[1].chosen
    assert chosen is not None
    assert shown.run("document.querySelector('h1').textContent").startswith(f"alpha={chosen['alpha']:g} beats alpha=0:")
    rows = shown.run("document.querySelector('table').querySelectorAll('tbody tr').length")
    assert rows == len(reported[1].points) + 2, "the baseline, and the chosen one once more, held out"
    assert "alpha=4, too much" in shown.run("document.body.textContent")


def test_answers_are_shown_letter_by_letter(shown: Browser) -> None:
    texts = shown.run("[...document.querySelectorAll('pre')].map(one => one.textContent)")
    assert len(texts) == 4 * 4 and all(HOSTILE in text for text in texts)
    assert shown.run("document.querySelectorAll('pre *').length") == 0


def test_nothing_is_wider_than_a_phone(reported: tuple[Path, Result], shown: Browser) -> None:
    shown.open(reported[0] / "report.html", width=380)
    assert shown.run("document.documentElement.scrollWidth") <= 380
    shown.open(reported[0] / "report.html")


def test_a_table_sorts_by_a_click(shown: Browser) -> None:
    gains = (
        "[...document.querySelector('tbody').rows].map(row => row.cells[3].dataset.value).filter(Boolean).map(Number)"
    )
    shown.click("document.querySelectorAll('thead button')[3]")
    found = shown.run(gains)
    assert len(found) > 4 and found in (sorted(found), sorted(found, reverse=True))


def test_the_figures_are_there_for_machines(reported: tuple[Path, Result]) -> None:
    folder, result = reported
    found = json.loads((folder / "boost.json").read_text(), parse_constant=lambda name: pytest.fail(name))
    assert found["chosen"] == result.chosen and found["version"] == 1
    assert [one["numbers"] for one in found["candidates"]] == [dict(point.params) for point in result.points]
    assert found["held_out"]["gain"]["low"] == result.held_out.gain.low  # type: ignore[union-attr]
    assert found["baseline"]["win_rates"]["at_equal_length"] == 50
    assert found["settings"]["limits"]["growth"] == 2.5


def test_what_goes_with_winning_is_told(reported: tuple[Path, Result], shown: Browser) -> None:
    """Candidates differ from the baseline in length alone; an answer wins by its score."""
    folder, result = reported
    why = json.loads((folder / "boost.json").read_text())["reasons"]
    assert result.chosen is not None
    ours, theirs = (
        {row["item"]: row["values"]["score"] for row in map(json.loads, file.read_text().splitlines())}
        for file in (candidate_file(folder, params, "jsonl") for params in (result.chosen, {"alpha": 0.0}))
    )
    won = [(score > theirs[item]) + (score == theirs[item]) / 2 for item, score in ours.items()]
    assert why["prompts"] == len(won) == 300 and why["win_rate"] == pytest.approx(sum(won) / 300)
    assert [effect["trait"] for effect in why["effects"]] == ["length, log of characters"]
    cells = shown.run(
        "[...document.querySelectorAll('table')[1].querySelectorAll('tbody tr > *')].map(c => c.textContent)"
    )
    assert cells[0] == "length, log of characters" and len(cells) == 6


def test_the_picture_opens(reported: tuple[Path, Result]) -> None:
    from matplotlib.image import imread

    height, width, _ = imread(reported[0] / "curve.png").shape
    assert width == 770 and 500 < height < 800
    assert not list(reported[0].glob("*writing*"))


def test_figures_of_candidates_with_long_names_are_on_the_page(tmp_path: Path) -> None:
    """Score, gain and items of all candidates are within the window, and nothing of the picture is cut off."""
    names = ["models.0.parameters.weight", "models.1.parameters.density[filter=mlp]"]
    evaluator = SyntheticEvaluator(lambda params: sum(params.values()), items=80)
    with Study(tmp_path, {}, evaluator.items) as study:
        settings = Settings(score="score", baseline=dict.fromkeys(names, 0.0), minimised=("other",))
        result = boost(lambda same: grid({key: [0.0, 0.3] for key in names}), evaluator, study, settings)
        page = write(result, study, {}, {})
    with Browser() as browser:
        browser.open(page, width=1100)
        assert browser.run("document.documentElement.scrollWidth") <= 1100
        assert browser.run("document.querySelector('h1').textContent").startswith("Candidate 3 beats the baseline:")
        right = "[...document.querySelector('tbody').rows].map(row => row.cells[4].getBoundingClientRect().right)"
        assert max(browser.run(right)) < 1000
        inside = "(() => { const all = document.querySelector('svg').getBoundingClientRect(); return "
        inside += "[...document.querySelectorAll('svg text')].every(one => { const box = one.getBoundingClientRect(); "
        inside += "return box.left >= all.left && box.right <= all.right && box.top >= all.top }) })()"
        assert browser.run(inside)
        said = browser.run("document.body.textContent")
    assert "40 of 80 items" in said and "Of other lower is better" in said


def test_what_was_held_out_is_said_though_nobody_was_preferred(tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(lambda params: -params["alpha"], items=100)
    with Study(tmp_path, {}, evaluator.items) as study:
        result = boost(lambda same: grid({"alpha": [1.0]}), evaluator, study, Settings(score="score"))
        page = write(result, study, {}, {})
    assert "50 of 100 items; not asked, as no candidate was preferred" in page.read_text()


@pytest.mark.parametrize("kind", ["nothing helps", "several numbers", "no answers", "nothing tried", "all beyond"])
def test_every_kind_of_result_has_a_report(kind: str, tmp_path: Path) -> None:
    evaluator = SyntheticEvaluator(lambda params: sum(params.values()), items=40)
    settings: dict[str, Any] = {}
    points: dict[str, list[float]] = {"alpha": [0.1, 0.2]}
    if kind == "nothing helps":
        evaluator.curve = lambda params: -params["alpha"]
    elif kind == "several numbers":
        points = {name: [0.0, 1.0] for name in ("models[0].weight", "$b$", "c")}
        settings["baseline"] = dict.fromkeys(points, 0.0)
    elif kind == "no answers":
        plain = evaluator.row
        evaluator.row = lambda params, item: ItemRow(item=item, values=plain(params, item)["values"])  # type: ignore[method-assign]
    elif kind == "nothing tried":
        points = {"alpha": []}
    else:
        evaluator.words = lambda params, rng: 20 if not params["alpha"] else 400
    with Study(tmp_path, {}, evaluator.items) as study:
        result = boost(lambda same: grid(points), evaluator, study, Settings(score="score", **settings))
        page = write(result, study, {}, {})
    assert page.stat().st_size > 10_000 and (tmp_path / "curve.png").exists()
    json.loads((tmp_path / "boost.json").read_text())
