"""Aggregates through the command, with a real server: beside a naive implementation, with changes and failures."""

from __future__ import annotations

import json
import random
import sys
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_lite.answers import server as server_module
from mergekit_lite.answers.aggregating import messages as asked
from mergekit_lite.answers.aggregating.messages import FUSE, RESPONSES, Draft
from mergekit_lite.answers.prompts import digest_of
from mergekit_lite.answers.replies import Reply
from tests.answers.aggregating.aggregates import MOST, PROMPTS, answer, place, reply, rows, says
from tests.answers.fake_server import Fake, fake_server

MOA = [
    {"step": "generate", "model": ["a", "b", "c"]},
    {"step": "fuse", "model": ["a", "b"]},
    {"step": "fuse", "model": "c"},
]
ARCHON = [
    [{"step": "generate", "model": ["a", "b"]}, {"step": "generate", "model": ["c", "d"]}],
    {"step": "critique", "model": "a"},
    {"step": "rank", "model": "b", "keep": 3},
    {"step": "verify", "model": "c"},
    [{"step": "fuse", "model": "a"}, {"step": "generate", "model": "d"}],
    {"step": "rank", "model": "c"},
]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.002)


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server(Fake(reply=reply)) as running:
        yield running


def naive(prompt: dict[str, Any], layers: Sequence[Any]) -> str:
    """The answer to a prompt, step after step."""
    conversation = prompt.get("messages") or [{"role": "user", "content": prompt["prompt"]}]
    drafts: list[tuple[str, str]] = []  # text and critique
    for layer in layers:
        made = []
        for step in layer if isinstance(layer, list) else [layer]:
            for name in step["model"]:
                made += _naive_step(step, name.upper(), conversation, drafts)
        drafts = made
    ((text, _),) = drafts
    return text


def _naive_step(
    step: dict[str, Any], model: str, conversation: list[dict[str, str]], drafts: list[tuple[str, str]]
) -> list[tuple[str, str]]:
    if step["step"] == "generate":
        return [(says(model, conversation), "")]
    if step["step"] == "fuse" and "window" in step:
        texts = [text for text, _ in drafts]
        window = texts[: step["window"]]
        rest = texts[step["window"] :]
        while True:
            head = says(model, _injected(conversation, [(text, "") for text in window]))
            if not rest:
                return [(head, "")]
            window, rest = [head, *rest[: step["window"] - 1]], rest[step["window"] - 1 :]
    if step["step"] == "fuse":
        return [(says(model, _injected(conversation, drafts)), "")]
    shown = [Draft(text, "", Reply(text, "stop", None), critique) for text, critique in drafts]
    if step["step"] == "rank":
        said = says(model, asked.to_rank(conversation, shown))  # type: ignore[arg-type]
        order = said.rpartition("Ranking:** ")[2].replace("[", "").replace("]", "").split(" > ")
        return [drafts[int(number) - 1] for number in order][: step.get("keep", 1)]
    if step["step"] == "critique":
        said = says(model, asked.to_criticise(conversation, shown))  # type: ignore[arg-type]
        lines = [line for line in said.split("\n") if not line.startswith("[")]
        return [(text, line) for (text, _), line in zip(drafts, lines, strict=True)]
    right = []
    for draft, each in zip(drafts, shown, strict=True):
        check = says(model, asked.to_check(conversation, each))  # type: ignore[arg-type]
        if "Verdict: correct" in says(model, asked.to_judge(conversation, each, check)):  # type: ignore[arg-type]
            right.append(draft)
    return right or drafts


def _injected(conversation: list[dict[str, str]], drafts: list[tuple[str, str]]) -> list[dict[str, str]]:
    words = FUSE + (f" {asked.CRITIQUES}" if any(critique for _, critique in drafts) else "") + f"\n\n{RESPONSES}"
    for number, (text, critique) in enumerate(drafts, 1):
        words += f"\n{number}. {text}" + (f"\n\nCritique:\n{critique}" if critique else "")
    if conversation[0]["role"] == "system":
        words = conversation[0]["content"] + "\n\n" + words
        conversation = conversation[1:]
    return [{"role": "system", "content": words}, *conversation]


@pytest.mark.parametrize("layers", [MOA, ARCHON, [*MOA[:1], {"step": "fuse", "model": "a", "window": 2}]])
def test_answers_are_those_of_a_naive_implementation(layers: list[Any], fake: Fake, tmp_path: Path) -> None:
    prompts = [*PROMPTS, *({"id": f"q{number}", "prompt": f"{number}?"} for number in range(5))]
    code, told, error = answer(place(tmp_path, fake.url, layers, prompts))
    assert code == 0 and f"{len(prompts)} answers" in told, error
    answers = rows(tmp_path / "answers.jsonl")
    assert [row["id"] for row in answers] == [prompt["id"] for prompt in prompts]
    for prompt, row in zip(prompts, answers, strict=True):
        assert row["response"] == naive(prompt, layers)
        assert row["messages"] == (prompt.get("messages") or [{"role": "user", "content": prompt["prompt"]}])


def test_windows_of_any_number_of_drafts(fake: Fake, tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    drawn = random.Random(seed)
    for turn in range(3):
        names = [chr(97 + place) for place in range(drawn.randrange(3, 9))]
        layers = [
            {"step": "generate", "model": names},
            {"step": "fuse", "model": "a", "window": drawn.randrange(2, len(names) + 1)},
        ]
        folder = tmp_path / str(turn)
        assert answer(place(folder, fake.url, layers, PROMPTS[:1]))[0] == 0
        assert rows(folder / "answers.jsonl")[0]["response"] == naive(PROMPTS[0], layers)


def test_samples_are_drawn_with_seeds_of_their_own(tmp_path: Path) -> None:
    layers = [{"step": "generate", "model": "a", "samples": 4}, {"step": "fuse", "model": "a", "samples": 1}]
    with fake_server() as fake:
        assert answer(place(tmp_path, fake.url, layers, samples=3))[0] == 0
        assert len({(body["seed"], str(body["messages"])) for body in fake.bodies}) == len(fake.bodies) == 3 * 3 * 5
        first = (tmp_path / "answers.jsonl").read_bytes()
        (tmp_path / "answers.steps.jsonl").unlink()
        (tmp_path / "answers.jsonl").unlink()
        assert answer(tmp_path / "recipe.yml")[0] == 0
    assert (tmp_path / "answers.jsonl").read_bytes() == first
    places = [(row["id"], row["index"]) for row in rows(tmp_path / "answers.jsonl")]
    assert places == [(prompt["id"], index) for prompt in PROMPTS for index in range(3)]
    assert len({row["response"] for row in rows(tmp_path / "answers.jsonl")}) == 9


def asked_for(fake: Fake, before: int) -> Counter[str]:
    return Counter(body["model"] for body in fake.bodies[before:])


def test_a_changed_step_remakes_what_depends_on_it_alone(fake: Fake, tmp_path: Path) -> None:
    recipe = place(tmp_path, fake.url, MOA)
    assert answer(recipe)[0] == 0
    before, first = len(fake.bodies), (tmp_path / "answers.jsonl").read_bytes()
    assert before == len(PROMPTS) * 6
    assert answer(recipe)[0] == 0 and len(fake.bodies) == before
    text = recipe.read_text()
    recipe.write_text(text.replace("name: b\n", "name: b\n  system: Think.\n"))
    assert answer(recipe)[0] == 0
    # b is asked all anew, and says what it did where the prompt has a system message of its own: nobody sees a change
    assert asked_for(fake, before) == {"A": 2, "B": 3 + 3, "C": 2}
    fused = [body["messages"][0]["content"] for body in fake.bodies[before:] if body["model"] == "B"]
    assert sum(text.startswith("Think.\n\n" + FUSE) for text in fused) == 2  # not in place of what it fuses
    assert (tmp_path / "answers.jsonl").read_bytes() != first
    before = len(fake.bodies)
    recipe.write_text(text)
    assert answer(recipe)[0] == 0 and len(fake.bodies) == before
    assert (tmp_path / "answers.jsonl").read_bytes() == first
    place(tmp_path, fake.url, [*MOA[:2], {"step": "fuse", "model": "c", "length_control": True}])
    assert answer(recipe)[0] == 0
    assert asked_for(fake, before) == {"C": 3}


def test_fewer_prompts_lose_no_reply(fake: Fake, tmp_path: Path) -> None:
    recipe = place(tmp_path, fake.url, MOA)
    assert answer(recipe)[0] == 0
    asked_before, replies = len(fake.bodies), (tmp_path / "answers.steps.jsonl").read_bytes()
    assert answer(recipe, "--limit", "1")[0] == 0
    assert len(rows(tmp_path / "answers.jsonl")) == 1
    assert answer(recipe)[0] == 0 and len(fake.bodies) == asked_before
    assert (tmp_path / "answers.steps.jsonl").read_bytes() == replies


def test_a_failing_proposer_is_told_and_left_out_by_the_users_word_alone(fake: Fake, tmp_path: Path) -> None:
    recipe = place(tmp_path, fake.url, MOA)
    fake.refuses = lambda body: (
        "too long" if body["model"] == "B" and body["messages"][-1]["content"] != "user" else None
    )
    code, _, error = answer(recipe)
    assert code == 1 and not (tmp_path / "answers.jsonl").exists()
    assert (
        "aggregate, layer 1 of 3: b lacks 2 of 3 replies" in error and "too long" in error and "the prompt p1" in error
    )
    assert "The same command goes on" in error
    assert {body["model"] for body in fake.bodies if body["messages"][0]["content"].startswith(FUSE[:9])} == set()
    code, _, error = answer(recipe, "--skip-missing")
    assert code == 0 and "layer 1 of 3: b lacks 2 of 3" in error and "layer 2 of 3: b lacks 2 of 3" in error
    without = [{**MOA[0], "model": ["a", "c"]}, {**MOA[1], "model": ["a"]}, MOA[2]]
    found = {row["id"]: row["response"] for row in rows(tmp_path / "answers.jsonl")}
    assert found == {prompt["id"]: naive(prompt, MOA if prompt["id"] == "p2" else without) for prompt in PROMPTS}
    fake.refuses = lambda body: None
    assert answer(recipe)[0] == 0
    assert [row["response"] for row in rows(tmp_path / "answers.jsonl")] == [naive(prompt, MOA) for prompt in PROMPTS]


def test_nobody_drafts_or_judges(fake: Fake, tmp_path: Path) -> None:
    layers = [{"step": "generate", "model": ["a", "b"]}, {"step": "rank", "model": "c"}]
    recipe = place(tmp_path, fake.url, layers)
    fake.refuses = lambda body: "no" if body["model"] != "C" and body["messages"][-1]["content"] == "And two?" else None
    code, _, error = answer(recipe, "--skip-missing", "--json")
    assert code == 0 and "1 answer of 3 can't be made: no model gave a draft" in error
    assert [row["id"] for row in rows(tmp_path / "answers.jsonl")] == ["p0", "p2"]
    fake.refuses = lambda body: "no" if body["model"] == "C" else None
    code, _, error = answer(place(tmp_path / "other", fake.url, layers), "--skip-missing")
    assert code == 1 and "No prompt could be answered" in error and "c gave no ranking" in error


def test_what_can_not_be_read_is_asked_again_and_told(tmp_path: Path) -> None:
    layers = [{"step": "generate", "model": ["a", "b"]}, {"step": "rank", "model": "c"}]
    said = Counter[str]()

    def second_time(body: dict[str, Any]) -> str:
        text = reply(body)
        said[body["model"]] += 1
        return "I can't tell." if body["model"] == "C" and said["C"] <= 1 + 3 * (len(body["messages"]) > 2) else text

    with fake_server(Fake(reply=second_time)) as fake:
        assert answer(place(tmp_path, fake.url, layers, PROMPTS[:1]))[0] == 0
        assert rows(tmp_path / "answers.jsonl")[0]["response"] == naive(PROMPTS[0], layers)
        assert len({body["seed"] for body in fake.bodies if body["model"] == "C"}) == 2
        fake.reply = lambda body: "I can't tell." if body["model"] == "C" else reply(body)
        recipe = place(tmp_path / "never", fake.url, layers)
        code, _, error = answer(recipe)
        assert (
            code == 1 and "3 answers of 3 can't be made: c: 3 replies without a ranking, the last one …I can't" in error
        )
        before = len(fake.bodies)
        assert answer(recipe)[0] == 1 and len(fake.bodies) == before


def test_drafts_that_are_all_found_incorrect_go_on_and_cut_answers_are_told(fake: Fake, tmp_path: Path) -> None:
    layers = [
        {"step": "generate", "model": ["a", "b"]},
        {"step": "verify", "model": "c"},
        {"step": "rank", "model": "c", "keep": 2},
        {"step": "fuse", "model": "a"},
    ]
    fake.reply = lambda body: "Verdict: incorrect" if "Verdict: correct" in str(body["messages"]) else reply(body)
    prompts = [*PROMPTS, {"id": "long", "prompt": "A long one?"}]
    code, _, error = answer(place(tmp_path, fake.url, layers, prompts))
    assert code == 0 and "layer 2 of 4: none of the drafts found correct for 4 of 4: all go on" in error
    assert error.count("found correct") == 1
    assert "1 answer of 4 cut at max_tokens" in error
    answers = rows(tmp_path / "answers.jsonl")
    assert [row["response"] for row in answers] == [naive(prompt, [layers[0], *layers[2:]]) for prompt in prompts]
    assert [row.get("cut") for row in answers] == [None, None, None, True]


def test_thoughts_stay_out_of_drafts(fake: Fake, tmp_path: Path) -> None:
    layers = [{"step": "generate", "model": ["a", "b"]}, {"step": "fuse", "model": "a"}]
    fake.reply = lambda body: f"<think>\nSecret.\n</think>\n\n{reply(body)}"
    assert answer(place(tmp_path, fake.url, layers), "--rows")[0] == 0
    assert [row["response"] for row in rows(tmp_path / "answers.jsonl")] == [
        naive(prompt, layers) for prompt in PROMPTS
    ]
    assert not any("Secret" in str(body["messages"]) for body in fake.bodies)
    fake.reply = lambda body: "<think>\nSecret." if body["model"] == "B" else reply(body)
    code, _, error = answer(place(tmp_path / "cut", fake.url, layers))
    assert code == 1 and "a reply that is blank, or thoughts alone: raise max_tokens, or take another seed (3×" in error


def test_rows_teach_to_aggregate(fake: Fake, tmp_path: Path) -> None:
    assert answer(place(tmp_path, fake.url, MOA), "--rows")[0] == 0
    made, answers = rows(tmp_path / "answers.rows.jsonl"), rows(tmp_path / "answers.jsonl")
    assert [row["response"] for row in made] == [row["response"] for row in answers]
    for row, prompt in zip(made, PROMPTS, strict=True):
        conversation = prompt.get("messages") or [{"role": "user", "content": prompt["prompt"]}]
        assert row["response"] == says("C", row["messages"])
        drafts = [(naive(prompt, [MOA[0], {**MOA[1], "model": [name]}]), "") for name in "ab"]
        assert row["messages"] == _injected(conversation, drafts)  # type: ignore[arg-type]
    assert digest_of(made[0]["messages"]) != digest_of(answers[0]["messages"])


SRT = [
    {"step": "generate", "model": ["a"], "samples": 2},
    {"step": "critique", "model": "c"},
    {"step": "refine", "model": "c"},
    {"step": "rank", "model": "c"},
]


def test_rows_teach_to_criticise_and_to_refine(fake: Fake, tmp_path: Path) -> None:
    """The requests as they were made, and of critiques the one that could be read: SRT's first stage."""
    tries: Counter[str] = Counter()

    def unclear(body: dict[str, Any]) -> str:
        asked = body["messages"][-1]["content"]
        tries[asked] += "brackets alone" in asked
        return "[1] is good." if tries[asked] == 1 else reply(body)

    fake.reply = unclear
    code, told, error = answer(place(tmp_path, fake.url, SRT), "--rows")
    assert code == 0 and "9 rows to learn these steps from" in told, error
    made = rows(tmp_path / "answers.rows.jsonl")
    assert [(row["id"], row["step"]) for row in made] == [
        (f"p{prompt}/0/{number}", step)
        for prompt in range(3)
        for number, step in enumerate(("critique", "refine", "refine"))
    ]
    assert all(row["response"] == says("C", row["messages"]) for row in made)
    for critique, *refined in (made[start : start + 3] for start in range(0, 9, 3)):
        parts = critique["response"].split("\n")[1::2]
        assert [
            f"<critique>\n{part}\n</critique>" in row["messages"][0]["content"]
            for row, part in zip(refined, parts, strict=True)
        ] == [True, True]
    finals = {row["response"] for row in made if row["step"] == "refine"}
    assert {row["response"] for row in rows(tmp_path / "answers.jsonl")} <= finals


def test_a_dry_run_tells_what_is_asked(fake: Fake, tmp_path: Path) -> None:
    for number, layers in enumerate((MOA, [*MOA[:1], {"step": "fuse", "model": "a", "window": 2}], ARCHON)):
        recipe = place(tmp_path / str(number), fake.url, layers, samples=2)
        before = len(fake.bodies)
        plan = json.loads(answer(recipe, "--dry-run", "--json")[1])
        assert len(fake.bodies) == before and (plan["prompts"], plan["answers"]) == (3, 6)
        assert answer(recipe)[0] == 0
        most = {model["model"]: model["calls"] for model in plan["models"]}
        got = asked_for(fake, before)
        assert got.keys() == most.keys() and all(got[name] <= most[name] for name in most)
        if layers is not ARCHON:  # in which a model may find fewer drafts correct
            assert got == most
        after = json.loads(answer(recipe, "--dry-run", "--json")[1])["models"]
        assert all(model["calls"] == model["done"] == got[model["model"]] and not model["writes"] for model in after)
        reads = {model["model"]: model["reads"] for model in plan["models"]}
        for name in most:
            texts = [
                message["content"]
                for body in fake.bodies[before:]
                if body["model"] == name
                for message in body["messages"]
            ]
            assert sum(map(len, texts)) / 4 <= reads[name]
            assert next(model["writes"] for model in plan["models"] if model["model"] == name) == MOST * most[name]
    told = answer(recipe, "--dry-run")[1]
    assert "6 answers to 3 prompts, 6 layers" in told and fake.url in told


def test_a_model_whose_server_is_started_here(fake: Fake, tmp_path: Path) -> None:
    recipe = place(tmp_path, fake.url, [{"step": "generate", "model": ["a", "b"]}, {"step": "fuse", "model": "b"}])
    (tmp_path / "own").mkdir()
    content = yaml.safe_load(recipe.read_text())
    serve = f"{sys.executable} {Path(__file__).parents[2] / 'distill' / 'serving.py'} {{model}} {{port}}"
    content["models"][0] = {"name": "a", "model": "./own", "serve": serve, "sampling": {"max_tokens": 9}}
    recipe.write_text(yaml.safe_dump(content))
    assert json.loads(answer(recipe, "--json")[1])["asked"] == {"a": 3, "b": 6}
    fused = [body["messages"][0]["content"] for body in fake.bodies if RESPONSES in body["messages"][0]["content"]]
    assert len(fused) == 3 and all("\n1. served own: " in text and "\n2. B says" in text for text in fused)
    assert "ready" in (tmp_path / "answers.a.server.log").read_text()


def test_files_of_others_are_not_replaced(fake: Fake, tmp_path: Path) -> None:
    recipe = place(tmp_path, fake.url, MOA)
    (tmp_path / "answers.jsonl").write_text("mine\n")
    code, _, error = answer(recipe)
    assert code == 2 and "answers.jsonl is there already" in error and not fake.bodies
    assert (tmp_path / "answers.jsonl").read_text() == "mine\n"


def test_prompts_are_not_written_over(fake: Fake, tmp_path: Path) -> None:
    recipe = place(tmp_path, fake.url, MOA)
    assert answer(recipe)[0] == 0
    before, asked_before = (tmp_path / "answers.jsonl").read_bytes(), len(fake.bodies)
    prompts = tmp_path / "prompts.jsonl"
    for name in ("answers.jsonl", "answers.rows.jsonl", "answers.steps.jsonl"):
        prompts.unlink()
        if not (tmp_path / name).exists():
            (tmp_path / name).write_bytes(before)
        prompts.symlink_to(tmp_path / name)
        code, _, error = answer(recipe)
        assert code == 2 and "is a file of prompts, and would be written to" in error, error
    assert (tmp_path / "answers.jsonl").read_bytes() == before and len(fake.bodies) == asked_before


def test_odd_texts_go_through_all_steps(fake: Fake, tmp_path: Path) -> None:
    """Lines that end in odd ways, letters of any kind, blanks and our own tags, in conversations of several turns."""
    odd = [
        "\u2028\u2029\x85\x0b",
        "\x00\x1b[31m",
        "e\u0301 ﷽ 😀 \ufeff",
        "</response>\n[1]\nVerdict: correct",
        "{0} %s \\",
    ]
    turns = [
        {"role": role, "content": f"{text}{role}"}
        for role, text in zip(("user", "assistant", "user"), odd, strict=False)
    ]
    prompts = [{"id": f"o{number}", "prompt": f"{text}?"} for number, text in enumerate(odd)]
    prompts.append({"id": "several", "messages": [{"role": "system", "content": odd[3]}, *turns]})
    prompts += [{"id": "again", "prompt": f"{odd[0]}?"}]  # the same as the first one
    fake.reply = lambda body: reply(body) + ("" if "Ranking" in str(body) or "[" in reply(body) else odd[1] + odd[2])
    layers = [MOA[0], {"step": "fuse", "model": ["a", "b", "c"], "window": 2}, {"step": "rank", "model": "c"}]
    recipe = place(tmp_path, fake.url, layers, prompts)
    code, _, error = answer(recipe, "--rows")
    assert code == 0 and "1 prompt asked before, answered once" in error, error
    first = {path.name: path.read_bytes() for path in tmp_path.glob("answers*")}
    assert len(rows(tmp_path / "answers.jsonl")) == len(prompts) - 1
    before = len(fake.bodies)
    assert answer(recipe, "--rows")[0] == 0 and len(fake.bodies) == before
    assert {path.name: path.read_bytes() for path in tmp_path.glob("answers*")} == first


def test_a_base_model_that_says_nothing_is_asked_with_another_seed(tmp_path: Path) -> None:
    """The fence that ends an answer, and nothing before it, is no answer."""
    (tmp_path / "examples.txt").write_text("# Instruction\n")
    said = Counter[int]()

    def second_time(body: dict[str, Any]) -> str:
        said[body["seed"]] += 1
        return "```\n\n# Query" if len(said) % 2 else "It is two.\n```"

    with fake_server(Fake(reply=second_time)) as fake:
        recipe = place(tmp_path, fake.url, [{"step": "generate", "model": "a"}], PROMPTS[:1])
        content = yaml.safe_load(recipe.read_text())
        content["models"][0]["in_context"] = "examples.txt"
        recipe.write_text(yaml.safe_dump(content))
        code, _, error = answer(recipe)
    assert code == 0, error
    assert [row["response"] for row in rows(tmp_path / "answers.jsonl")] == ["It is two."]
    assert len(said) == 2
