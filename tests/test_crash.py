"""Kills, full disks, damaged and changing inputs.

Nothing unfinished ever bears the output's name, and a resumed run ends with the bytes of one that was never stopped.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import random
import resource
import shutil
import signal
import sys
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

from mergekit_lite.commands import main
from mergekit_lite.output import file_writer, renames
from mergekit_lite.output.workspace import OutputWorkspace, manifest_path
from tests import every_change
from tests.faults import FaultyProcess
from tests.models import State, read_folder, state, tree_bytes, tuned, write_folder
from tests.processes import Ended, run, started, wait_for_spans

KILLS = 4
SPANS = 12
PAIR = ("extrapolate", "sft", "dpo", "--alpha", "0.3", "--rounding", "stochastic")
SLOWLY = ("--threads", "1")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair of models big enough for a run to be hit anywhere, and the output of an undisturbed run."""
    generator = torch.Generator().manual_seed(0)
    sft: State = {
        f"model.layers.{n}.mlp.up_proj.weight": (torch.randn(1000, 1100, generator=generator) * 0.02).bfloat16()
        for n in range(SPANS)
    }
    sft |= {"model.norm.weight": torch.ones(1100).bfloat16()}
    return undisturbed(tmp_path_factory.mktemp("crash"), sft)


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same with models that take no time."""
    folder = undisturbed(tmp_path_factory.mktemp("small"), state(0, layers=1))
    assert made(folder, "whole.safetensors").returncode == 0
    return folder


def undisturbed(folder: Path, sft: State) -> Path:
    """Write the pair, and make ``whole`` of it."""
    sft = sft | {"ids": torch.arange(5)}
    write_folder(folder / "sft", sft, shards=2)
    write_folder(folder / "dpo", tuned(sft, 1, rms=1e-4) | {"ids": sft["ids"]}, shards=3)
    (folder / "dpo" / "tokenizer.json").write_text("{}")
    assert made(folder, "whole").returncode == 0
    return folder


def made(place: Path, output: str, *options: str) -> Ended:
    """The command in this process and a folder, from its start to its end: what needs no kill needs no new process."""
    before = Path.cwd()
    os.chdir(place)
    try:
        ended = invoked(*PAIR, "-o", output, *options)
    finally:
        os.chdir(before)
    return Ended(ended.exit_code, ended.stdout, ended.output)


def same_as_whole(place: Path, output: str) -> bool:
    """Whether a folder or file has the bytes of the undisturbed run, but for its own name in the card's title."""
    whole = "whole" + Path(output).suffix
    if (place / output).is_file():
        return (place / whole).read_bytes() == (place / output).read_bytes()
    trees = [tree_bytes(place / name) for name in (whole, output)]
    cards = [
        tree.pop("README.md").decode().replace(f"# {name}\n", "")
        for tree, name in zip(trees, (whole, output), strict=True)
    ]
    return trees[0] == trees[1] and cards[0] == cards[1]


@pytest.fixture(scope="module")
def faulty(tmp_path_factory: pytest.TempPathFactory) -> Iterator[FaultyProcess]:
    """A process in which calls to the system can be hit."""
    with FaultyProcess(tmp_path_factory.mktemp("faults")) as process:
        yield process


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with pairs of models, a folder each and a file each, whose merge makes few calls to the system."""
    place = tmp_path_factory.mktemp("tiny")
    generator = torch.Generator().manual_seed(0)
    sft = {f"model.layers.0.{name}.weight": torch.randn(8, 8, generator=generator).bfloat16() for name in "ab"}
    for name, tensors, shards in (("sft", sft, 1), ("dpo", tuned(sft, 1), 2)):
        write_folder(place / name, tensors, shards)
        torch.save(tensors, place / f"{name}.pt")
    (place / "dpo" / "tokenizer.json").write_text("{}")
    return place


@pytest.mark.skipif(sys.platform != "linux", reason="calls are hit by LD_PRELOAD")
@pytest.mark.parametrize(
    ("kind", "start", "ways"),
    [
        *((kind, start, "") for kind in every_change.KINDS for start in every_change.STARTS),
        ("folder", "old", "sync"),
        ("folder", "old", "without renameat2"),
        ("safetensors", "old", "without renameat2"),
        *(
            pytest.param(kind, start, "all remedies", marks=pytest.mark.slow)
            for kind in every_change.KINDS
            for start in every_change.STARTS
        ),
    ],
)
def test_every_change_of_the_disk_may_fail_or_be_the_last(
    faulty: FaultyProcess, tiny: Path, kind: str, start: str, ways: str
) -> None:
    """What stands is as it was or new, errors have one line, and each remedy ends with the right bytes."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    proved = faulty.call(every_change.prove, str(tiny), kind, start, seed, ways)
    assert proved["stops"] > 25 and proved["faults"] > proved["stops"] and proved["states"] > 10, proved


def invoked(*arguments: str) -> Result:
    """The command in this process, with one worker."""
    workers = SLOWLY if arguments[0] != "verify" else ()
    ended = CliRunner().invoke(main, [*arguments, *workers])
    assert ended.exception is None or isinstance(ended.exception, SystemExit), ended.exc_info
    return ended


def remove(place: Path, output: str) -> None:
    """Remove an output and what is left beside it."""
    for path in (place / name for name in (output, f".{output}.partial", f"{output}.manifest.json")):
        if path.is_dir():
            shutil.rmtree(path)
        path.unlink(missing_ok=True)


@pytest.mark.parametrize("output", ["stuck", "stuck.safetensors"])
def test_what_was_replaced_and_not_yet_removed_hinders_no_later_run(
    small: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    monkeypatch.chdir(small)
    assert invoked(*PAIR, "-o", output).exit_code == 0
    for options in (["--force"], ["--resume", "--force"]):
        (small / f".{output}.partial").mkdir(mode=0o700)
        (small / f".{output}.partial" / "replaced" / "inner").mkdir(parents=True)
        assert invoked(*PAIR, "--seed", str(len(options)), "-o", output, *options).exit_code == 0
        assert not (small / f".{output}.partial").exists()
    remove(small, output)


@pytest.mark.parametrize("output", ["told", "told.safetensors"])
def test_a_manifest_beside_other_bytes_makes_no_output_finished(
    small: Path, monkeypatch: pytest.MonkeyPatch, output: str
) -> None:
    """As a run could leave that was killed between its two renames; sizes and headers are the same."""
    monkeypatch.chdir(small)
    assert invoked(*PAIR, "-o", output).exit_code == 0
    manifest = manifest_path(small / output)
    described = manifest.read_bytes()
    assert invoked(*PAIR, "--alpha", "0.9", "-o", output, "--force").exit_code == 0
    manifest.write_bytes(described)
    ended = invoked(*PAIR, "-o", output, "--resume")
    assert ended.exit_code == 2 and "--force replaces it" in ended.output and not same_as_whole(small, output)
    assert invoked(*PAIR, "-o", output, "--resume", "--force").exit_code == 0
    assert same_as_whole(small, output)
    remove(small, output)


MINE = b"precious"


def intrude(path: Path, kind: str) -> None:
    """Put something of somebody else's under a name."""
    if kind == "folder":
        path.mkdir()
        (path / "mine").write_bytes(MINE)
    elif kind == "empty folder":
        path.mkdir()
    elif kind == "dangling link":
        path.symlink_to("nowhere")
    else:
        path.write_bytes(MINE)


def is_as_it_was(path: Path, kind: str) -> bool:
    """Whether what ``intrude`` put there is there, and nothing else."""
    if kind == "dangling link":
        return path.is_symlink() and path.readlink() == Path("nowhere")
    if kind == "file":
        return path.read_bytes() == MINE
    return tree_bytes(path) == ({"mine": MINE} if kind == "folder" else {}) and path.is_dir()


INTRUDERS = [
    *(("late", "late", kind) for kind in ("folder", "empty folder", "file", "dangling link")),
    *(("late.safetensors", "late.safetensors", kind) for kind in ("file", "dangling link", "empty folder")),
    ("late.safetensors", "late.safetensors.manifest.json", "file"),
]


NEVER_REPLACED = [("late", "file"), ("late.safetensors", "empty folder")]  # of another kind than the output


@pytest.mark.parametrize("system", ["renameat2", "no renameat2", "no links either"])
@pytest.mark.parametrize(("output", "name", "kind"), INTRUDERS)
def test_what_appears_under_the_name_of_an_output_is_left_alone(
    small: Path, monkeypatch: pytest.MonkeyPatch, system: str, output: str, name: str, kind: str
) -> None:
    """It comes after all is made and right before it is published; the work is kept for both ways out."""

    def refused(*_: object) -> None:
        raise OSError(errno.EINVAL, "not here")

    if system != "renameat2":
        monkeypatch.setattr(renames, "renameat2", refused)
    if system == "no links either":
        monkeypatch.setattr(Path, "hardlink_to", refused)
    monkeypatch.chdir(small)
    publish = OutputWorkspace.publish
    for remedy in ("free", "force"):

        def publish_late(workspace: OutputWorkspace, *, force: bool, sync: bool) -> None:
            intrude(small / name, kind)
            publish(workspace, force=force, sync=sync)

        monkeypatch.setattr(OutputWorkspace, "publish", publish_late)
        ended = invoked(*PAIR, "-o", output)
        assert ended.exit_code == 1 and name in ended.output and "--resume --force" in ended.output
        assert is_as_it_was(small / name, kind)
        assert name == output or not (small / output).exists()
        monkeypatch.setattr(OutputWorkspace, "publish", publish)
        if remedy == "free" or (output, kind) in NEVER_REPLACED:
            renames.remove(small / name)
            ended = invoked(*PAIR, "-o", output, "--resume")
        else:
            ended = invoked(*PAIR, "-o", output, "--resume", "--force")
        assert ended.exit_code == 0, ended.output
        assert same_as_whole(small, output) and invoked("verify", output).exit_code == 0
        assert not (small / f".{output}.partial").exists()
        remove(small, output)


def test_a_manifest_without_its_file_is_not_replaced_unasked(small: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small)
    (small / "lone.safetensors.manifest.json").write_bytes(MINE)
    for options in ([], ["--resume"]):
        ended = invoked(*PAIR, "-o", "lone.safetensors", *options)
        assert ended.exit_code == 2 and "lone.safetensors.manifest.json: exists" in ended.output
    assert (small / "lone.safetensors.manifest.json").read_bytes() == MINE
    assert invoked(*PAIR, "-o", "lone.safetensors", "--force").exit_code == 0
    assert same_as_whole(small, "lone.safetensors")
    remove(small, "lone.safetensors")


def test_resuming_tidies_up_after_a_run_that_was_killed_once_it_had_published(small: Path) -> None:
    assert made(small, "tidied").returncode == 0
    (small / ".tidied.partial").mkdir(mode=0o700)
    (small / ".tidied.partial" / "lock").touch()
    assert made(small, "tidied", "--resume").returncode == 0
    assert not (small / ".tidied.partial").exists()


def test_killed_at_random_moments_and_resumed(place: Path) -> None:
    """In the middle of what it does, by turns with one worker and with two."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    unfinished = 0
    for number in range(KILLS):
        output = f"killed-{number}"
        with started(place, *PAIR, "-o", output, "--threads", str(1 + number % 2)) as command:
            wait_for_spans(place, output, chance.randrange(number * SPANS // KILLS, (number + 1) * SPANS // KILLS))
            time.sleep(chance.uniform(0, 0.03))
            command.send(signal.SIGKILL)
            command.end()
        assert not (place / output).exists() or same_as_whole(place, output)
        if (place / f".{output}.partial").exists():
            unfinished += 1
            wait_for_workers(place, output)
        resumed = made(place, output, "--resume")
        assert resumed.returncode == 0, resumed.stderr
        assert same_as_whole(place, output)
        assert not (place / f".{output}.partial").exists()
        shutil.rmtree(place / output)
    assert unfinished >= KILLS // 2


def wait_for_workers(place: Path, output: str) -> None:
    """Wait for the end of a killed process's workers: the system kills them with it, not before it."""
    with (place / f".{output}.partial" / "lock").open() as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)


def test_an_unfinished_run_is_not_started_over_by_mistake(place: Path) -> None:
    interrupted(place, "again")
    again = made(place, "again")
    assert again.returncode == 2
    assert "--resume" in again.stderr and "--force" in again.stderr
    assert made(place, "again", "--force").returncode == 0
    assert same_as_whole(place, "again")


def test_resuming_what_is_finished_does_nothing(place: Path) -> None:
    made(place, "done")
    before = (place / "done" / "model-00001-of-00003.safetensors").stat().st_mtime_ns
    again = made(place, "done", "--resume", "--json")
    assert again.returncode == 0
    assert json.loads(again.stdout)["outputs"][0]["merged"] == 13
    assert (place / "done" / "model-00001-of-00003.safetensors").stat().st_mtime_ns == before


def interrupted(place: Path, output: str) -> None:
    """Leave an unfinished run of some spans."""
    with started(place, *PAIR, "-o", output, *SLOWLY):
        wait_for_spans(place, output, 3)
    assert not (place / output).exists()


def test_ctrl_c_stops_at_once_and_tells_how_to_go_on(place: Path) -> None:
    with started(place, *PAIR, "-o", "stopped") as command:
        wait_for_spans(place, "stopped", 2)
        command.send(signal.SIGINT)
        stopped = command.end()
    if stopped.returncode == 0:  # it was through before the signal came
        assert same_as_whole(place, "stopped")
        return
    assert stopped.returncode == 1
    assert "--resume" in stopped.stderr and "Traceback" not in stopped.stderr
    assert made(place, "stopped", "--resume").returncode == 0
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
    assert made(place, "power", "--resume").returncode == 0
    assert same_as_whole(place, "power")


def test_changed_inputs_are_not_resumed(place: Path, tmp_path: Path) -> None:
    for name in ("sft", "dpo"):
        shutil.copytree(place / name, tmp_path / name)
    interrupted(tmp_path, "out")
    shard = tmp_path / "dpo" / "model-00001-of-00003.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    refused = made(tmp_path, "out", "--resume")
    assert refused.returncode == 1
    assert "inputs that changed" in refused.stderr and "model-00001-of-00003" in refused.stderr
    other = made(tmp_path, "out", "--resume", "--seed", "3")
    assert other.returncode == 1
    assert made(tmp_path, "out", "--force").returncode == 0


def test_two_runs_on_one_output(place: Path) -> None:
    with started(place, *PAIR, "-o", "shared", *SLOWLY) as first:
        wait_for_spans(place, "shared", 0)
        first.send(signal.SIGSTOP)
        second = made(place, "shared", "--resume")
        first.send(signal.SIGCONT)
        first.end()
    assert second.returncode == 1
    assert "another process" in second.stderr
    assert same_as_whole(place, "shared")


def limited(reserving: bool) -> None:
    """Let no file of this process grow beyond 20 MB."""
    if not reserving:
        file_writer._reserve = lambda *_: None
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000_000, 20_000_000))


@pytest.mark.parametrize("moment", ["at the start", "under way"])
def test_no_room_is_told_and_the_journal_kept(place: Path, moment: str) -> None:
    """Told when the room is reserved, or else when the limit is hit."""
    output = f"full-{moment[-3:]}"
    arguments = (*PAIR, "-o", output, "--shard-size", "1GB", *SLOWLY)
    failed = run(place, *arguments, before=partial(limited, moment == "at the start"))
    assert failed.returncode == 1
    assert "ulimit -f" in failed.stderr and "Traceback" not in failed.stderr
    assert not (place / output).exists()
    assert (place / f".{output}.partial" / "journal.jsonl").exists()
    assert made(place, output, "--shard-size", "1GB", "--resume").returncode == 0
    whole, got = read_folder(place / "whole"), read_folder(place / output)
    assert all(torch.equal(whole[name], got[name]) for name in whole)


def test_an_input_cut_short_under_way(place: Path, tmp_path: Path) -> None:
    for name in ("sft", "dpo"):
        shutil.copytree(place / name, tmp_path / name)
    with started(tmp_path, *PAIR, "-o", "out", *SLOWLY) as command:
        wait_for_spans(tmp_path, "out", 1)
        command.send(signal.SIGSTOP)
        os.truncate(tmp_path / "sft" / "model-00002-of-00002.safetensors", 10_000)
        command.send(signal.SIGCONT)
        failed = command.end()
    assert failed.returncode == 1
    assert "model-00002-of-00002.safetensors" in failed.stderr and "Traceback" not in failed.stderr
    assert not (tmp_path / "out").exists()
    assert (tmp_path / ".out.partial" / "journal.jsonl").exists()


def test_an_input_that_can_not_be_read(place: Path, tmp_path: Path) -> None:
    """A folder where a shard should be: unreadable for everybody, root too."""
    for name in ("sft", "dpo"):
        shutil.copytree(place / name, tmp_path / name)
    shard = tmp_path / "sft" / "model-00002-of-00002.safetensors"
    shard.unlink()
    shard.mkdir()
    failed = made(tmp_path, "out")
    assert failed.returncode == 1
    assert "model-00002-of-00002.safetensors" in failed.stderr and "Traceback" not in failed.stderr
    assert sorted(path.name for path in tmp_path.iterdir()) == ["dpo", "sft"]


@pytest.mark.parametrize("output", ["sft", "dpo/inside", "../{name}", "dpo/model-00001-of-00003.safetensors"])
def test_outputs_that_would_touch_an_input(place: Path, output: str) -> None:
    before = {name: (place / name).stat().st_mtime_ns for name in ("sft", "dpo")}
    for options in ((), ("--force",)):
        refused = made(place, output.format(name=place.name), *options)
        assert refused.returncode == 2, refused.stderr
        assert "Inputs are never touched" in refused.stderr
    assert before == {name: (place / name).stat().st_mtime_ns for name in ("sft", "dpo")}


def test_an_existing_output_is_replaced_only_when_asked(place: Path) -> None:
    (place / "mine").mkdir()
    (place / "mine" / "precious.txt").write_text("x")
    refused = made(place, "mine")
    assert refused.returncode == 2 and "--force" in refused.stderr
    assert (place / "mine" / "precious.txt").read_text() == "x"
    assert made(place, "mine", "--force").returncode == 0
    assert same_as_whole(place, "mine")


@pytest.mark.parametrize(
    ("method", "parameters"),
    [("slerp", "{t: 0.3}"), ("ties", "{weight: 1, density: 0.4, trim: global}"), ("varm", "{granularity: tensor}")],
)
def test_a_killed_merge_resumes_to_the_same_bytes(place: Path, method: str, parameters: str) -> None:
    """Statistics are gathered again for what is left to do; coefficients of what was done are in the journal."""
    models = "base_model: sft\nmodels: [{model: dpo}]"
    (place / f"{method}.yml").write_text(f"merge_method: {method}\n{models}\nparameters: {parameters}\n")
    merge = ("merge", f"{method}.yml", "-o")
    assert run(place, *merge, f"{method}-whole").returncode == 0
    with started(place, *merge, method, *SLOWLY):
        wait_for_spans(place, method, 3)
    assert not (place / method).exists()
    assert run(place, *merge, method, "--resume").returncode == 0
    whole, got = (tree_bytes(place / name) for name in (f"{method}-whole", method))
    for tree in (whole, got):
        tree.pop("README.md")
    assert whole == got
