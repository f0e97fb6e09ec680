"""Killed at random moments: a rerun asks only for what is missing, and its files are those of an undisturbed run."""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

from mergekit_lite.answers.rows import write_rows
from tests.answers.fake_server import Fake, fake_server
from tests.answers.test_local import write_model
from tests.distill.recipes import write_recipe
from tests.models import tree_bytes
from tests.processes import Forked, preload, run, started

preload("httpx2", "mergekit_lite.answers.local", "transformers.models.llama.modeling_llama")

PROMPTS = [{"id": f"p{n}", "prompt": f"question {'again ' * (n % 5)}{n}"} for n in range(24)]
CONCURRENCY = 4


def place(folder: Path, sources: list[dict[str, Any]]) -> Path:
    (folder / "target").mkdir(parents=True, exist_ok=True)
    write_rows(folder / "prompts.jsonl", PROMPTS)
    return write_recipe(folder, sources=sources)


def start(recipe: Path, key: str = "") -> Forked:
    """Start the command; servers get the key with each request."""
    return started(recipe.parent, "distill", "sample", recipe, before=partial(use_key, key))


def use_key(key: str) -> None:
    os.environ["OPENAI_API_KEY"] = key


def finish(recipe: Path, key: str = "") -> None:
    ended = run(recipe.parent, "distill", "sample", recipe, before=partial(use_key, key))
    assert ended.returncode == 0, ended.stderr


def answers(folder: Path) -> int:
    """How many there are, finished or not."""
    found = 0
    for path in (folder / "out" / "samples").glob("*.jsonl"):
        with suppress(FileNotFoundError):  # finished meanwhile
            found += path.read_bytes().count(b"\n")
    return found


def stop(recipe: Path, how: signal.Signals, when: Callable[[], bool], key: str = "") -> str:
    until = time.monotonic() + 600
    with start(recipe, key) as process:
        while not when():
            assert process.running and time.monotonic() < until, "too late"
            time.sleep(0.002)
        process.send(how)
        return process.end().stderr


def chance() -> random.Random:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    return random.Random(seed)


def served(url: str) -> list[dict[str, Any]]:
    return [
        {"name": name, "model": "by seed", "server": url, "samples": 3, "concurrency": CONCURRENCY} for name in "ab"
    ]


def three(url: str) -> list[dict[str, Any]]:
    """Two served sources, and before them one that goes on from the second one's answers."""
    first, second = served(url)
    return [{**first, "name": "c", "continues": {"source": "b", "share": 0.5}}, first, second]


def test_killed_while_servers_are_asked(tmp_path: Path) -> None:
    drawn, total, kills = chance(), 3 * 3 * len(PROMPTS), 4
    moments = sorted(drawn.sample(range(total - 60), kills))  # not so late that it ends by itself
    with fake_server(Fake(lambda text, before: 503 if text.endswith("7") and not before else None)) as fake:
        fake.on_request = lambda text: time.sleep(drawn.uniform(0, 0.02))
        recipe = place(tmp_path / "killed", three(fake.url))
        missing = {}  # by run: how many answers there were not when it began
        for number, moment in enumerate(moments):
            missing[f"run {number}"] = total - answers(tmp_path / "killed")
            how = signal.SIGINT if number == 2 else signal.SIGKILL
            moment = max(moment, answers(tmp_path / "killed") + 1)  # the process is at work by then
            enough = partial(lambda moment: answers(tmp_path / "killed") >= moment, moment)
            told = stop(recipe, how, enough, f"run {number}")
            assert how == signal.SIGKILL or "the same command goes on" in told
            assert answers(tmp_path / "killed") < total
        last = total - answers(tmp_path / "killed")
        finish(recipe, "last run")
        # What had been written is never asked again, and all else is, once.
        assert fake.answered_for["last run"] == last
        assert all(fake.answered_for[key] <= number for key, number in missing.items())
        whole = place(tmp_path / "whole", three(fake.url))
        finish(whole)
    assert answers(tmp_path / "killed") == total
    assert tree_bytes(tmp_path / "killed" / "out") == tree_bytes(tmp_path / "whole" / "out")


def test_killed_while_a_model_in_the_process_answers(tmp_path: Path) -> None:
    total = 3 * len(PROMPTS)
    moment = chance().randrange(1, total // 2)
    write_model(tmp_path / "model")
    source = {"name": "a", "model": "../model", "samples": 3, "batch_size": 4, "sampling": {"max_tokens": 30}}
    recipe = place(tmp_path / "killed", [source])
    stop(recipe, signal.SIGKILL, lambda: answers(tmp_path / "killed") >= moment)
    assert moment <= answers(tmp_path / "killed") < total
    finish(recipe)
    finish(place(tmp_path / "whole", [source]))
    assert answers(tmp_path / "killed") == total
    assert tree_bytes(tmp_path / "killed" / "out") == tree_bytes(tmp_path / "whole" / "out")


def test_two_runs_of_one_recipe_do_not_ask_twice(tmp_path: Path) -> None:
    with fake_server() as fake:
        fake.on_request = lambda text: time.sleep(0.05)
        recipe = place(tmp_path, served(fake.url)[:1])
        with start(recipe) as first:
            until = time.monotonic() + 600
            while answers(tmp_path) < 1:
                assert time.monotonic() < until
                time.sleep(0.01)
            second = run(recipe.parent, "distill", "sample", recipe)
            ended = first.end()
    if second.returncode:  # the first one may have been done by then
        assert second.returncode == 1 and "another process" in second.stderr, second.stderr
    assert ended.returncode == 0, ended.stderr
