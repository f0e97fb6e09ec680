"""Models that answer together as the opponent of candidates: asked once, told, kept, and seen by who compares."""

from __future__ import annotations

import json
import os
import pickle
import re
import signal
import threading
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner, Result

from mergekit_lite.boosting.candidates.candidate import Job
from mergekit_lite.boosting.evaluators import _setups, evaluator_of
from mergekit_lite.boosting.measure.opponent import facing
from mergekit_lite.boosting.options import request_of
from mergekit_lite.boosting.request import Prepared, prepare
from mergekit_lite.commands import main
from tests.answers.aggregating.aggregates import reply
from tests.answers.aggregating.test_running import naive
from tests.answers.fake_server import Fake, fake_server
from tests.boost.end_to_end import write_models
from tests.processes import preload, run, started

preload("mergekit_lite.boosting.boosting", "mergekit_lite.answers.aggregating.answering")

LAYERS = [{"step": "generate", "model": ["a", "b"]}, {"step": "fuse", "model": ["a"]}]
PROMPTS = [{"id": f"q{number}", "prompt": f"What is {number}?", "reference": str(number)} for number in range(12)]
CALLS, KEPT = 3 * len(PROMPTS), 8
GIVEN = "sft dpo --prompts prompts.jsonl --search grid --grid 25 --max-tokens 6 --held-out 0 --all-items --no-kl"
SPACES = "function:tests.boost.end_to_end:spaces"
SEEN: list[dict[str, Any]] = []


def seen(prompts: Any, completions: Any, response: Any, reference: Any, **columns: Any) -> list[float]:
    """A score of the user's that compares with an opponent."""
    SEEN.extend(
        {"prompt": prompt, "response": other, "reference": right}
        for prompt, other, right in zip(prompts, response, reference, strict=True)
    )
    return [float(len(mine) < len(other)) for mine, other in zip(completions, response, strict=True)]


FUNCTION = f"function:{__name__}:seen"


def says(body: dict[str, Any]) -> str:
    """The judge likes the place A; the opponent's models say what tells all of what they were asked."""
    return "Better: A" if body["model"] == "judge" else reply(body)


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    return root


@pytest.fixture
def fake() -> Iterator[Fake]:
    with fake_server(Fake(reply=says)) as running:
        yield running


@pytest.fixture
def place(models: Path, fake: Fake, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in ("sft", "dpo"):
        (tmp_path / name).symlink_to(models / name)
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in PROMPTS))
    write_recipe(tmp_path, fake.url)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write_recipe(folder: Path, url: str, **more: Any) -> None:
    models = [
        {"name": name, "model": name.upper(), "server": url, "retries": 1, "concurrency": 2, "sampling": sampling}
        for name in "ab"
        for sampling in [{"max_tokens": 64}]
    ]
    (folder / "moa.yml").write_text(yaml.safe_dump({"models": models, "layers": LAYERS, "name": "moa", **more}))


def boosted(*arguments: str) -> Result:
    return CliRunner().invoke(main, ["boost", *GIVEN.split(), "-o", "out", *arguments])


def prepared_for(*scores: str, **more: Any) -> Prepared:
    options: Any = {"prompts": ["prompts.jsonl"], "opponent": "moa.yml", "search": "grid", "grid": {"alpha": (25.0,)}}
    options |= {"max_tokens": 6, "held_out": 0.0, "stop_early": False, "likelihoods": False, **more}
    return prepare(request_of("out", scores, "sft", "dpo", None, options))


def of_opponent(fake: Fake) -> Counter[str]:
    return Counter(body["model"] for body in fake.bodies if body["model"] != "judge")


def test_who_compares_sees_its_answers_and_nobody_else(place: Path, fake: Fake) -> None:
    judge = f"pairwise:judge,server={fake.url}"
    SEEN.clear()
    ran = boosted("--opponent", "moa.yml", "--score", judge, "--score", FUNCTION, "--score", "exact")
    assert ran.exit_code == 0, ran.output
    assert f"opponent moa: {len(PROMPTS)} answers, by {CALLS} calls in this run" in ran.output
    expected = {prompt["id"]: naive(prompt, LAYERS) for prompt in PROMPTS}
    rows = [json.loads(line) for line in (place / "out.boost" / "opponent" / "answers.jsonl").read_text().splitlines()]
    assert {row["id"]: (row["response"], row["source"]) for row in rows} == {
        name: (text, "moa") for name, text in expected.items()
    }
    of = {prompt["prompt"]: prompt["id"] for prompt in PROMPTS}
    judged = [str(body["messages"][-1]["content"]) for body in fake.bodies if body["model"] == "judge"]
    assert judged
    for text in judged:
        asked = re.search(r"user: (What is \d+\?)", text)
        first, second = (re.search(rf"<answer_{a}>\n(.*?)\n</answer_{a}>", text, re.DOTALL) for a in "ab")
        assert asked and first and second
        assert expected[of[asked[1]]] in (first[1], second[1])  # the reference stays what is right, to others
    assert SEEN
    for each in SEEN:
        (prompt,) = (prompt for prompt in PROMPTS if prompt["prompt"] == each["prompt"])
        assert each == {
            "prompt": prompt["prompt"],
            "response": expected[prompt["id"]],
            "reference": prompt["reference"],
        }
    before = len(fake.bodies)
    again = boosted("--opponent", "moa.yml", "--score", judge, "--score", FUNCTION, "--score", "exact")
    assert again.exit_code == 0 and f"{len(PROMPTS)} answers, by 0 calls in this run" in again.output, again.output
    assert len(fake.bodies) == before
    write_recipe(place, fake.url, seed=1)  # other answers: rows that were measured against the first ones are no use
    other = boosted("--opponent", "moa.yml", "--score", judge, "--score", FUNCTION, "--score", "exact")
    assert other.exit_code == 2 and "holds a search against other answers" in other.output, other.output
    assert len(fake.bodies) == before


def test_what_is_wrong_is_said_before_anybody_is_asked(place: Path, fake: Fake) -> None:
    ran = boosted("--opponent", "moa.yml", "--score", "exact", "--limits", "growth=much")
    assert ran.exit_code == 2 and "--opponent is for scores that compare" in ran.output and "growth" in ran.output
    ran = boosted("--opponent", "moa.yml", "--score", f"pairwise:judge,server={fake.url},against=rivals")
    assert ran.exit_code == 2 and "--opponent is for scores that compare" in ran.output, ran.output
    write_recipe(place, fake.url, samples=3)
    ran = boosted("--opponent", "moa.yml", "--score", "exact")
    assert "samples: 3, but an opponent answers each prompt once" in ran.output and "compare with" in ran.output
    ran = boosted("--opponent", "none.yml", "--score", FUNCTION)
    assert ran.exit_code == 2 and "none.yml" in ran.output
    write_recipe(place, fake.url, layers=[{"step": "generate", "model": ["a", "b"]}])
    ran = boosted("--opponent", "moa.yml", "--score", FUNCTION, "--limits", "growth=much")
    assert ran.exit_code == 2 and "the last layer leaves 2 drafts" in ran.output and "growth" in ran.output
    models = [{"name": "a", "model": "./gone"}, {"name": "b", "model": "B", "server": fake.url}]
    write_recipe(place, fake.url, models=models)
    ran = boosted("--opponent", "moa.yml", "--score", FUNCTION)
    assert ran.exit_code == 2 and "--opponent moa.yml: the model a" in ran.output and "no folder" in ran.output
    assert not fake.bodies and not (place / "out.boost").exists()


def test_a_dry_run_tells_calls_and_cost(place: Path, fake: Fake) -> None:
    ran = boosted("--opponent", "moa.yml", "--score", FUNCTION, "--dry-run", "--json")
    assert ran.exit_code == 0, ran.output
    told = json.loads(ran.stdout)["opponent"]
    assert told.startswith("moa, 2 layers: a ") and fake.url in told
    count = len(PROMPTS)
    assert f"{2 * count} of {2 * count} calls to come" in told and f"write ≤ {2 * count * 64:,} tokens" in told
    assert f"b ({fake.url}) {count} of {count} calls to come" in told and f"write ≤ {count * 64:,} tokens" in told
    assert not fake.bodies and not (place / "out.boost").exists()
    assert boosted("--opponent", "moa.yml", "--score", FUNCTION).exit_code == 0
    after = json.loads(boosted("--opponent", "moa.yml", "--score", FUNCTION, "--dry-run", "--json").stdout)["opponent"]
    assert f"0 of {2 * count} calls to come, which read ≤ 0 and write ≤ 0 tokens" in after


def test_answers_that_are_missing_end_it_before_anything_is_measured(place: Path, fake: Fake) -> None:
    fake.refuses = lambda body: "too long" if body["messages"][-1]["content"] == "What is 7?" else None
    ran = boosted("--opponent", "moa.yml", "--score", FUNCTION)
    assert ran.exit_code == 1 and "Answers of the opponent are missing" in ran.output, ran.output
    assert "lacks 1 of 12 replies" in ran.output and "too long" in ran.output and "skip-missing" not in ran.output
    assert not list((place / "out.boost").glob("candidates/*"))
    before = of_opponent(fake)
    fake.refuses = lambda body: None
    assert boosted("--opponent", "moa.yml", "--score", FUNCTION).exit_code == 0
    assert of_opponent(fake) - before == {"A": 1 + len(PROMPTS), "B": 1}


def test_a_worker_measures_against_the_same_answers(place: Path, fake: Fake) -> None:
    """It gets them with its request, and asks nobody; the rows are those of a search in one process."""
    prepared = prepared_for(FUNCTION)
    faced = prepared.against({prompt.id: f"{prompt.id} is it" for prompt in prepared.prompts})
    with evaluator_of(faced) as evaluator:
        items = list(evaluator.items)
    (setup,) = _setups(faced, items, ["cpu"])
    assert setup.request.opponent is None
    assert setup.opponent == {prompt["id"]: f"{prompt['id']} is it" for prompt in PROMPTS}
    SEEN.clear()
    (place / "moa.yml").unlink()  # a machine elsewhere needs no recipe
    with pickle.loads(pickle.dumps(setup)) as measure:
        list(measure(Job({"alpha": 25.0}, frozenset(items[:2]))))
    assert sorted(each["response"] for each in SEEN) == sorted(f"{item} is it" for item in items[:2])
    assert not fake.bodies


def test_a_folder_of_others_costs_nothing(place: Path, fake: Fake) -> None:
    (place / "out.boost").mkdir()
    (place / "out.boost" / "mine").touch()
    ran = boosted("--opponent", "moa.yml", "--score", FUNCTION)
    assert ran.exit_code == 2 and "found other files" in ran.output and not fake.bodies


def test_prompts_without_an_opponent_are_what_they_were(place: Path) -> None:
    """So searches that were begun before there were opponents go on."""
    from mergekit_lite.answers.prompts import as_row, from_row

    prepared = replace(prepared_for(FUNCTION), opponent=None)
    assert all("opponent" not in as_row(prompt) for prompt in prepared.prompts)
    (first, *_) = facing(prepared.prompts, {prompt.id: "it" for prompt in prepared.prompts})
    assert as_row(first)["opponent"] == "it" and as_row(first)["columns"]["response"] == "it"
    assert from_row(as_row(prepared.prompts[0])) == prepared.prompts[0]


def use_key(key: str) -> None:
    """Servers get it with each request."""
    os.environ["OPENAI_API_KEY"] = key


def replies(folder: Path) -> int:
    found = 0
    for path in (folder / "out.boost" / "opponent").glob("answers.steps*.jsonl"):
        with suppress(FileNotFoundError):
            found += path.read_bytes().count(b"\n")
    return found


def test_killed_while_it_answers(place: Path, fake: Fake) -> None:
    gate = threading.Event()
    fake.on_request = lambda text: None if len(fake.bodies) <= KEPT else gate.wait(600)  # type: ignore[func-returns-value]
    command = ("boost", *GIVEN.split(), "-o", "out", "--opponent", "moa.yml", "--score", SPACES)

    with started(place, *command, before=partial(use_key, "first")) as process:
        until = time.monotonic() + 600
        while replies(place) < KEPT:
            assert process.running and time.monotonic() < until
            time.sleep(0.002)
        process.send(signal.SIGKILL)
        process.end()
    gate.set()
    assert replies(place) == KEPT
    assert not (place / "out.boost" / "opponent" / "answers.jsonl").exists()
    ended = run(place, *command, before=partial(use_key, "second"))
    assert ended.returncode == 0, ended.stderr
    assert fake.answered_for["second"] == CALLS - KEPT
    rows = [json.loads(line) for line in (place / "out.boost" / "opponent" / "answers.jsonl").read_text().splitlines()]
    assert [row["response"] for row in rows] == [naive(prompt, LAYERS) for prompt in PROMPTS]


def test_fewer_prompts_leave_the_opponents_answers_as_they_are(place: Path, fake: Fake) -> None:
    """They are another search, which is refused; the first one goes on."""
    given = ("--opponent", "moa.yml", "--score", FUNCTION)
    assert boosted(*given).exit_code == 0
    folder = place / "out.boost" / "opponent"
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    fewer = boosted(*given, "--limit", "6")
    assert fewer.exit_code == 2 and "out.boost" in fewer.output, fewer.output
    assert {path.name: path.read_bytes() for path in folder.iterdir()} == before
    asked = len(fake.bodies)
    assert boosted(*given).exit_code == 0 and len(fake.bodies) == asked


@pytest.mark.slow
def test_a_score_against_it_beside_one_against_the_baseline(place: Path, fake: Fake) -> None:
    """Both by a judge that likes short answers, in one process and in two; constants, which are long, lose."""

    def shorter(body: dict[str, Any]) -> str:
        if body["model"] != "judge":
            return reply(body)
        text = str(body["messages"][-1]["content"])
        first, second = (len(text.split(f"<answer_{at}>\n")[1].split(f"\n</answer_{at}>")[0]) for at in "ab")
        return f"Better: {'tie' if first == second else 'A' if first < second else 'B'}"

    fake.reply = shorter
    judge = f"pairwise:judge,server={fake.url}"
    found = []
    for output, more in (("one", ()), ("two", ("--parallel", "2"))):
        scores = ("--score", judge, "--score", f"{judge},against=rivals,name=duel")
        ran = boosted("--opponent", "moa.yml", *scores, "--study", output, *more)
        assert ran.exit_code == 0, ran.output
        rows = {
            alpha: {row["item"]: row for row in map(json.loads, path.read_text().splitlines())}
            for alpha in (0, 25)
            for path in [place / output / "candidates" / f"alpha={alpha}.jsonl"]
        }
        found.append({alpha: {item: row["values"] for item, row in of.items()} for alpha, of in rows.items()})
        for prompt in PROMPTS:
            item, base = prompt["id"], rows[0][prompt["id"]]["text"]
            for of in rows.values():
                ours = len(of[item]["text"])
                others = {"pairwise": naive(prompt, LAYERS), "duel": base}
                expected = {
                    name: 0.5 + ((ours < len(other)) - (ours > len(other))) / 2 for name, other in others.items()
                }
                assert of[item]["values"] == expected, item
    assert found[0] == found[1]
    assert {value["duel"] for value in found[0][25].values()} != {0.5}
