"""Answers that go on from the beginnings of another source's: InCo-DPO's candidates."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_lite.answers import server as server_module
from mergekit_lite.answers.rows import write_rows
from mergekit_lite.commands import main
from mergekit_lite.distillation.continuing import beginning
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.yaml_document import RecipeError
from tests.answers.fake_server import Fake, fake_server
from tests.answers.test_local import write_model
from tests.distill.recipes import write_recipe

PROMPTS = [{"id": f"p{n}", "prompt": f"What is {n} and {n}?", "reference": "x"} for n in range(3)]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.002)


def reply(body: dict[str, Any]) -> str:
    last = body["messages"][-1]
    if last["role"] == "assistant":
        assert body["continue_final_message"] is True and body["add_generation_prompt"] is False
        return f" and more of {body['seed']}"
    assert "continue_final_message" not in body
    return f"{body['model']} says a fine thing to {last['content']} {body['seed']}"


def place(folder: Path, url: str, **more: Any) -> Path:
    write_rows(folder / "prompts.jsonl", PROMPTS)
    (folder / "target").mkdir(exist_ok=True)
    served = {"server": url, "retries": 0}
    strong = {"name": "strong", "model": "S", "samples": 2, **served}
    mixed = {
        "name": "mixed",
        "model": "T",
        "samples": 4,
        "continues": {"source": "strong", "share": [0, 0.5]},
        **served,
        **more,
    }
    return write_recipe(folder, sources=[mixed, strong])


def sample(recipe: Path, *options: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["distill", "sample", str(recipe), *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout + result.stderr


def rows(folder: Path, source: str) -> list[dict[str, Any]]:
    path = folder / "out" / "samples" / f"{source}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.mark.parametrize(
    ("text", "share", "expected"),
    [
        ("one two three", 0.0, ""),
        ("one two three", 0.2, ""),
        ("one two three", 3 / 13, "one"),
        ("one two three", 0.5, "one"),
        ("one two three", 0.55, "one two"),
        ("  one two", 0.6, "  one"),
        ("one\n\ntwo three", 0.5, "one"),
        ("一二三四五六", 0.5, "一二三"),
        ("", 0.5, ""),
    ],
)
def test_a_beginning_has_whole_words(text: str, share: float, expected: str) -> None:
    assert beginning(text, share) == expected


def test_any_beginning_is_one_and_as_long_as_it_may_be() -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(300):
        text = "".join(draw.choice("ab \n") for _ in range(draw.randrange(1, 30)))
        share = draw.random() * 0.999
        # every place where a word ends, and no more than the share before it
        ends = [n for n in range(1, len(text)) if not text[n - 1].isspace() and text[n].isspace()]
        fits = [n for n in ends if n <= share * len(text)]
        spaced = any(map(str.isspace, text))
        expected = text[: max(fits, default=0)] if spaced else text[: int(share * len(text))]
        assert beginning(text, share) == expected, (text, share)


def test_a_source_goes_on_from_another_ones_answers(tmp_path: Path) -> None:
    with fake_server(Fake(reply=reply)) as fake:
        recipe = place(tmp_path, fake.url)
        plan = CliRunner().invoke(main, ["distill", "run", str(recipe), "--dry-run", "--json"])
        assert {row["name"]: row["requests"] for row in json.loads(plan.stdout)["sources"]} == {
            "mixed": 12,
            "strong": 6,
        }
        code, told = sample(recipe)
        assert code == 0 and "mixed: 12 answers" in told, told
        asked = len(fake.bodies)
        assert asked == 18 and sample(recipe)[0] == 0 and len(fake.bodies) == asked
        strong = {(row["prompt"], row["index"]): row["text"] for row in rows(tmp_path, "strong")}
        mixed = rows(tmp_path, "mixed")
        for row in mixed:
            turn, begun = divmod(row["index"], 2)
            if begun:
                start = beginning(strong[row["prompt"], turn], 0.5)
                assert start and row["text"].startswith(f"{start} and more of ")
            else:
                assert row["text"].startswith("T says")
        # Another answer of the strong one: what went on from it is asked again, and nothing else.
        path = tmp_path / "out" / "samples" / "strong.jsonl"
        path.write_text(path.read_text().replace(strong["p1", 0], "Something else, of quite another kind"))
        code, told = sample(recipe)
        assert code == 0 and len(fake.bodies) == asked + 1
        pairs = zip(mixed, rows(tmp_path, "mixed"), strict=True)
        changed = [(new["prompt"], new["index"]) for old, new in pairs if old != new]
        assert changed == [("p1", 1)]
        # Another share is another setting.
        recipe.write_text(recipe.read_text().replace("- 0.5", "- 0.25"))
        code, told = sample(recipe)
        assert code == 2 and "continues: was" in told


def test_a_run_that_was_stopped_asks_for_the_rest_alone(tmp_path: Path) -> None:
    def mood(text: str, before: int) -> int | None:
        return 500 if text.startswith("S says") and next(failing, False) else None

    failing = iter([True, False, True])
    with fake_server(Fake(reply=reply, mood=mood)) as fake:
        recipe = place(tmp_path, fake.url)
        code, told = sample(recipe)
        assert code == 1 and "mixed: 2 of 12" in told, told
        failing, asked = iter([]), len(fake.bodies)
        assert sample(recipe)[0] == 0 and len(fake.bodies) == asked + 2


def test_without_an_answer_to_go_on_from_there_is_none(tmp_path: Path) -> None:
    def mood(text: str, before: int) -> int | None:
        return 400 if text == PROMPTS[0]["prompt"] else None

    with fake_server(Fake(reply=reply, mood=mood)) as fake:
        code, told = sample(place(tmp_path, fake.url))
        assert code == 1 and "mixed: 4 of 12. no answer of strong to go on from (4×" in told, told


def test_a_server_that_cant_go_on_is_given_up(tmp_path: Path) -> None:
    def refuses(body: dict[str, Any]) -> str | None:
        return "Unrecognized request argument: continue_final_message" if "continue_final_message" in body else None

    with fake_server(Fake(reply=reply, refuses=refuses)) as fake:
        code, told = sample(place(tmp_path, fake.url, continues={"source": "strong", "share": 0.5}))
        assert code == 1 and "can't go on from the beginning of an answer" in told, told


def test_a_server_that_repeats_the_beginning_is_told_of(tmp_path: Path) -> None:
    def repeats(body: dict[str, Any]) -> str:
        last = body["messages"][-1]
        return last["content"] + reply(body) if last["role"] == "assistant" else reply(body)

    with fake_server(Fake(reply=repeats)) as fake:
        code, told = sample(place(tmp_path, fake.url))
        assert code == 0 and told.count("mixed: replies have the beginning that was given once more") == 1
        assert all(row["text"].count("says") == 1 for row in rows(tmp_path, "mixed"))


def test_a_reply_that_ends_at_once_is_an_answer(tmp_path: Path) -> None:
    def ends(body: dict[str, Any]) -> str:
        return "" if body["messages"][-1]["role"] == "assistant" else reply(body)

    with fake_server(Fake(reply=ends)) as fake:
        assert sample(place(tmp_path, fake.url))[0] == 0 and len(fake.bodies) == 18


def test_a_model_in_this_process_goes_on(tmp_path: Path) -> None:
    model = write_model(tmp_path / "model")
    with fake_server(Fake(reply=reply)) as fake:
        place(tmp_path, fake.url)
        strong = {"name": "strong", "model": "S", "samples": 2, "server": fake.url}
        local = {
            "name": "mixed",
            "model": str(model),
            "samples": 2,
            "device": "cpu",
            "sampling": {"max_tokens": 8, "temperature": 1.0},
            "continues": {"source": "strong", "share": [0, 0.5]},
        }
        recipe = write_recipe(tmp_path, sources=[local, strong])
        code, told = sample(recipe)
        assert code == 0, told
        said = {row["prompt"]: row["text"] for row in rows(tmp_path, "strong") if row["index"] == 0}
        for row in rows(tmp_path, "mixed"):
            start = beginning(said[row["prompt"]], 0.5)
            assert row["text"].startswith(start) == bool(row["index"])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"continues": {"source": "strnog", "share": 0.5}},
            "no other source is named 'strnog'. Did you mean 'strong'?",
        ),
        ({"continues": {"source": "mixed", "share": 0.5}}, "no other source is named 'mixed'"),
        ({"continues": {"source": "strong", "share": 1}}, "less than 1"),
        ({"continues": {"source": "strong", "share": []}}, "share"),
        ({"continues": {"source": "strong"}}, "has no 'share'"),
        ({"one_request": True}, "don't go together"),
    ],
)
def test_wrong_keys_are_told_with_line_and_column(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(place(tmp_path, "http://127.0.0.1:9/v1", **changes))
    assert re.search(rf"- \d+:\d+: .*{re.escape(message)}", str(caught.value)), str(caught.value)


def test_the_targets_own_answers_and_those_it_goes_on_with_are_candidates(tmp_path: Path) -> None:
    """InCo-DPO: the strong answer, the target's own, and what the target makes of half of the strong one."""
    write_model(tmp_path / "target")
    prompts = [{**prompt, "reference": "right of all"} for prompt in PROMPTS]
    write_rows(tmp_path / "prompts.jsonl", prompts)
    with fake_server(Fake(reply=lambda body: "right of all")) as fake:
        recipe = write_recipe(
            tmp_path,
            sources=[{"name": "strong", "model": "S", "server": fake.url, "samples": 1}],
            target_source={
                "samples": 2,
                "device": "cpu",
                "sampling": {"max_tokens": 5},
                "continues": {"source": "strong", "share": [0, 0.5]},
            },
            pairs={"rule": "best_worst", "score": "right", "answers": "all", "sft_share": 0},
            train={"preference": {"objective": "dpo", "learning_rate": 1e-6}},
        )
        for stage in ("sample", "score", "pair", "sample", "score", "pair"):
            result = CliRunner().invoke(main, ["distill", stage, str(recipe)])
            assert result.exit_code == 0, result.output
    own = rows(tmp_path, "target")
    assert [row["text"].startswith("right") for row in own] == [False, True] * 3
    pairs = [json.loads(line) for line in (tmp_path / "out" / "pairs" / "preference.jsonl").read_text().splitlines()]
    assert [(pair["chosen"][0]["source"], pair["rejected"][0]["source"]) for pair in pairs] == [
        ("strong", "target")
    ] * 3
