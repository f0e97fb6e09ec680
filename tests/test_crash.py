"""Kills, full disks, damaged and changing inputs.

Nothing unfinished ever bears the output's name, and a resumed run ends with the bytes of one that was never stopped.
"""

from __future__ import annotations

import json
import os
import random
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.models import State, read_folder, tree_bytes, tuned, write_folder

KILLS = 20
COMMAND = [
    sys.executable,
    "-m",
    "mergekit_lite",
    "extrapolate",
    "sft",
    "dpo",
    "--alpha",
    "0.3",
    "--rounding",
    "stochastic",
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair of models big enough for a run to be hit anywhere, and the output of an undisturbed run."""
    folder = tmp_path_factory.mktemp("crash")
    generator = torch.Generator().manual_seed(0)
    sft: State = {
        f"model.layers.{n}.mlp.up_proj.weight": (torch.randn(3000, 1100, generator=generator) * 0.02).bfloat16()
        for n in range(12)
    }
    sft |= {"model.norm.weight": torch.ones(1100).bfloat16(), "ids": torch.arange(5)}
    write_folder(folder / "sft", sft, shards=2)
    write_folder(folder / "dpo", tuned(sft, 1, rms=1e-4) | {"ids": sft["ids"]}, shards=3)
    (folder / "dpo" / "tokenizer.json").write_text("{}")
    run(folder, "whole")
    return folder


def run(place: Path, output: str, *options: str, **how: object) -> subprocess.CompletedProcess[str]:
    """The command as a real process."""
    return subprocess.run(
        [*COMMAND, "-o", output, *options], cwd=place, capture_output=True, text=True, check=False, **how
    )


def same_as_whole(place: Path, output: str) -> bool:
    """Whether a folder has the bytes of the undisturbed run, but for its own name in the card's title."""
    trees = [tree_bytes(place / name) for name in ("whole", output)]
    cards = [
        tree.pop("README.md").decode().replace(f"# {name}\n", "")
        for tree, name in zip(trees, ("whole", output), strict=True)
    ]
    return trees[0] == trees[1] and cards[0] == cards[1]


def wait_for_spans(place: Path, output: str, count: int) -> None:
    """Wait until a running process has journalled some spans."""
    journal = place / f".{output}.partial" / "journal.jsonl"
    until = time.monotonic() + 60
    while not (journal.exists() and journal.read_bytes().count(b"\n") > count):
        assert time.monotonic() < until, "the run journals nothing"
        time.sleep(0.002)


def test_killed_at_random_moments_and_resumed(place: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    started = time.monotonic()
    run(place, "timed")
    duration = time.monotonic() - started
    unfinished = 0
    for number in range(KILLS):
        output = f"killed-{number}"
        process = subprocess.Popen(
            [*COMMAND, "-o", output, "--threads", "1"], cwd=place, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
        )
        if number % 2:  # half of the kills anywhere, half while weights are being written
            wait_for_spans(place, output, chance.randrange(12))
            time.sleep(chance.uniform(0, 0.03))
        else:
            time.sleep(chance.uniform(0, 1.2 * duration))
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (place / output).exists() or same_as_whole(place, output)
        if (place / f".{output}.partial").exists():
            unfinished += 1
        resumed = run(place, output, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert same_as_whole(place, output)
        assert not (place / f".{output}.partial").exists()
    assert unfinished >= KILLS // 3


def test_an_unfinished_run_is_not_started_over_by_mistake(place: Path) -> None:
    interrupted(place, "again")
    again = run(place, "again")
    assert again.returncode == 2
    assert "--resume" in again.stderr and "--force" in again.stderr
    assert run(place, "again", "--force").returncode == 0
    assert same_as_whole(place, "again")


def test_resuming_what_is_finished_does_nothing(place: Path) -> None:
    run(place, "done")
    before = (place / "done" / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    again = run(place, "done", "--resume", "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["outputs"][0]["merged"] == 13
    assert (place / "done" / "model-00001-of-00003.safetensors").stat().st_mtime_ns == before


def interrupted(place: Path, output: str) -> None:
    """Leave an unfinished run of some spans."""
    process = subprocess.Popen([*COMMAND, "-o", output, "--threads", "1"], cwd=place, stderr=subprocess.DEVNULL)
    wait_for_spans(place, output, 3)
    process.kill()
    process.wait()
    assert not (place / output).exists()


def test_ctrl_c_stops_at_once_and_tells_how_to_go_on(place: Path) -> None:
    process = subprocess.Popen([*COMMAND, "-o", "stopped"], cwd=place, stderr=subprocess.PIPE, text=True)
    wait_for_spans(place, "stopped", 2)
    process.send_signal(signal.SIGINT)
    _, told = process.communicate(timeout=20)
    if process.returncode == 0:  # it was through before the signal came
        assert same_as_whole(place, "stopped")
        return
    assert process.returncode == 1
    assert "--resume" in told and "Traceback" not in told
    assert run(place, "stopped", "--resume").returncode == 0
    assert same_as_whole(place, "stopped")


def test_damaged_work_is_done_again(place: Path) -> None:
    """As after a power cut: the journal is on the disk, some of the data it tells of is not."""
    interrupted(place, "power")
    shard = place / ".power.partial" / "result" / "model-00001-of-00003.safetensors"
    with shard.open("r+b") as file:
        file.seek(5000)
        file.write(bytes(100_000))
    journal = place / ".power.partial" / "journal.jsonl"
    journal.write_bytes(journal.read_bytes() + b'[1, 2, {"torn')
    assert run(place, "power", "--resume").returncode == 0
    assert same_as_whole(place, "power")


def test_changed_inputs_are_not_resumed(place: Path, tmp_path: Path) -> None:
    for name in ("sft", "dpo"):
        subprocess.run(["cp", "-rp", place / name, tmp_path / name], check=True)
    interrupted(tmp_path, "out")
    shard = tmp_path / "dpo" / "model-00001-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused = run(tmp_path, "out", "--resume")
    assert refused.returncode == 1
    assert "inputs that changed" in refused.stderr and "model-00001-of-00003" in refused.stderr
    other = run(tmp_path, "out", "--resume", "--seed", "3")
    assert other.returncode == 1
    assert run(tmp_path, "out", "--force").returncode == 0


def test_two_runs_on_one_output(place: Path) -> None:
    first = subprocess.Popen([*COMMAND, "-o", "shared", "--threads", "1"], cwd=place, stderr=subprocess.DEVNULL)
    wait_for_spans(place, "shared", 0)
    first.send_signal(signal.SIGSTOP)
    second = run(place, "shared", "--resume")
    first.send_signal(signal.SIGCONT)
    first.wait()
    assert second.returncode == 1
    assert "another process" in second.stderr
    assert same_as_whole(place, "shared")


NO_RESERVE = "import mergekit_lite.output.target as t; t._reserve = lambda *_: None; "
MAIN = "import sys; from mergekit_lite.commands import start; sys.argv[0] = 'mergekit-lite'; start()"


@pytest.mark.parametrize("moment", ["at the start", "under way"])
def test_no_room_is_told_and_the_journal_kept(place: Path, moment: str) -> None:
    """A file that may not grow beyond 20 MB: told when its room is reserved, or else when the limit is hit."""
    output = f"full-{moment[-3:]}"
    code = (NO_RESERVE if moment == "under way" else "") + MAIN
    limit = 20_000_000

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))

    arguments = [sys.executable, "-c", code, *COMMAND[3:], "-o", output, "--shard-size", "1GB", "--threads", "1"]
    failed = subprocess.run(arguments, cwd=place, capture_output=True, text=True, preexec_fn=limited, check=False)
    assert failed.returncode == 1
    assert "ulimit -f" in failed.stderr and "Traceback" not in failed.stderr
    assert not (place / output).exists()
    assert (place / f".{output}.partial" / "journal.jsonl").exists()
    assert run(place, output, "--shard-size", "1GB", "--resume").returncode == 0
    whole, got = read_folder(place / "whole"), read_folder(place / output)
    assert all(torch.equal(whole[name], got[name]) for name in whole)


def test_an_input_cut_short_under_way(place: Path, tmp_path: Path) -> None:
    for name in ("sft", "dpo"):
        subprocess.run(["cp", "-r", place / name, tmp_path / name], check=True)
    process = subprocess.Popen(
        [*COMMAND, "-o", "out", "--threads", "1"], cwd=tmp_path, stderr=subprocess.PIPE, text=True
    )
    wait_for_spans(tmp_path, "out", 1)
    process.send_signal(signal.SIGSTOP)
    os.truncate(tmp_path / "sft" / "model-00002-of-00002.safetensors", 10_000)
    process.send_signal(signal.SIGCONT)
    _, told = process.communicate(timeout=60)
    assert process.returncode == 1
    assert "model-00002-of-00002.safetensors" in told and "Traceback" not in told
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "journal.jsonl").exists()


def test_an_input_that_can_not_be_read(place: Path, tmp_path: Path) -> None:
    """A folder where a shard should be: unreadable for everybody, root too."""
    for name in ("sft", "dpo"):
        subprocess.run(["cp", "-r", place / name, tmp_path / name], check=True)
    shard = tmp_path / "sft" / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.mkdir()
    failed = run(tmp_path, "out")
    assert failed.returncode == 1
    assert "model-00002-of-00002.safetensors" in failed.stderr and "Traceback" not in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo", "sft"]


@pytest.mark.parametrize("output", ["sft", "dpo/inside", "../{name}", "dpo/model-00001-of-00003.safetensors"])
def test_outputs_that_would_touch_an_input(place: Path, output: str) -> None:
    before = {name: (place / name).stat().st_mtime_ns for name in ("sft", "dpo")}
    for options in ((), ("--force",)):
        refused = run(place, output.format(name=place.name), *options)
        assert refused.returncode == 2, refused.stderr
        assert "Inputs are never touched" in refused.stderr
    assert before == {name: (place / name).stat().st_mtime_ns for name in ("sft", "dpo")}


def test_an_existing_output_is_replaced_only_when_asked(place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "precious.txt").write_text("x")
    refused = run(place, "mine")
    assert refused.returncode == 2 and "--force" in refused.stderr
    assert (place / "mine" / "precious.txt").read_text() == "x"
    assert run(place, "mine", "--force").returncode == 0
    assert same_as_whole(place, "mine")


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("slerp", "{t: 0.3}"), ("ties", "{weight: 1, density: 0.4, trim: global}"), ("varm", "{granularity: tensor}")],
)
def test_a_killed_merge_resumes_to_the_same_bytes(place: Path, method: str, parameters: str) -> None:
    """Statistics are gathered again for what is left to do; coefficients of what was done are in the journal."""
    models = "base_model: sft\nmodels: [{model: dpo}]"
    (place / f"{method}.yml").write_text(f"merge_method: {method}\n{models}\nparameters: {parameters}\n")
    command = [sys.executable, "-m", "mergekit_lite", "merge", f"{method}.yml", "-o"]
    subprocess.run([*command, f"{method}-whole"], cwd=place, check=True, capture_output=True)
    process = subprocess.Popen([*command, method, "--threads", "1"], cwd=place, stderr=subprocess.DEVNULL)
    wait_for_spans(place, method, 3)
    process.kill()
    process.wait()
    assert not (place / method).exists()
    subprocess.run([*command, method, "--resume"], cwd=place, check=True, capture_output=True)
    whole, got = (tree_bytes(place / name) for name in (f"{method}-whole", method))
    for tree in (whole, got):
        tree.pop("README.md")
    assert whole == got


def test_vectors_killed_while_they_are_made_or_applied(place: Path) -> None:
    """Nothing bears the name of an unfinished vector; an interrupted apply goes on to the same bytes."""
    command = [sys.executable, "-m", "mergekit_lite", "vector"]

    def vector(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *arguments], cwd=place, capture_output=True, text=True, check=False)

    assert vector("extract", "sft", "dpo", "-o", "v.safetensors").returncode == 0
    making = subprocess.Popen([*command, "extract", "sft", "dpo", "-o", "k.safetensors"], cwd=place)
    until = time.monotonic() + 60
    while not (place / ".k.safetensors.partial" / "result" / "k.safetensors").exists():
        assert time.monotonic() < until and making.poll() is None
        time.sleep(0.002)
    making.kill()
    making.wait()
    assert not (place / "k.safetensors").exists()
    told = vector("extract", "sft", "dpo", "-o", "k.safetensors")
    assert told.returncode == 2 and "--resume goes on with it, --force starts over" in told.stderr
    assert vector("extract", "sft", "dpo", "-o", "k.safetensors", "--resume").returncode == 0
    assert (place / "k.safetensors").read_bytes() == (place / "v.safetensors").read_bytes()
    options = ["-o", "applied", "--threads", "1"]
    applying = subprocess.Popen([*command, "apply", "sft", "v.safetensors", *options], cwd=place)
    wait_for_spans(place, "applied", 3)
    applying.kill()
    applying.wait()
    assert not (place / "applied").exists()
    assert vector("apply", "sft", "v.safetensors", "-o", "applied", "--resume").returncode == 0
    made, wanted = read_folder(place / "applied"), read_folder(place / "dpo")
    assert made.keys() == wanted.keys() and all(torch.equal(made[name], wanted[name]) for name in wanted)
