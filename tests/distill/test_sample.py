"""The sample stage through the command, with a real server: all that is asked, once; what can't be had is told."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_lite.answers import server as server_module
from mergekit_lite.answers.rows import seed_of, write_rows
from mergekit_lite.commands import main
from mergekit_lite.distillation import distilling
from tests.answers.fake_server import Fake, Trouble, answer_to, fake_server
from tests.distill.recipes import recipe_data, write_recipe

PROMPTS = [{"id": f"p{n}", "prompt": f"question {n}", "domain": "maths" if n % 3 else "chat"} for n in range(9)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.002)


def invoke(*arguments: object) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["distill", *map(str, arguments)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def place(folder: Path, url: str, prompts: list[dict[str, Any]] = PROMPTS, **changes: Any) -> Path:
    write_rows(folder / "prompts.jsonl", prompts)
    (folder / "target").mkdir(exist_ok=True)
    sources = [
        {"name": "a", "model": "m", "server": url, "samples": 2, "samples_for": {"chat": 3}, "retries": 2},
        {"name": "b", "model": "m", "server": url, "samples": 1, "domains": ["maths"], "retries": 2},
    ]
    return write_recipe(folder, **({"sources": sources} | changes))


def test_every_source_is_asked_what_the_recipe_says(tmp_path: Path) -> None:
    with fake_server() as fake:
        code, told, _ = invoke("sample", place(tmp_path, fake.url))
        assert code == 0
        answers = {name: rows(tmp_path / "out" / "samples" / f"{name}.jsonl") for name in "ab"}
        asked = fake.asked.total()
        assert asked == 3 * 3 + 6 * 2 + 6 and invoke("sample", tmp_path / "recipe.yaml")[0] == 0
        assert fake.asked.total() == asked  # nothing is missing
    assert "a: 21 answers" in told and "b: 6 answers" in told
    counts = Counter((row["prompt"], row["source"]) for of in answers.values() for row in of)
    for prompt in PROMPTS:
        chat = prompt["domain"] == "chat"
        assert counts[prompt["id"], "a"] == (3 if chat else 2) and counts[prompt["id"], "b"] == (0 if chat else 1)
    places = [(row["prompt"], row["index"]) for row in answers["a"]]
    assert places == [(p["id"], i) for p in PROMPTS for i in range(3 if p["domain"] == "chat" else 2)]
    for row in answers["a"]:
        text = next(p["prompt"] for p in PROMPTS if p["id"] == row["prompt"])
        assert row["text"] == answer_to(text, seed_of(0, "a", row["prompt"], row["index"]))
    assert [row["id"] for row in rows(tmp_path / "out" / "prompts.jsonl")] == [p["id"] for p in PROMPTS]


def test_answers_that_were_cut_are_told(tmp_path: Path) -> None:
    with fake_server() as fake:
        path = place(tmp_path, fake.url)
        assert invoke("sample", path)[0] == 0
        file = tmp_path / "out" / "samples" / "b.jsonl"
        ends = [{"finish": "length"}, {"text": "<think>\nso"}, {"thoughts": "so"}, {}, {}, {}]
        write_rows(file, [{**row, **end} for row, end in zip(rows(file), ends, strict=True)])
        _, told, error = invoke("sample", path)
    assert "b: 1 answer of 6 cut at max_tokens" in told + error
    assert "b: 1 answer of 6 spent all tokens on thoughts and said nothing" in told + error
    cells = next(line.split() for line in invoke("run", path, "--dry-run")[1].splitlines() if line.startswith("b "))
    assert cells[-3:] == ["6", "6", "2"]


def test_what_is_missing_is_told_and_asked_for_again(tmp_path: Path) -> None:
    moods: dict[str, Trouble] = {"question 4": 500, "question 6": 400}
    with fake_server(Fake(lambda text, before: moods.get(text))) as fake:
        path = place(tmp_path, fake.url)
        code, told, error = invoke("sample", path)
        assert code == 1
        assert "a: 5 of 21" in error and "b: 1 of 6" in error and "The same command goes on" in error
        assert "HTTP 500 (2×, for instance the prompt p4)" in error and "no luck: 400" in error
        assert "a: 4 requests made again: HTTP 500 4×" in told
        samples = tmp_path / "out" / "samples"
        assert not (samples / "a.jsonl").exists()
        before = fake.answered.copy()
        del moods["question 4"]
        assert invoke("sample", path)[0] == 1
        assert fake.answered - before == {key: 1 for key in fake.answered if key[0] == "question 4"}
        assert invoke("sample", path, "--skip-missing")[0] == 0
        assert len(rows(samples / "a.jsonl")) == 18
        del moods["question 6"]
        assert invoke("sample", path)[0] == 0
        assert len(rows(samples / "a.jsonl")) == 21
        finished = (samples / "a.jsonl").read_bytes()
    assert set(fake.answered.values()) == {1}
    whole = tmp_path / "whole"
    with fake_server() as fake:
        assert invoke("sample", place(whole, fake.url))[0] == 0
    assert (whole / "out" / "samples" / "a.jsonl").read_bytes() == finished


def test_a_refused_key_is_told_at_once_and_other_sources_go_on(tmp_path: Path) -> None:
    with fake_server(Fake(lambda text, before: 401)) as closed, fake_server() as fake:
        path = place(tmp_path, fake.url)
        data = recipe_data()
        data["sources"] = [
            {"name": "a", "model": "m", "server": fake.url},
            {"name": "b", "model": "m", "server": closed.url, "api_key_variable": "B_KEY"},
        ]
        path = write_recipe(tmp_path, sources=data["sources"])
        code, _, error = invoke("sample", path)
        assert code == 1 and "b: 45 of 45" in error and "B_KEY" in error and "a:" not in error
        assert fake.asked.total() == 45


def test_malformed_rows_are_told_and_the_others_go_on(tmp_path: Path) -> None:
    with fake_server() as fake:
        path = place(tmp_path, fake.url)
        with (tmp_path / "prompts.jsonl").open("a") as file:
            file.write('{"promt": 1}\n{"prompt": "question 1"}\n')
        code, told, error = invoke("sample", path)
    assert code == 0
    assert f"{tmp_path / 'prompts.jsonl'}:10: no 'prompt'" in error and "1 prompt asked before" in told
    assert len(rows(tmp_path / "out" / "prompts.jsonl")) == 9


def test_data_that_changed_under_a_run_are_refused(tmp_path: Path) -> None:
    with fake_server() as fake:
        path = place(tmp_path, fake.url)
        assert invoke("sample", path)[0] == 0
        asked = fake.asked.total()
        changed = [*({**row, "prompt": "other"} if row["id"] == "p2" else row for row in PROMPTS[:-1])]
        write_rows(tmp_path / "prompts.jsonl", [*changed, {"id": "new", "prompt": "x", "domain": "chat"}])
        code, _, error = invoke("sample", path)
        assert code == 2 and fake.asked.total() == asked
    for told in (
        "new: 1 prompt, for instance 'new'",
        "gone: 1 prompt",
        "'p8'",
        "not the same",
        "'p2'",
        "another `folder`",
    ):
        assert told in error


def test_answers_drawn_in_another_way_are_not_mixed(tmp_path: Path) -> None:
    with fake_server() as fake:
        path = place(tmp_path, fake.url)
        assert invoke("sample", path)[0] == 0
        asked = fake.asked.total()
        warmer = [{"name": "a", "model": "other", "server": fake.url, "sampling": {"temperature": 0.1}}]
        code, _, error = invoke("sample", place(tmp_path, fake.url, sources=warmer))
        assert code == 2 and fake.asked.total() == asked
        assert "temperature: was 0.8, is 0.1" in error and "model: was 'm', is 'other'" in error and "a.*" in error
        assert "top_p" not in error
        for file in (tmp_path / "out" / "samples").glob("a.*"):
            file.unlink()
        assert invoke("sample", path)[0] == 0
    assert rows(tmp_path / "out" / "samples" / "a.jsonl")[0]["source"] == "a"


def test_a_domain_that_no_prompt_has_is_refused_before_anything_is_asked(tmp_path: Path) -> None:
    with fake_server() as fake:
        sources = [{"name": "a", "model": "m", "server": fake.url, "domains": ["math"]}]
        code, _, error = invoke("sample", place(tmp_path, fake.url, sources=sources))
    assert code == 2 and "Did you mean 'maths'?" in error
    assert not fake.asked and not (tmp_path / "out").exists()


WRPO: dict[str, Any] = {
    "pairs": {"rule": "wrpo", "score": "right", "sft_share": 0.34, "domains": {"chat": {"rule": "as_is"}}},
    "train": {
        "sft": {"learning_rate": 1e-5, "batch_size": 2},
        "preference": {"learning_rate": 1e-6, "batch_size": 3, "epochs": 2, "objective": "wrpo"},
    },
}


def test_the_target_is_asked_once_it_is_trained_and_what_its_pairs_wait_for(tmp_path: Path) -> None:
    with fake_server() as fake:
        own = {"server": fake.url, "model": "trained", "samples": 2}
        path = place(tmp_path, fake.url, target_source=own, **WRPO)
        samples, pairs = tmp_path / "out" / "samples", tmp_path / "out" / "pairs"
        code, told, _ = invoke("sample", path)
        assert code == 0 and "target: answers later" in told and "pair" in told
        write_rows(pairs / "target.jsonl", [{"prompt": "p4", "domain": "maths"}, {"prompt": "p1", "domain": "maths"}])
        code, told, _ = invoke("sample", path)
        assert code == 0 and "target: answers later" in told and "train" in told
        assert not (samples / "target.jsonl").exists()
        trained = tmp_path / "out" / "train" / "sft"
        trained.mkdir(parents=True)
        (trained / "config.json").touch()
        fake.bodies.clear()
        assert invoke("sample", path)[0] == 0
    assert [(row["prompt"], row["index"]) for row in rows(samples / "target.jsonl")] == [
        ("p1", 0), ("p1", 1), ("p4", 0), ("p4", 1)
    ]  # fmt: skip
    assert {body["model"] for body in fake.bodies} == {"trained"}


def test_a_dry_run_tells_the_plan_and_writes_nothing(tmp_path: Path) -> None:
    path = place(tmp_path, "http://127.0.0.1:9/v1", target_source={"samples": 4}, **WRPO)
    code, told, _ = invoke("run", path, "--dry-run", "--json")
    assert code == 0
    assert json.loads(told) == {
        "domains": [
            {"domain": "chat", "prompts": 3, "rule": "as_is", "sft": 3, "preference": 0},
            {"domain": "maths", "prompts": 6, "rule": "wrpo", "sft": 2, "preference": 4},
        ],
        "sources": [
            {"name": "a", "model": "m", "where": "http://127.0.0.1:9/v1", "requests": 21, "done": 0, "cut": 0},
            {"name": "b", "model": "m", "where": "http://127.0.0.1:9/v1", "requests": 6, "done": 0, "cut": 0},
            {
                "name": "target",
                "model": "what SFT makes",
                "where": "in this process",
                "requests": 16,
                "done": 0,
                "cut": 0,
            },
        ],
        "scorers": ["right"],
        "teachers": [],
        "training": [{"stage": "sft", "rows": 5, "steps": 2}, {"stage": "preference", "rows": 4, "steps": 2}],
        "missing_models": [],
        "left_out": [],
        "rounds": [],
    }
    code, told, _ = invoke("run", path, "--dry-run")
    assert code == 0 and "what SFT makes" in told and "everything lies in" in told
    assert not (tmp_path / "out").exists()


def test_run_takes_the_stages_in_their_order(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    taken: list[str] = []
    stages = {
        name: lambda recipe, reporter, name=name, **_: taken.append(name)
        for name in ("score", "pair", "train", "report")
    }
    monkeypatch.setattr(distilling, "training", SimpleNamespace(train=stages.pop("train"), check=lambda recipe: None))
    for name, stage in stages.items():
        monkeypatch.setattr(distilling, name, stage)
    with fake_server() as fake:
        small = {"sft": {"learning_rate": 1e-5, "batch_size": 2}}
        assert invoke("run", place(tmp_path, fake.url, train=small))[0] == 0
        assert taken == ["score", "pair", "train", "report"]
        taken.clear()
        own = {"server": fake.url, "model": "trained"}
        assert invoke("run", place(tmp_path, fake.url, target_source=own, **WRPO))[0] == 0
        assert taken == ["score", "pair", "train", "score", "pair", "train", "report"]


def test_models_that_are_not_there_are_told_before_anything_is_asked(tmp_path: Path) -> None:
    with fake_server() as fake:
        sources = [{"name": "a", "model": "m", "server": fake.url}]
        sources += [{"name": name, "model": f"./{name}"} for name in "bcd"]
        path = place(tmp_path, fake.url, sources=sources, target="/nowhere/target")
        (tmp_path / "d").mkdir()
        for stage in ("sample", "run"):
            code, _, error = invoke(stage, path)
            assert code == 2 and "source b" in error and "source c" in error
            assert ("the target: /nowhere" in error) == (stage == "run")
            code, _, error = invoke("run", path, "--dry-run")
            assert code == 0 and "Warning: the source b" in error and "the target: /nowhere" in error
            assert "source d" not in error and not (tmp_path / "out").exists()
    assert not fake.asked


def test_run_refuses_what_training_would_refuse_hours_later(tmp_path: Path) -> None:
    wrong = {"sft": {"learning_rate": 1e-5, "trainer": {"weight_decai": 0.1}}}
    for more in ((), ("--dry-run",)):
        code, _, error = invoke("run", place(tmp_path, "http://127.0.0.1:9/v1", train=wrong), *more)
        assert code == 2 and "weight_decai" in error
    assert not (tmp_path / "out").exists()


def test_every_help_has_an_example() -> None:
    for name in ([], ["run"], ["sample"], ["score"], ["pair"], ["train"], ["report"]):
        code, told, _ = invoke(*name, "--help")
        assert code == 0 and f"mergekit-lite distill {' '.join(name)}" in told.split("Example")[1]
