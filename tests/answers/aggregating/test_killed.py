"""Killed at random moments: a rerun asks only for what was on its way, and its files are of an undisturbed run."""

from __future__ import annotations

import json
import os
import random
import signal
import time
from contextlib import suppress
from functools import partial
from pathlib import Path

import pytest
import yaml

from mergekit_lite.answers.rows import write_rows
from tests.answers.aggregating.aggregates import answer, place, reply
from tests.answers.fake_server import Fake, fake_server
from tests.answers.test_local import write_model
from tests.processes import Ended, Forked, preload, run, started

preload("httpx2", "mergekit_lite.answers.aggregating.answering")

PROMPTS = [{"id": f"p{number}", "prompt": f"question {'again ' * (number % 5)}{number}"} for number in range(8)]
LAYERS = [
    {"step": "generate", "model": ["a", "b"], "samples": 2},
    {"step": "rank", "model": "a", "keep": 3},
    {"step": "fuse", "model": "b", "window": 2},
]
TOTAL = len(PROMPTS) * (4 + 1 + 2)
FILES = ("answers.jsonl", "answers.steps.jsonl", "answers.rows.jsonl")
COMMAND = ("answer", "prompts.jsonl", "--recipe", "recipe.yml", "-o", "answers.jsonl", "--rows")


def use_key(key: str) -> None:
    """Servers get it with each request."""
    os.environ["OPENAI_API_KEY"] = key


def replies(folder: Path) -> int:
    found = 0
    for path in folder.glob("answers.steps*.jsonl"):
        with suppress(FileNotFoundError):  # finished meanwhile
            found += path.read_bytes().count(b"\n")
    return found


def stop(process: Forked, how: signal.Signals, folder: Path, moment: int) -> Ended:
    until = time.monotonic() + 600
    while replies(folder) < moment:
        assert process.running and time.monotonic() < until, "too late"
        time.sleep(0.002)
    process.send(how)
    return process.end()


def test_killed_while_servers_are_asked(tmp_path: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    drawn = random.Random(seed)
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    with fake_server(Fake(reply=reply)) as fake:
        for folder in (killed, whole):
            place(folder, fake.url, LAYERS, PROMPTS)
            path = folder / "recipe.yml"
            content = yaml.safe_load(path.read_text())
            path.write_text(yaml.safe_dump({**content, "models": [{**m, "concurrency": 3} for m in content["models"]]}))
        fake.on_request = lambda text: time.sleep(drawn.uniform(0.002, 0.01))
        missing = {}  # by run: how many replies there were not when it began
        for number, moment in enumerate(sorted(drawn.sample(range(1, TOTAL - 25), 2))):
            missing[f"run {number}"] = TOTAL - replies(killed)
            how = signal.SIGINT if number == 1 else signal.SIGKILL
            with started(killed, *COMMAND, before=partial(use_key, f"run {number}")) as process:
                told = stop(process, how, killed, max(moment, replies(killed) + 1)).stderr
            assert how == signal.SIGKILL or "the same command goes on" in told
            assert not (killed / "answers.jsonl").exists()
        last = TOTAL - replies(killed)
        ended = run(killed, *COMMAND, before=partial(use_key, "last run"))
        assert ended.returncode == 0, ended.stderr
        assert fake.answered_for["last run"] == last < TOTAL
        assert all(fake.answered_for[key] <= number for key, number in missing.items())
        fake.on_request = lambda text: None
        assert answer(whole / "recipe.yml", "--rows")[0] == 0
    assert sorted(path.name for path in killed.iterdir()) == sorted([*FILES, "prompts.jsonl", "recipe.yml"])
    for name in FILES:
        assert (killed / name).read_bytes() == (whole / name).read_bytes()


@pytest.mark.slow
def test_killed_while_models_in_the_process_answer(tmp_path: Path) -> None:
    moment = random.randrange(1, 25)
    print(f"moment {moment}")
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", seed=1)
    common = {"batch_size": 4, "dtype": "float32", "device": "cpu", "sampling": {"max_tokens": 12}}
    models = [{"name": name, "model": f"../{name}", **common} for name in "ab"]
    layers = [LAYERS[0], {"step": "fuse", "model": "b", "window": 2}]
    for folder in (tmp_path / "killed", tmp_path / "whole"):
        folder.mkdir()
        write_rows(folder / "prompts.jsonl", PROMPTS)
        (folder / "recipe.yml").write_text(yaml.safe_dump({"models": models, "layers": layers}))
    with started(tmp_path / "killed", *COMMAND) as process:
        stop(process, signal.SIGKILL, tmp_path / "killed", moment)
    assert moment <= replies(tmp_path / "killed") < len(PROMPTS) * (4 + 3)
    for folder in ("killed", "whole"):
        code, told, error = answer(tmp_path / folder / "recipe.yml", "--rows", "--json")
        assert code == 0, error
    assert json.loads(told)["asked"] == {"a": len(PROMPTS) * 2, "b": len(PROMPTS) * (2 + 3)}
    for name in FILES:
        assert (tmp_path / "killed" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()
