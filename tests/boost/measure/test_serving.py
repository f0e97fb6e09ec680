"""A server of the user's own over each candidate: started, asked, stopped, and nothing left of it."""

from __future__ import annotations

import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from io import BytesIO
from pathlib import Path
from typing import Any
from urllib.request import Request as HttpRequest

import pytest

from mergekit_lite.answers import serving
from mergekit_lite.answers.serving import _free_port
from mergekit_lite.boosting.boosting import search_and_write
from mergekit_lite.boosting.evaluators import evaluator_of
from mergekit_lite.boosting.request import Request, prepare
from mergekit_lite.errors import RunError, UsageError
from tests.boost.end_to_end import write_models, write_prompts
from tests.waiting import is_gone

SERVER = shlex.join([sys.executable, str(Path(__file__).parents[1] / "serving.py")]) + " {model} {port}"
WORDS = "function:tests.boost.end_to_end:spaces"


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("models")
    write_models(root)
    write_prompts(root, 8)
    return root


def request_of(models: Path, output: Path, how: str = "", **options: Any) -> Request:
    usual = {"serve_command": f"{SERVER} {how}".strip(), "limits": ("growth=none", "repetition=none")}
    return Request(
        output=output, sft=str(models / "sft"), aligned=str(models / "dpo"),
        prompts=(models / "prompts.jsonl",), **{"scores": (WORDS,), **usual, **options},
    )  # fmt: skip


def test_each_candidate_is_served_and_removed(models: Path, tmp_path: Path) -> None:
    request = request_of(models, tmp_path / "out", search="grid", grid={"alpha": (0.5, 1.0)})
    boosted = search_and_write(prepare(request))
    assert boosted.result.chosen == {"alpha": 1.0}
    assert [point.gain.mean for point in boosted.result.points] == [2.0, 4.0]
    assert boosted.result.points[0].facts["effective"] == pytest.approx(0.5, abs=1e-4)
    ledger = (tmp_path / "out.boost" / "candidates" / "alpha=0.5.jsonl").read_text().splitlines()
    rows = {row["item"]: row for row in map(json.loads, ledger)}
    assert rows["q1"]["text"] == "What is 1? alpha 0.5 word word" and rows["q1"]["tokens"] == 7
    assert not (tmp_path / "out.boost" / "serving").exists()


def test_several_servers_share_the_prompts_and_change_nothing(models: Path, tmp_path: Path) -> None:
    """Three servers over each candidate: each one answers to its own name, and the rows are those of one server."""
    rows = {}
    for servers in (1, 3):
        (tmp_path / str(servers)).mkdir()
        request = request_of(
            models, tmp_path / str(servers) / "out", "counts {number} 0.05", search="grid", grid={"alpha": (1.0,)},
            servers=servers, concurrency=1,
        )  # fmt: skip
        boosted = search_and_write(prepare(request))
        assert boosted.result.chosen == {"alpha": 1.0}
        answered = (tmp_path / str(servers) / "out.boost" / "counts").read_text().split()
        assert set(answered) == {str(number) for number in range(servers)} and len(answered) == 16
        ledger = (tmp_path / str(servers) / "out.boost" / "candidates" / "alpha=1.jsonl").read_text().splitlines()
        rows[servers] = sorted(ledger)
    assert rows[1] == rows[3]


@pytest.mark.parametrize(("place", "groups"), [(place, groups) for groups in (1, 2, 3, 8) for place in range(groups)])
def test_every_group_finds_ports_of_its_own(place: int, groups: int) -> None:
    """Whichever the system gives out: Linux, for instance, even ones."""
    for _ in range(5):
        port = _free_port(place, groups)
        assert port % groups == place and 1024 <= port < 1 << 16


@pytest.mark.slow
def test_groups_of_servers_measure_side_by_side_and_change_nothing(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Two groups of two: four servers with numbers of their own, and the rows of one server."""
    rows = {}
    for parallel, servers in ((1, 1), (2, 2)):
        folder = tmp_path / str(parallel)
        folder.mkdir()
        monkeypatch.setenv("COUNTS", str(folder / "counts"))
        request = request_of(
            models, folder / "out", "counts {number} 0.1", search="grid", grid={"alpha": (1.0, 0.5, 2.0)},
            servers=servers, concurrency=1, parallel=parallel,
        )  # fmt: skip
        boosted = search_and_write(prepare(request))
        assert boosted.result.chosen == {"alpha": 2.0}
        answered = (folder / "counts").read_text().split()
        assert len(answered) == 8 * 4
        assert set(answered) == {str(number) for number in range(parallel * servers)}
        ledgers = (folder / "out.boost" / "candidates").glob("*.jsonl")
        rows[parallel] = {path.name: sorted(path.read_text().splitlines()) for path in ledgers}
        assert not (folder / "out.boost" / "serving").exists()
    assert rows[1] == rows[2]


def test_thoughts_that_a_server_sends_apart_are_guarded_and_not_scored(models: Path, tmp_path: Path) -> None:
    limits = ("growth=none",)
    request = request_of(models, tmp_path / "out", "thinks", search="grid", grid={"alpha": (1.0,)}, limits=limits)
    [point] = search_and_write(prepare(request)).result.points
    assert point.gain.mean == 4.0, "what the function scores has no thoughts"
    assert point.guards.repetition is not None and point.guards.repetition > 0.1, "none in the text"
    assert point.beyond[0].startswith("repetition")
    row = json.loads((tmp_path / "out.boost" / "candidates" / "alpha=1.jsonl").read_text().splitlines()[0])
    assert row["text"].startswith("<think>\nso so so so so so so so\n</think>\n\nWhat is ")


def test_several_servers_need_a_command(models: Path, tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="--servers is the number of servers that --serve-command starts"):
        prepare(request_of(models, tmp_path / "out", serve_command=None, servers=2))


def test_a_server_that_will_not_stop_is_ended_with_all_it_started(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_lite.answers.serving.STOP_SECONDS", 0.2)
    (tmp_path / "out.boost").mkdir()
    with evaluator_of(prepare(request_of(models, tmp_path / "out", "stubborn"))) as evaluator:
        first, *others = evaluator.items
        assert len(list(evaluator.measure({"alpha": 0.0}, evaluator.items, frozenset([first])))) == 1
        one = (tmp_path / "out.boost" / "child").read_text()
        assert len(list(evaluator.measure({"alpha": 0.0}, evaluator.items, frozenset(others)))) == 7
        assert (tmp_path / "out.boost" / "child").read_text() == one  # the same server all the time
    assert is_gone(int((tmp_path / "out.boost" / "child").read_text()))


def test_a_server_is_stopped_when_the_search_fails(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_lite.answers.serving.STOP_SECONDS", 0.2)
    (tmp_path / "out.boost").mkdir()

    def failing(*_: object) -> Iterator[object]:
        raise KeyboardInterrupt

    monkeypatch.setattr("mergekit_lite.boosting.measure.answering.Answering._rows", failing)
    prepared = prepare(request_of(models, tmp_path / "out", "stubborn"))
    with evaluator_of(prepared) as evaluator, pytest.raises(KeyboardInterrupt):
        list(evaluator.measure({"alpha": 0.0}, evaluator.items, frozenset(evaluator.items)))
    assert is_gone(int((tmp_path / "out.boost" / "child").read_text()))
    assert not (tmp_path / "out.boost" / "serving").exists()


# The command, which gives a server that takes no SIGTERM two seconds instead of twenty.
HURRIED = """
from mergekit_lite.answers import serving
from mergekit_lite.commands import start

serving.STOP_SECONDS = 2.0
start()
"""


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_search_that_is_ended_leaves_no_server(models: Path, tmp_path: Path, how: signal.Signals) -> None:
    child = tmp_path / "out.boost" / "child"
    running = subprocess.Popen(
        [sys.executable, "-c", HURRIED, "boost", "sft", "dpo", "--prompts", "prompts.jsonl", "--score", WORDS,
         "-o", str(tmp_path / "out"), "--serve-command", f"{SERVER} stuck"],
        cwd=models, env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[3])}, stderr=subprocess.DEVNULL,
    )  # fmt: skip
    while running.poll() is None and not child.exists():
        time.sleep(0.05)
    running.send_signal(how)
    assert running.wait() == {signal.SIGTERM: 143, signal.SIGKILL: -9}[how]
    assert is_gone(int(child.read_text()))
    assert (tmp_path / "out.boost" / "serving").exists() == (how == signal.SIGKILL)  # the next search removes it


def test_a_server_that_ends_under_way_is_an_error_and_no_verdict(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_lite.answers.server.FIRST_WAIT", 0.01)
    monkeypatch.setattr("mergekit_lite.answers.server.LONGEST_WAIT", 0.02)
    monkeypatch.setattr("mergekit_lite.answers.server.LOST_IN_A_ROW", 4)
    request = request_of(models, tmp_path / "out", "fails", concurrency=1)
    with evaluator_of(prepare(request)) as evaluator, pytest.raises(RunError, match="asked no more"):
        list(evaluator.measure({"alpha": 0.0}, evaluator.items, frozenset(evaluator.items)))


@pytest.mark.parametrize(
    "how, patience, said",
    [
        ("dies", 60.0, "ended with exit code 1 before it was ready. It said:\n  no GPU here"),
        ("silent", 0.5, "not ready"),
    ],
)
def test_a_server_that_does_not_get_ready(
    models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, how: str, patience: float, said: str
) -> None:
    monkeypatch.setattr("mergekit_lite.answers.serving.STOP_SECONDS", 0.5)
    request = request_of(models, tmp_path / "out", how, serve_patience=patience)
    with evaluator_of(prepare(request)) as evaluator, pytest.raises(RunError) as failed:
        list(evaluator.measure({"alpha": 0.0}, evaluator.items, frozenset(evaluator.items)))
    assert said in str(failed.value)
    assert not (tmp_path / "out.boost" / "serving").exists()


@pytest.mark.parametrize(
    "reply",
    [b'{"data": [{"id": "%b"}]}' % (b"x" * serving.LONGEST_REPLY), b"[" * 100_000, b'{"data": []}'],
    ids=["endless", "deep", "empty"],
)
def test_a_list_of_models_that_tells_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, reply: bytes) -> None:
    def say(request: HttpRequest, **_: object) -> BytesIO:
        if request.full_url.endswith("/health"):
            raise OSError("it has none")
        return BytesIO(reply)

    monkeypatch.setattr(serving, "urlopen", say)
    log = tmp_path / "server.log"
    log.write_text("waiting for requests")
    with subprocess.Popen(["cat"], stdin=subprocess.PIPE) as server, pytest.raises(RunError, match="nothing sound"):
        serving._wait(server, "http://localhost/v1", "m", 0.1, log)


@pytest.mark.parametrize(
    "command, said",
    [
        ("vllm serve", "lacks {model} and {port}"),
        ("no-such-program {model} {port}", "no program 'no-such-program'"),
        ("'unclosed {model} {port}", "No closing quotation"),
    ],
)
def test_commands_that_can_not_be_are_refused(models: Path, tmp_path: Path, command: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        prepare(request_of(models, tmp_path / "out", serve_command=command))
    assert said in str(refused.value)
