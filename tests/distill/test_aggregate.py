"""Aggregates as sources of a distillation: answered by the same machinery, kept, resumed, held to their settings."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_lite.answers import server as server_module
from mergekit_lite.answers.rows import write_rows
from mergekit_lite.commands import main
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.yaml_document import RecipeError
from tests.answers.aggregating.aggregates import reply
from tests.answers.aggregating.test_running import PROMPTS, naive
from tests.answers.fake_server import Fake, fake_server
from tests.distill.recipes import write_recipe

LAYERS = [{"step": "generate", "model": ["a", "b"]}, {"step": "fuse", "model": ["a"]}]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.002)


def place(folder: Path, url: str, **changes: Any) -> Path:
    write_rows(folder / "prompts.jsonl", PROMPTS)
    (folder / "target").mkdir(exist_ok=True)
    models = [{"name": name, "model": name.upper(), "server": url, "retries": 1} for name in "ab"]
    moa = {"name": "moa", "samples": 2, "aggregate": {"models": models, "layers": LAYERS}, **changes}
    single = {"name": "single", "model": "C", "server": url, "samples": 1}
    return write_recipe(folder, sources=[moa, single])


def sample(recipe: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["distill", "sample", str(recipe), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout + result.stderr


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_an_aggregate_is_a_source_among_others(tmp_path: Path) -> None:
    with fake_server(Fake(reply=reply)) as fake:
        recipe = place(tmp_path, fake.url)
        code, told = sample(recipe)
        assert code == 0 and "moa: 6 answers" in told and "single: 3 answers" in told
        asked = len(fake.bodies)
        assert asked == 3 * (2 * 3 + 1) and sample(recipe)[0] == 0 and len(fake.bodies) == asked
        answers = rows(tmp_path / "out" / "samples" / "moa.jsonl")
        assert [(row["prompt"], row["index"]) for row in answers] == [(p["id"], n) for p in PROMPTS for n in range(2)]
        expected = {prompt["id"]: naive(prompt, LAYERS) for prompt in PROMPTS}
        assert all(row["text"] == expected[row["prompt"]] and row["source"] == "moa" for row in answers)
        assert len(rows(tmp_path / "out" / "steps" / "moa.jsonl")) == 18
        # the answers are gone, the replies are there
        (tmp_path / "out" / "samples" / "moa.jsonl").unlink()
        assert sample(recipe)[0] == 0 and len(fake.bodies) == asked
        assert rows(tmp_path / "out" / "samples" / "moa.jsonl") == answers
        text = recipe.read_text()
        recipe.write_text(text.replace("name: b\n", "name: b\n      system: Think.\n"))
        code, told = sample(recipe)
        assert code == 2 and "The answers of moa" in told and "were drawn in another way" in told
        for path in (tmp_path / "out" / "samples").glob("moa.*"):
            path.unlink()
        assert sample(recipe)[0] == 0
        assert {body["model"] for body in fake.bodies[asked:]} == {"A", "B"}
        assert len(fake.bodies) - asked == 2 * 3 + 2 * 2  # b again, and what sees another draft
    plan = CliRunner().invoke(main, ["distill", "run", str(recipe), "--dry-run", "--json"])
    moa = json.loads(plan.stdout)["sources"][0]
    assert (moa["model"], moa["where"], moa["requests"], moa["done"]) == ("a, b", "by several models", 6, 6)


def test_a_failing_proposer_stops_its_aggregate_and_no_other_source(tmp_path: Path) -> None:
    with fake_server(Fake(reply=reply)) as fake:
        recipe = place(tmp_path, fake.url)
        fake.refuses = lambda body: "too long" if body["model"] == "B" else None
        code, told = sample(recipe)
        assert code == 1 and "moa, layer 1 of 2: b lacks 6 of 6 replies" in told
        assert len(rows(tmp_path / "out" / "samples" / "single.partial.jsonl")) == 3
        assert not any(body["messages"][0]["content"].startswith("You have been provided") for body in fake.bodies)
        code, told = sample(recipe, "--skip-missing")
        assert code == 0 and "moa: 6 answers" in told and "b lacks 6 of 6" in told
        alone = naive(PROMPTS[0], [{"step": "generate", "model": ["a"]}, LAYERS[1]])
        assert rows(tmp_path / "out" / "samples" / "moa.jsonl")[0]["text"] == alone


def test_examples_are_read_by_a_source_of_its_own(tmp_path: Path) -> None:
    (tmp_path / "urial.txt").write_text("Be kind.\n")
    with fake_server(Fake(reply=lambda body: "Yes.\n```")) as fake:
        place(tmp_path, fake.url)
        source = {"name": "base", "model": "M", "server": fake.url, "samples": 1, "in_context": "urial.txt"}
        recipe = write_recipe(tmp_path, sources=[source])
        assert sample(recipe)[0] == 0
        assert all(body["prompt"].startswith("Be kind.\n\n# Query:\n```\n") for body in fake.bodies)
        assert {row["text"] for row in rows(tmp_path / "out" / "samples" / "base.jsonl")} == {"Yes."}
        (tmp_path / "urial.txt").write_text("Be brief.\n")
        code, told = sample(recipe)
        assert code == 2 and "in_context: was" in told
        code, told = sample(recipe, "--source", "base", "--write-batch", str(tmp_path / "batch.jsonl"))
        assert code == 2 and "a batch asks for turns of a chat" in told


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"model": "x"}, "'model' has no effect here: say it of a model of the 'aggregate'"),
        ({"sampling": {"temperature": 1}}, "'sampling' has no effect here"),
        ({"aggregate": {"models": [], "layers": []}}, "'layers' is an empty list"),
        ({"aggregate": {"models": [{"name": "a"}], "layers": [{"step": "rank", "modl": "a"}]}}, "unknown key 'modl'"),
        ({"aggregate": {"models": [{"name": "a", "model": "x"}], "layers": [{"step": "generate", "model": "b"}]}},
         "no model is named 'b'"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_told(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError) as refused:
        load(place(tmp_path, "http://x/v1", **changes))
    assert told in str(refused.value)


def test_the_target_is_no_aggregate(tmp_path: Path) -> None:
    own = {"aggregate": {"models": [{"name": "a", "model": "x"}], "layers": LAYERS[:1]}}
    with pytest.raises(RecipeError, match="'aggregate' is for sources"):
        load(write_recipe(tmp_path, target_source=own))


def test_missing_models_are_told_before_anybody_is_asked(tmp_path: Path) -> None:
    models = [{"name": "a", "model": "./nowhere"}, {"name": "b", "model": "B", "server": "http://127.0.0.1:9/v1"}]
    code, told = sample(place(tmp_path, "http://x/v1", aggregate={"models": models, "layers": LAYERS}))
    assert code == 2 and f"the source moa: {tmp_path / 'nowhere'} is no folder" in told
