"""Tasks of the harness: which way their metrics are better; and whole tasks, where the harness is installed."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from mergekit_lite.boosting.boosting import search_and_write
from mergekit_lite.boosting.measure.resident_model import ResidentModel
from mergekit_lite.boosting.measure.scores import parse
from mergekit_lite.boosting.measure.tasks import Harness
from mergekit_lite.boosting.request import Request, prepare
from mergekit_lite.errors import UsageError
from tests.boost.end_to_end import write_models


def task(**higher: bool | None) -> Any:
    """What the harness has of a task with five documents."""
    return SimpleNamespace(eval_docs=range(5), higher_is_better=lambda: higher)


def harness(monkeypatch: pytest.MonkeyPatch, score: str, **tasks: Any) -> Harness:
    monkeypatch.setattr(Harness, "_tasks", tasks)
    [spec] = parse([score])
    return Harness(cast(ResidentModel, None), spec)


@pytest.mark.parametrize(
    ("score", "minimised"),
    [
        ("lm-eval:sums", False),
        ("lm-eval:sums,metric=err", True),
        ("lm-eval:sums,metric=odd,minimise=true", True),
        ("lm-eval:sums,metric=err,minimise=false", False),
    ],
)
def test_the_task_or_the_setting_says_which_way_is_better(
    score: str, minimised: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = harness(monkeypatch, score, sums=task(acc=True, err=False, odd=None))
    assert found.minimised is minimised
    sample = {("sums", 3): {"metrics": ["acc", "err", "odd"], "acc": 1, "err": 1.0, "odd": 1}}
    assert found._value("sums", 3, sample) == (-1.0 if minimised else 1.0)


@pytest.mark.parametrize(
    ("score", "tasks", "said"),
    [
        ("lm-eval:sums,metric=odd", {"sums": task(acc=True, odd=None)}, "add minimise=true or minimise=false"),
        ("lm-eval:sums,metric=acd", {"sums": task(acc=True)}, "Did you mean 'acc'"),
        ("lm-eval:both", {"a": task(acc=True), "b": task(err=False)}, "no one direction: acc of a is better higher"),
    ],
)
def test_what_is_not_known_is_asked_for(
    score: str, tasks: dict[str, Any], said: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=said):
        harness(monkeypatch, score, **tasks)


def test_a_groups_items_are_those_of_its_tasks(monkeypatch: pytest.MonkeyPatch) -> None:
    found = harness(monkeypatch, "lm-eval:both,limit=2", a=task(acc=True), b=task(acc=True))
    assert found.items == ["both:a:0", "both:a:1", "both:b:0", "both:b:1"]
    assert harness(monkeypatch, "lm-eval:a,limit=2", a=task(acc=True)).items == ["a:0", "a:1"]


TASK = """\
task: sums_err
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/sums.jsonl}}
test_split: test
tag: [sums_tagged]
output_type: multiple_choice
doc_to_text: "{{q}}"
doc_to_choice: "{{choices}}"
doc_to_target: gold
process_results: !function own.process
metric_list:
  - {metric: err, aggregation: mean, higher_is_better: false}
"""
MORE = "include: sums.yaml\ntask: sums_more\n"
OUTER = "group: outer\ntask: [all_sums, sums_more]\n"
GROUP = "group: all_sums\ntask: [sums_err]\naggregate_metric_list:\n  - {metric: err, weight_by_size: true}\n"
OWN = """\
def process(doc, results):
    best = max(range(len(results)), key=lambda place: results[place][0])
    return {"err": float(best != doc["gold"])}
"""


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with two models, and tasks, groups and a tag of the harness."""
    pytest.importorskip("lm_eval")
    write_models(tmp_path)
    rows = [{"q": f"{n} plus 1?", "choices": ["one", "two"], "gold": n % 2} for n in range(40)]
    (tmp_path / "sums.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    for name, text in {
        "sums": TASK.replace("FOLDER", str(tmp_path)),
        "group": GROUP,
        "more": MORE,
        "outer": OUTER,
    }.items():
        (tmp_path / f"{name}.yaml").write_text(text)
    (tmp_path / "own.py").write_text(OWN)
    return tmp_path


@pytest.mark.slow
def test_a_rate_of_errors_is_minimised(place: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """By the harness itself, which says nothing on the screen; alone, as a group, as a group in a group, and by tag."""
    capfd.readouterr()
    found, items = {}, {}
    for name in ("sums_err", "all_sums", "outer", "sums_tagged"):
        request = Request(
            output=place / name,
            scores=(f"lm-eval:{name},include={place}",),
            sft=str(place / "sft"),
            aligned=str(place / "dpo"),
            search="grid",
            grid={"alpha": (8.0,)},
            held_out=0,
        )
        boosted = search_and_write(prepare(request))
        assert boosted.result.settings.minimised == (name,)
        told = boosted.to_json()
        assert told["directions"] == {name: "lower is better"}
        before, after = told["baseline"]["score"]["mean"], told["candidates"][0]["score"]["mean"]
        assert 0 < before <= 1 and told["candidates"][0]["gain"]["mean"] == pytest.approx(before - after)
        found[name], items[name] = (before, after), told["candidates"][0]["score"]["items"]
    assert len(set(found.values())) == 1  # the second task has the first one's documents
    assert items == {"sums_err": 40, "all_sums": 40, "outer": 80, "sums_tagged": 80}
    assert capfd.readouterr().err == ""


@pytest.mark.slow
def test_an_unknown_task_is_refused_with_the_nearest_name(place: Path) -> None:
    [spec] = parse([f"lm-eval:all_sum,include={place}"])
    with pytest.raises(UsageError, match=r"no task, group or tag 'all_sum'\. Did you mean 'all_sums'"):
        Harness(cast(ResidentModel, None), spec)
