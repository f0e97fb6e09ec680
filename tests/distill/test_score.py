"""The score stage: every scorer on every answer of its domains, resumed, kept apart by settings, alike after kills."""

from __future__ import annotations

import json
import random
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_lite.answers import server as server_module
from mergekit_lite.answers.loading import placed
from mergekit_lite.answers.rows import write_rows
from mergekit_lite.answers.scoring.pair_ranker import Comparison, load
from mergekit_lite.commands import main
from tests.answers.fake_server import Fake, fake_server
from tests.answers.scorers.pair_ranker import write_for_transformers
from tests.answers.scorers.test_reward import write_classifier
from tests.distill.recipes import write_recipe
from tests.models import tree_bytes
from tests.processes import preload, started

preload("httpx2")

DOMAINS = ("maths", "chat")
SOURCES = [{"name": name, "model": "m", "server": "http://127.0.0.1:9/v1"} for name in "ab"]
EXACT = {"name": "right", "kind": "exact"}
LENGTH = {"name": "long", "kind": "function", "model": "lengths:length", "domains": ["chat"]}
MODULE = """
import os, time
def slow(completions, **columns):
    time.sleep(0.005 * len(completions))
    return [len(answer[-1]["content"]) for answer in completions]
def length(completions, id, **columns):
    answers = [answer if isinstance(answer, str) else answer[-1]["content"] for answer in completions]
    with open(os.environ["LENGTHS_LOG"], "a") as log:
        log.writelines(f"{prompt} {answer}\\n" for prompt, answer in zip(id, answers))
    return [None if answer.endswith("3") else len(answer) for answer in answers]
def broken(completions, **columns):
    return [answer.size for answer in completions]
def silent(completions, **columns):
    return [None for answer in completions]
"""


@pytest.fixture(autouse=True)
def lengths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A scorer of the user's own, which logs what it is asked."""
    (tmp_path / "lengths.py").write_text(MODULE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delitem(sys.modules, "lengths", raising=False)
    log = tmp_path / "lengths.log"
    monkeypatch.setenv("LENGTHS_LOG", str(log))
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.002)
    return log


def place(folder: Path, scorers: list[dict[str, Any]], prompts: int = 6, samples: int = 3, **changes: Any) -> Path:
    """A recipe whose sources have answered."""
    folder.mkdir(exist_ok=True)
    pairs = {"rule": "best_worst", "score": scorers[0]["name"]}
    path = write_recipe(folder, **({"sources": SOURCES, "scorers": scorers, "pairs": pairs} | changes))
    out = folder / "out"
    write_rows(
        out / "prompts.jsonl",
        (
            {
                "id": f"p{n}",
                "messages": [{"role": "user", "content": f"question {n}"}],
                "domain": DOMAINS[n % 2],
                "reference": f"a {n} 0",
                "tests": [],
            }
            for n in range(prompts)
        ),
    )
    for name in "ab":
        answer(out, name, prompts, samples)
    return path


def answer(out: Path, name: str, prompts: int, samples: int) -> None:
    rows = [
        {"prompt": f"p{n}", "source": name, "index": i, "text": f"{name} {n} {i}", "finish": "stop", "tokens": 3}
        for n in range(prompts)
        for i in range(samples)
    ]
    write_rows(out / "samples" / f"{name}.jsonl", rows)


def invoke(path: Path) -> tuple[int, str, str]:
    result = CliRunner().invoke(main, ["distill", "score", str(path)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def scores(folder: Path, scorer: str, source: str) -> list[dict[str, Any]]:
    path = folder / "out" / "scores" / scorer / f"{source}.jsonl"
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_every_answer_is_judged_by_every_scorer_of_its_domain(tmp_path: Path, lengths: Path) -> None:
    path = place(tmp_path / "run", [EXACT, LENGTH])
    code, told, warned = invoke(path)
    assert code == 0, warned
    rows = scores(tmp_path / "run", "right", "a")
    assert [(row["prompt"], row["index"]) for row in rows] == [(f"p{n}", i) for n in range(6) for i in range(3)]
    assert [row["score"] for row in rows] == [1.0, 0.0, 0.0] * 6
    assert {row["score"] for row in scores(tmp_path / "run", "right", "b")} == {0.0}
    rows = scores(tmp_path / "run", "long", "b")
    assert [row["prompt"] for row in rows] == [f"p{n}" for n in (1, 3, 5) for _ in range(3)]
    assert [row["score"] for row in rows] == [5] * 9
    for cells in (["right", "a", "18", "0.3333", "0.471", "0"], ["long", "b", "9", "5", "0", "0"]):
        assert any(line.split() == cells for line in told.splitlines()), told
    before = tree_bytes(tmp_path / "run" / "out")
    asked = lengths.read_text()
    assert invoke(path)[0] == 0
    assert tree_bytes(tmp_path / "run" / "out") == before and lengths.read_text() == asked


def test_what_gets_no_score_is_counted_and_told(tmp_path: Path) -> None:
    path = place(tmp_path / "run", [LENGTH], samples=5)
    code, told, warned = invoke(path)
    assert code == 0
    assert "long: 3 answers of a without a score: the function returned None (3×)" in warned
    assert any(line.split() == ["long", "a", "12", "5", "0", "3"] for line in told.splitlines())
    row = scores(tmp_path / "run", "long", "a")[3]
    assert row["score"] is None and row["why"] == "the function returned None"


@pytest.mark.parametrize(
    ("function", "why"),
    [
        ("broken", "AttributeError: 'list' object has no attribute 'size'"),
        ("silent", "the function returned None (18×)"),
    ],
)
def test_a_source_without_a_score_ends_the_stage(tmp_path: Path, function: str, why: str) -> None:
    """A function that raises is shown by its own traceback; a second call says the same, until it is mended."""
    path = place(tmp_path / "run", [{"name": "f", "kind": "function", "model": f"lengths:{function}"}])
    for _ in range(2):
        code, _, error = invoke(path)
        assert code == 1 and why in error, error
        assert ("Traceback (most recent call last):" in error) == (function == "broken")
        assert "score.py" not in error
    if function == "silent":
        assert "gave no score to any of the 18 answers of a" in error
        assert f"delete {tmp_path / 'run' / 'out' / 'scores' / 'f'} " in " ".join(error.split())


def test_more_answers_and_changed_ones_are_judged_and_no_others(tmp_path: Path, lengths: Path) -> None:
    path = place(tmp_path / "run", [LENGTH])
    assert invoke(path)[0] == 0
    out = tmp_path / "run" / "out"
    answer(out, "a", 6, 4)
    lengths.unlink()
    assert invoke(path)[0] == 0
    assert lengths.read_text().splitlines() == [f"p{n} a {n} 3" for n in (1, 3, 5)]
    text = (out / "samples" / "b.jsonl").read_text()
    (out / "samples" / "b.jsonl").write_text(text.replace('"b 3 1"', '"another answer"'))
    prompts = (out / "prompts.jsonl").read_text()
    (out / "prompts.jsonl").write_text(prompts.replace('"a 5 0"', '"another reference"'))
    lengths.unlink()
    assert invoke(path)[0] == 0
    rejudged = [f"p5 a 5 {i}" for i in range(4)] + ["p3 another answer"] + [f"p5 b 5 {i}" for i in range(3)]
    assert lengths.read_text().splitlines() == rejudged
    assert [row["score"] for row in scores(tmp_path / "run", "long", "b")][4] == 14


def test_a_function_judges_again_where_a_text_has_become_messages(tmp_path: Path, lengths: Path) -> None:
    """It gets the prompt as the data have it; no other scorer sees that."""
    path = place(tmp_path / "run", [EXACT, LENGTH])
    assert invoke(path)[0] == 0
    out = tmp_path / "run" / "out"
    prompts = [json.loads(line) for line in (out / "prompts.jsonl").read_text().splitlines()]
    prompts[3]["plain"] = True  # by default False
    (out / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    right = (out / "scores" / "right" / "a.jsonl").read_bytes()
    lengths.unlink()
    assert invoke(path)[0] == 0
    assert {line.split()[0] for line in lengths.read_text().splitlines()} == {"p3"}
    assert (out / "scores" / "right" / "a.jsonl").read_bytes() == right


def test_another_way_of_judging_is_refused(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    assert invoke(place(folder, [EXACT]))[0] == 0
    before = tree_bytes(folder / "out")
    other = EXACT | {"options": {"pattern": r"\d+"}}
    code, _, error = invoke(write_recipe(folder, sources=SOURCES, scorers=[other]))
    assert code == 2
    assert "options: was {}, is {'pattern'" in error and "give this scorer another name" in error
    assert tree_bytes(folder / "out") == before
    both = [EXACT, other | {"name": "digits"}]
    assert invoke(write_recipe(folder, sources=SOURCES, scorers=both))[0] == 0
    assert {name: data for name, data in tree_bytes(folder / "out").items() if "digits" not in name} == before
    (folder / "out" / "scores" / "right.json").write_text("{")
    code, _, error = invoke(write_recipe(folder, sources=SOURCES, scorers=[EXACT]))
    assert code == 2 and "Can't read" in error


def test_what_is_missing_or_malformed_is_told(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    path = place(folder, [EXACT])
    samples = folder / "out" / "samples"
    with (samples / "a.jsonl").open("a") as file:
        file.write('{"prompt": "p1"}\n{"prompt": "unknown", "index": 0, "text": "x"}\n[]\n')
    code, _, warned = invoke(path)
    assert code == 0 and len(scores(folder, "right", "a")) == 18
    for line, why in ((19, "no 'index'"), (20, "no 'unknown'"), (21, "expected a JSON object")):
        assert f"{samples / 'a.jsonl'}:{line}: {why}" in warned
    (samples / "b.jsonl").unlink()
    code, _, error = invoke(path)
    assert code == 2 and f"b: {samples / 'b.jsonl'}" in error and "run the stage `sample` first" in error
    wrong = write_recipe(folder, sources=SOURCES, scorers=[{"name": "right", "kind": "reward"}])
    code, _, error = invoke(wrong)
    assert code == 2 and "needs 'model'" in error


def test_the_targets_own_answers_are_judged_once_they_are_there(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    own = {"target_source": {"samples": 2}, "pairs": {"rule": "wrpo", "score": "right"}}
    path = place(folder, [EXACT], **own)
    assert invoke(path)[0] == 0
    assert not (folder / "out" / "scores" / "right" / "target.jsonl").exists()
    answer(folder / "out", "target", 3, 2)
    code, told, _ = invoke(path)
    assert code == 0 and any(line.split()[:3] == ["right", "target", "6"] for line in told.splitlines())


# Killed.


def judged(folder: Path) -> int:
    found = 0
    for path in (folder / "out" / "scores").glob("*/*.jsonl"):
        with suppress(FileNotFoundError):
            found += path.read_bytes().count(b"\n")
    return found


def kill(recipe: Path, moment: int) -> None:
    until = time.monotonic() + 600
    with started(Path.cwd(), "distill", "score", recipe) as process:
        while judged(recipe.parent) < moment:
            assert process.running and time.monotonic() < until, process.end()
            time.sleep(0.001)


def test_killed_while_it_judges(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    fake = Fake(say=lambda text, seed: f"Grade: {seed % 10 + 1}")
    with fake_server(fake):
        judge = {"name": "judge", "kind": "judge", "model": "m", "server": fake.url, "concurrency": 1} | {
            "domains": ["chat"]
        }
        slow = {"name": "slow", "kind": "function", "model": "lengths:slow"}
        killed, whole = (place(tmp_path / name, [judge, slow], 20, 4) for name in ("killed", "whole"))
        total = 2 * (40 + 80)
        for moment in sorted(random.Random(seed).sample(range(1, total - 80), 3)):
            kill(killed, moment)
            assert moment <= judged(killed.parent) < total
        assert invoke(killed)[0] == 0
        asked = fake.asked.total()
        assert invoke(whole)[0] == 0
        assert asked <= (fake.asked.total() - asked) + 3 * 16  # at most the windows in which it was killed
    assert judged(killed.parent) == total
    assert tree_bytes(killed.parent / "out") == tree_bytes(whole.parent / "out")


def test_what_a_kill_left_of_a_row_is_judged_again(tmp_path: Path) -> None:
    """Together with its window, for in a batch of another shape the last bits are others."""
    write_classifier(tmp_path / "rm")
    path = place(tmp_path / "run", [{"name": "rm", "kind": "reward", "model": "../rm", "batch_size": 1}], 8, 3)
    assert invoke(path)[0] == 0
    before = tree_bytes(tmp_path / "run" / "out")
    finished = tmp_path / "run" / "out" / "scores" / "rm" / "a.jsonl"
    content = finished.read_bytes()
    for cut in (len(content) // 2, len(content) - 3):
        finished.unlink()
        finished.with_name("a.partial.jsonl").write_bytes(content[:cut])
        assert invoke(path)[0] == 0
        assert tree_bytes(tmp_path / "run" / "out") == before


@pytest.mark.parametrize(
    ("row", "why"),
    [
        ({"prompt": [1], "index": 0, "text": "x"}, "no 'prompt' of the right type"),
        ({"prompt": "p0", "index": {}, "text": "x"}, "no 'index'"),
        ({"prompt": "p0", "text": 3}, "no 'index', 'text' of"),
        ({"prompt": "other", "index": 0, "text": "x"}, "no 'other' among the prompts"),
        (["p0", 0], "expected a JSON object"),
    ],
)
def test_a_row_of_an_answer_that_is_none_is_left_out(tmp_path: Path, row: Any, why: str) -> None:
    path = place(tmp_path / "run", [EXACT], 2, 1)
    with (tmp_path / "run" / "out" / "samples" / "a.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    code, _, warned = invoke(path)
    assert code == 0 and "a.jsonl:3" in warned.replace("\n", "") and why in " ".join(warned.split()), warned
    assert [row["prompt"] for row in scores(tmp_path / "run", "right", "a")] == ["p0", "p1"]


def test_thoughts_are_not_judged(tmp_path: Path) -> None:
    """Be they in the text or apart, whatever becomes of them in training."""
    path = place(tmp_path / "run", [EXACT], prompts=1)
    row = {"prompt": "p0", "source": "a", "finish": "stop"}
    answers = [
        {"text": "<think>\na 0 1\n</think>\n\na 0 0"},
        {"text": "a 0 0", "thoughts": "a 0 1"},
        {"text": "<think>\na 0 0"},  # a thought that never ended is no answer
    ]
    rows = [{**row, "index": index, **given} for index, given in enumerate(answers)]
    write_rows(tmp_path / "run" / "out" / "samples" / "a.jsonl", rows)
    assert invoke(path)[0] == 0
    assert [row["score"] for row in scores(tmp_path / "run", "right", "a")] == [1, 1, 0]


RIVALS = {"name": "wins", "kind": "pairwise", "model": "m", "options": {"against": "rivals", "retries": 0}}


def longer(text: str, seed: int) -> str:
    """A judge that likes late letters, wherever they stand."""
    first, second = (text.split(f"<answer_{place}>\n")[1].split(f"\n</answer_{place}>")[0] for place in "ab")
    return f"Better: {'tie' if first == second else 'A' if first > second else 'B'}"


def test_answers_are_compared_with_those_of_all_sources(tmp_path: Path) -> None:
    """Each with the five others to its prompt; a pair is asked once for each source that has a part in it."""
    with fake_server(Fake(say=longer)) as fake:
        path = place(tmp_path / "run", [{**RIVALS, "server": fake.url}], prompts=2)
        assert invoke(path)[0] == 0
        asked = len(fake.bodies)
        assert [row["score"] for row in scores(tmp_path / "run", "wins", "a")] == [0, 0.2, 0.4] * 2
        assert [row["score"] for row in scores(tmp_path / "run", "wins", "b")] == [0.6, 0.8, 1] * 2
        assert asked == 2 * 2 * (3 * 2 + 2 * 3 * 3)
        assert invoke(path)[0] == 0 and len(fake.bodies) == asked
        # The sources' answers aren't judged again for those of a target that has learnt from them.
        answer(path.parent / "out", "target", 2, 3)
        own = {"samples": 3, "sampling": {"temperature": 1}}
        train = {name: {"learning_rate": 1e-6} for name in ("sft", "preference")}
        train["preference"]["objective"] = "dpo"
        changes = {"prompts": 2, "target_source": own, "train": train}
        place(tmp_path / "run", [{**RIVALS, "server": fake.url}], **changes)
        assert invoke(path)[0] == 0
        assert [row["score"] for row in scores(tmp_path / "run", "wins", "target")] == [0, 0.5, 1] * 2
        assert len(fake.bodies) == asked + 2 * 3 * 2
        # Without such a training all nine are rivals.
        place(
            tmp_path / "run",
            [{**RIVALS, "server": fake.url}],
            **{**changes, "train": {"preference": train["preference"]}},
        )
        assert invoke(path)[0] == 0
        found = [row["score"] for name in ("a", "b", "target") for row in scores(tmp_path / "run", "wins", name)[:3]]
        assert found == [place / 8 for place in range(9)]


def test_other_rivals_are_met_again(tmp_path: Path) -> None:
    with fake_server(Fake(say=longer)) as fake:
        path = place(tmp_path / "run", [{**RIVALS, "server": fake.url}], prompts=2)
        assert invoke(path)[0] == 0
        asked = len(fake.bodies)
        place_b = path.parent / "out" / "samples" / "b.jsonl"
        place_b.write_text(place_b.read_text().replace('"b 1 0"', '"A new answer"'))
        assert invoke(path)[0] == 0
        assert [row["score"] for row in scores(tmp_path / "run", "wins", "a")] == [0, 0.2, 0.4, 0.2, 0.4, 0.6]
        assert len(fake.bodies) == asked + 2 * (3 * 2 + 2 * 3 * 3), "of the one prompt"


def test_pair_rm_ranks_the_answers_to_a_prompt(tmp_path: Path) -> None:
    """Its scores are its formula's over the answers of both sources; interrupted or not, they are the same bytes."""
    model = write_for_transformers(tmp_path / "ranker")
    lengths = {"source_length": 30, "answer_length": 40}
    ranks = {"name": "pr", "kind": "pair_rm", "model": str(model), "batch_size": 2, "options": lengths}
    assert invoke(place(tmp_path / "run", [ranks], prompts=40))[0] == 0
    ranker = load(str(model), placed("cpu", None), None, 30, 40)
    found = [row["score"] for row in scores(tmp_path / "run", "pr", "b")][3 * 7 : 3 * 8]
    answers = [f"{name} 7 {i}" for name in "ab" for i in range(3)]
    for score, ours in zip(found, answers[3:], strict=True):
        pairs = [Comparison("question 7", *both) for other in answers for both in ((ours, other), (other, ours))]
        margins = ranker.compare(pairs, 1)
        assert score == pytest.approx((sum(margins[::2]) - sum(margins[1::2])) / 6, abs=1e-5)
    assert invoke(place(tmp_path / "again", [ranks], prompts=40))[0] == 0
    path = tmp_path / "again" / "out" / "scores" / "pr" / "b.jsonl"
    whole = path.read_bytes()
    path.write_bytes(b"".join(whole.splitlines(keepends=True)[:50]))
    assert invoke(tmp_path / "again" / "recipe.yaml")[0] == 0
    assert path.read_bytes() == whole == (tmp_path / "run" / "out" / "scores" / "pr" / "b.jsonl").read_bytes()


def test_scores_of_two_contests_dont_rank_together(tmp_path: Path) -> None:
    own = {"samples": 3, "sampling": {"temperature": 1}}
    scorer = {**RIVALS, "server": "http://127.0.0.1:9/v1"}
    pairs = {"rule": "best_worst", "score": "wins", "answers": "all"}
    train = {"sft": {"learning_rate": 1e-6}, "preference": {"objective": "dpo", "learning_rate": 1e-6}}
    path = place(tmp_path / "run", [scorer], target_source=own, pairs=pairs, train=train)
    code, _, told = invoke(path)
    assert code == 2 and "'wins' scores an answer among its rivals" in told
