"""Pairs without a judge: answers under several system messages (Janus), and better against worse as asked for."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_lite.answers.rows import write_rows
from mergekit_lite.commands import main
from mergekit_lite.distillation.prompts import read
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rounds import all_rounds, prompts_of
from mergekit_lite.distillation.rules import Answers, Candidate, PreferencePair, Refusal, asked, crossed
from mergekit_lite.yaml_document import RecipeError
from tests.answers.fake_server import Fake, fake_server
from tests.distill.recipes import write_recipe

TEXTS = ["Be brief.", "Be kind.", "Be strict.", "Be exact."]
PROMPTS = [
    {"id": f"p{n}", "prompt": f"What is {n} and {n}?", "systems": [f"{n}: {text}" for text in TEXTS]} for n in range(4)
]
TRAIN = {"preference": {"objective": "dpo", "learning_rate": 1e-6}}


def reply(body: dict[str, Any]) -> str:
    system = body["messages"][0]["content"] if body["messages"][0]["role"] == "system" else "Nobody"
    return f"{system} says {body['messages'][-1]['content']} {body['seed']}"


def run(recipe: Path, *stages: str) -> str:
    told = ""
    for stage in stages:
        result = CliRunner().invoke(main, ["distill", stage, str(recipe)])
        assert result.exit_code == 0, result.output
        told += result.output
    return told


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()]


def place(
    folder: Path, url: str, systems: dict[str, Any], prompts: list[dict[str, Any]] = PROMPTS, **more: Any
) -> Path:
    write_rows(folder / "prompts.jsonl", prompts)
    (folder / "target").mkdir(exist_ok=True)
    sources = [{"name": name, "model": name.upper(), "server": url, "samples": 2} for name in "ab"]
    changes = {"pairs": {"rule": "crossed", "sft_share": 0}, "train": TRAIN, "scorers": [], **more}
    return write_recipe(folder, prompts=[{"path": "prompts.jsonl", "systems": systems}], sources=sources, **changes)


@pytest.mark.parametrize("systems", [{"texts": TEXTS, "each": 3}, {"column": "systems"}], ids=["texts", "column"])
def test_crossed_pairs(tmp_path: Path, systems: dict[str, Any]) -> None:
    with fake_server(Fake(reply=reply)) as fake:
        recipe = place(tmp_path, fake.url, systems)
        plan = json.loads(CliRunner().invoke(main, ["distill", "run", str(recipe), "--dry-run", "--json"]).stdout)
        assert [row["requests"] for row in plan["sources"]] == [24, 24]
        assert plan["domains"][0]["preference"] == 12
        run(recipe, "sample", "score", "pair")
        asked = len(fake.bodies)
        run(recipe, "sample", "pair")
        assert len(fake.bodies) == asked == 48
    prompts = rows(tmp_path, "prompts")
    assert [each["question"] for each in prompts] == [f"p{n}" for n in range(4) for _ in range(3)]
    assert all(each["columns"] == {} for each in prompts)
    of = {each["id"]: each["messages"][0]["content"] for each in prompts}
    answers = {(row["prompt"], row["index"]): row["text"] for row in rows(tmp_path, "samples/a")}
    pairs = rows(tmp_path, "pairs/preference")
    assert len(pairs) == 12
    for pair in pairs:
        (chosen,), (rejected,) = pair["chosen"], pair["rejected"]
        assert pair["messages"][0] == {"role": "system", "content": of[pair["prompt"]]}
        assert chosen["text"].startswith(f"{of[pair['prompt']]} says {pair['messages'][1]['content']}")
        assert rejected["prompt"] != pair["prompt"] and rejected["source"] == chosen["source"] == "a"
        assert rejected["text"] == answers[rejected["prompt"], rejected["index"]]
        assert rejected["text"].startswith(f"{of[rejected['prompt']]} says {pair['messages'][1]['content']}")
    others = {(pair["prompt"], pair["rejected"][0]["prompt"]) for pair in pairs}
    assert len({theirs[-1] for _, theirs in others}) > 1, "always the same one is rejected"


def test_prompts_that_cant_have_system_messages_are_left_out_and_told(tmp_path: Path) -> None:
    own = {
        "id": "own",
        "messages": [{"role": "system", "content": "x"}, {"role": "user", "content": "y"}],
        "systems": TEXTS,
    }
    wrong = [own, {"id": "one", "prompt": "z", "systems": ["a", "a"]}, {"id": "no", "prompt": "v", "systems": "a"}]
    with fake_server(Fake(reply=reply)) as fake:
        told = run(place(tmp_path, fake.url, {"column": "systems"}, [*PROMPTS, *wrong]), "sample")
    assert (
        "it has a system message already" in told and "fewer than two different" in told and "no list of texts" in told
    )
    assert len(rows(tmp_path, "prompts")) == 12


def test_rounds_keep_the_system_messages_of_a_question_together(tmp_path: Path) -> None:
    recipe = load(place(tmp_path, "http://127.0.0.1:9/v1", {"column": "systems"}, rounds={"number": 2}))
    whole = read(recipe, Reporter())
    parts = [prompts_of(each, whole) for each in all_rounds(recipe)]
    assert [len(part) for part in parts] == [6, 6]
    assert not {prompt.question for prompt in parts[0]} & {prompt.question for prompt in parts[1]}


def candidate(source: str, index: int, score: float = 0.0, prompt: str = "", digest: int | None = None) -> Candidate:
    return Candidate(source, index, score, prompt=prompt, digest=digest)


def test_crossed_takes_the_same_source_and_each_other_message() -> None:
    answers = Answers(
        sources=[candidate("a", 0, 0.2), candidate("b", 0, 0.9)],
        others=[candidate(source, 0, 0.5, prompt) for prompt in ("x", "y") for source in "ab"],
    )
    found = [crossed(answers, draw=draw)[0] for draw in (0.0, 0.49, 0.5, 0.99)]
    assert all(isinstance(pair, PreferencePair) and pair.chosen[0].source == "b" for pair in found)
    assert [
        (pair.rejected[0].source, pair.rejected[0].prompt) for pair in found if isinstance(pair, PreferencePair)
    ] == [
        ("b", "x"),
        ("b", "x"),
        ("b", "y"),
        ("b", "y"),
    ]
    (none,) = crossed(Answers(answers.sources, others=[candidate("a", 0, prompt="x")]), draw=0)
    assert isinstance(none, Refusal)


def test_asked_pairs_answers_of_one_number() -> None:
    answers = Answers([candidate("good", 0, 0.1), candidate("good", 1, 0.8), candidate("bad", 0), candidate("bad", 1)])
    (pair,) = asked(answers, chosen="good", rejected="bad")
    assert isinstance(pair, PreferencePair)
    assert [(each.source, each.index) for each in (*pair.chosen, *pair.rejected)] == [("good", 1), ("bad", 1)]
    assert pair.gap == 0.8
    (one,) = asked(Answers([candidate("good", 3), candidate("bad", 0)]), chosen="good", rejected="bad")
    assert isinstance(one, PreferencePair) and one.rejected[0].index == 0
    same = Answers([candidate("good", 0, digest=1), candidate("bad", 0, digest=1)])
    for lacking in (Answers(answers.sources[:2]), Answers(answers.sources[2:]), same):
        assert isinstance(asked(lacking, chosen="good", rejected="bad")[0], Refusal)


def test_better_and_worse_as_asked(tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", PROMPTS)
    (tmp_path / "target").mkdir()
    with fake_server(Fake(reply=reply)) as fake:
        served = {"model": "m", "server": fake.url, "samples": 1}
        recipe = write_recipe(
            tmp_path,
            sources=[
                {"name": "worse", "system": "Answer badly.", **served},
                {"name": "better", "system": "Answer well.", **served},
            ],
            scorers=[],
            pairs={"rule": "asked", "chosen": "better", "rejected": "worse", "sft_share": 0.5},
            train={"sft": {"learning_rate": 1e-5}, **TRAIN},
        )
        run(recipe, "sample", "score", "pair")
    sft, pairs = rows(tmp_path, "pairs/sft"), rows(tmp_path, "pairs/preference")
    assert len(sft) == len(pairs) == 2
    assert all(row["response"].startswith("Answer well. says") and row["source"] == "better" for row in sft)
    for pair in pairs:
        assert [message["role"] for message in pair["messages"]] == ["user"]
        assert pair["chosen"][0]["text"].startswith("Answer well. says")
        assert pair["rejected"][0]["text"].startswith("Answer badly. says")


@pytest.mark.parametrize(
    ("systems", "changes", "message"),
    [
        ({"texts": TEXTS, "column": "systems"}, {}, "exactly one of 'texts' and 'column'"),
        ({}, {}, "exactly one of 'texts' and 'column'"),
        ({"texts": TEXTS, "each": 5}, {}, "5 of 4 'texts' can't be had"),
        ({"texts": TEXTS, "each": 1}, {}, "each"),
        ({"texts": ["a", "b", "a"]}, {}, "this text is listed twice"),
        ({"txts": TEXTS}, {}, "Did you mean 'texts'?"),
        (None, {}, "give some prompts 'systems'"),
        ({"texts": TEXTS}, {"gap": [0.1, None]}, "those under two system messages can't be compared"),
        ({"texts": TEXTS}, {"chosen": "a"}, "it is for the rule 'asked'"),
        ({"texts": TEXTS}, {"chosen_score": 1}, "name the scorer as 'score'"),
        ({"texts": TEXTS}, {"rule": "asked", "chosen": "a"}, "name the one of the rejected as 'rejected'"),
        ({"texts": TEXTS}, {"rule": "asked", "chosen": "a", "rejected": "c"}, "no source is named 'c'"),
        ({"texts": TEXTS}, {"rule": "asked", "chosen": "a", "rejected": "a"}, "'a' can't be chosen and rejected"),
        ({"texts": TEXTS}, {"rule": "asked", "chosen": "a", "rejected": "b", "gap": [0, 1]}, "'gap' compares scores"),
        ({"texts": TEXTS}, {"sft_share": 0.5, "sft_rows": {"least": 1}}, "rows are selected by score"),
    ],
)  # fmt: skip
def test_wrong_recipes(tmp_path: Path, systems: Any, changes: dict[str, Any], message: str) -> None:
    pairs = {"rule": "crossed", "sft_share": 0, **changes}
    with pytest.raises(RecipeError) as caught:
        load(place(tmp_path, "http://127.0.0.1:9/v1", systems, pairs=pairs))
    assert re.search(rf"- \d+:\d+: .*{re.escape(message)}", str(caught.value)), str(caught.value)
