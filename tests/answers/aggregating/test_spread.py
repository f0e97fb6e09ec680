"""Models of an aggregate that answer on the machines of a Ray cluster: the bytes of a run without, whoever dies."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import yaml

from mergekit_lite.answers.asking import Sampling, Task
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.rows import Answer, Prompt, write_rows
from mergekit_lite.answers.spreading import Crews
from mergekit_lite.engine.ray_workers import Cluster
from tests.answers.aggregating.aggregates import answer, place, reply, rows
from tests.answers.aggregating.test_killed import FILES, PROMPTS, replies
from tests.answers.fake_server import Fake, fake_server
from tests.answers.test_local import tasks_of, write_model
from tests.ray_nodes import RayNodes, end_group, wait_for

COMMAND = ("answer", "prompts.jsonl", "--recipe", "recipe.yml", "-o", "answers.jsonl", "--rows")
LAYERS = [
    {"step": "generate", "model": ["a", "b"], "samples": 2},
    {"step": "fuse", "model": "b", "window": 2},
]


def folder_of(path: Path, models: list[dict[str, Any]]) -> Path:
    """A folder with prompts and a recipe."""
    path.mkdir()
    write_rows(path / "prompts.jsonl", PROMPTS)
    (path / "recipe.yml").write_text(yaml.safe_dump({"models": models, "layers": LAYERS}))
    return path


def in_process(**sampling: Any) -> list[dict[str, Any]]:
    common = {"batch_size": 4, "dtype": "float32", "device": "cpu", "sampling": {"max_tokens": 48, **sampling}}
    return [{"name": name, "model": f"../{name}", **common} for name in "ab"]


@dataclass
class Backwards:
    """A cluster whose workers are here, and that does the last task first."""

    rounds: int = 0

    def run(self, tasks: Any, worker: Any) -> Iterator[Any]:
        self.rounds += 1
        do = worker()
        return (do(task) for task in reversed(tasks))


def test_batches_are_those_of_one_process(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = write_model(tmp_path / "model")
    tasks = [*tasks_of(), Task(Prompt("empty", ()), 0, 1)]  # the template refuses the last one
    wanted = frozenset(task.key for task in tasks[1:])

    def local() -> Local:
        return Local("a", str(model), Sampling(max_tokens=8), batch_size=4, device="cpu", dtype="float32")

    cluster, opened = Backwards(), []

    @contextmanager
    def workers(ray: str | Cluster | None, device: str, threads: int) -> Iterator[Any]:
        opened.append((ray, device, threads))
        yield cluster

    monkeypatch.setattr("mergekit_lite.answers.spreading.workers_of", workers)
    plain, spread = local(), local()
    with Crews("local:2") as crews:
        found = list(crews.answers(spread, "cpu", tasks, wanted))
        assert list(crews.answers(spread, None, tasks, frozenset())) == []
        assert list(crews.answers(local(), None, tasks, wanted)) == found
    assert opened == [("local:2", "cpu", 1)] and cluster.rounds == 2
    expected = list(plain.answers(tasks, wanted))

    def by_key(answers: list[Answer]) -> list[Answer]:
        return sorted(answers, key=lambda each: each.key)

    assert by_key(found) == by_key(expected) and found != expected
    assert spread.failures.lost == plain.failures.lost


def test_what_can_not_be_spread_is_said_before_anything_runs(tmp_path: Path) -> None:
    with fake_server(Fake(reply=reply)) as fake:
        recipe = place(tmp_path, fake.url, [{"step": "generate", "model": ["a"]}])
        code, _, error = answer(recipe, "--ray", "somewhere")
        assert code == 2 and "--ray somewhere: expected auto" in error and not fake.bodies
        code, _, error = answer(recipe, "--ray", "local:2", "--dry-run")
        assert code == 0 and "nothing is spread over machines" in error and not fake.bodies
        code, _, error = answer(recipe, "--ray", "local:2")
        assert code == 0 and "nothing is spread over machines" in error
        assert [row["response"] for row in rows(tmp_path / "answers.jsonl")]


@contextmanager
def running(folder: Path, address: str) -> Iterator[subprocess.Popen[str]]:
    """Give the command as it answers on a cluster, once it has some replies; it ends with the context."""
    process = subprocess.Popen(
        [sys.executable, "-m", "mergekit_lite", *COMMAND, "--ray", address, "-q"],
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        before = replies(folder)
        wait_for(lambda: process.poll() is not None or replies(folder) > before)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        end_group(process)
        process.communicate()


def ended(draw: Any) -> Any:
    """A model's draw as one that it ended by itself."""
    return lambda *given: (made := draw(*given))._replace(answer=replace(made.answer, finish="stop"))


def workers_under(host: int) -> list[psutil.Process]:
    """The workers of a cluster of this machine, of which ``host`` started the nodes."""
    found = []
    for process in psutil.Process(host).children(recursive=True):
        try:
            if re.match(r"ray::RayWorker", " ".join(process.cmdline())):
                found.append(process)
        except psutil.Error:
            pass
    return found


@pytest.mark.slow
def test_whoever_dies_the_bytes_are_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A worker is killed, then a machine, then the driver; the last run goes on without a cluster or with one."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_model(tmp_path / "a")
    write_model(tmp_path / "b", seed=1)
    models = in_process(temperature=0.7)
    plain = folder_of(tmp_path / "plain", models)
    assert answer(plain / "recipe.yml", "--rows")[0] == 0
    with RayNodes(3) as nodes:
        lost = folder_of(tmp_path / "lost", models)
        with running(lost, nodes.address) as process:
            for worker in workers_under(nodes.host)[:1]:
                worker.kill()
            nodes.kill()
            _, error = process.communicate(timeout=600)
        assert process.returncode == 0, error
        assert "Traceback" not in error
        killed = [folder_of(tmp_path / name, models) for name in ("killed", "again")]
        for folder in killed:
            with running(folder, nodes.address) as process:
                os.kill(process.pid, signal.SIGKILL)
        assert answer(killed[0] / "recipe.yml", "--rows")[0] == 0
        with running(killed[1], nodes.address) as process:
            assert process.wait(600) == 0, process.communicate()
    for folder in (lost, *killed):
        for name in FILES:
            assert (folder / name).read_bytes() == (plain / name).read_bytes(), (folder, name)


def test_a_model_that_says_nothing_is_asked_by_another_seed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model in this process, which nobody else asks again; by a greedy one it would be the same."""
    write_model(tmp_path / "a")
    real, mute = Local._decoded, {"left": 0}

    def decoded(self: Local, work: Any, tokens: list[int]) -> str:
        mute["left"] -= 1
        return "" if mute["left"] >= 0 else real(self, work, tokens)

    monkeypatch.setattr(Local, "_decoded", decoded)
    monkeypatch.setattr(Local, "_draw", ended(Local._draw))
    for temperature, blank, code in ((0.7, 1, 0), (0.7, 99, 1), (0.0, 1, 1)):
        model = {**in_process(temperature=temperature)[0], "name": "a", "model": "../a"}
        folder = folder_of(tmp_path / f"{temperature}-{blank}", [model])
        layers = [{"step": "generate", "model": "a", "samples": 2}, {"step": "fuse", "model": "a"}]
        recipe = {"models": [model], "layers": layers}
        (folder / "recipe.yml").write_text(yaml.safe_dump(recipe))
        mute["left"] = blank
        ended_with, _, error = answer(folder / "recipe.yml")
        assert ended_with == code, error
        tries = 1 if temperature == 0 else 3 if blank == 99 else 2
        steps = [row for path in folder.glob("answers.steps*") for row in rows(path)]
        drafts, fusions = 2 * len(PROMPTS), 0 if code else len(PROMPTS)
        assert len(steps) == drafts + (drafts if blank == 99 else 1) * (tries - 1) + fusions
        plan = json.loads(answer(folder / "recipe.yml", "--dry-run", "--json")[1])["models"][0]
        assert plan["done"] == len(steps)
        assert plan["calls"] == len(steps) + (0 if blank == 99 else len(PROMPTS) - fusions)  # one draft is enough there
        if code:
            assert "a reply that is blank" in error and "another seed" in error
