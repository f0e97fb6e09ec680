"""Working folders, journals and names: what a stranger or an accident put there is neither trusted nor destroyed."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import mergekit_lite
from mergekit_lite.errors import RunError, UsageError
from mergekit_lite.output import renames, working_folder
from mergekit_lite.output.workspace import OutputWorkspace, manifest_path
from tests.models import tree_bytes, tuned, write_folder

MINE = b"precious"
PARTIAL = Path(".out.partial")


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a pair of tiny models."""
    place = tmp_path_factory.mktemp("pair")
    generator = torch.Generator().manual_seed(0)
    sft = {f"model.layers.0.{name}.weight": torch.randn(8, 8, generator=generator).bfloat16() for name in "abc"}
    write_folder(place / "sft", sft)
    write_folder(place / "dpo", tuned(sft, 1))
    (place / "dpo" / "tokenizer.json").write_text("{}")
    return place


@pytest.fixture(autouse=True)
def place(pair: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of a test, with links to the pair."""
    for name in ("sft", "dpo"):
        (tmp_path / name).symlink_to(pair / name)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def make(output: str | Path = "out", **options: bool) -> None:
    """Extrapolate."""
    mergekit_lite.extrapolate("sft", "dpo", output, 0.3, threads=1, **options)


def stop(output: str | Path = "out") -> None:
    """Leave an unfinished run of all spans."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(OutputWorkspace, "publish", lambda *_, **__: (_ for _ in ()).throw(InterruptedError))
        with pytest.raises(InterruptedError):
            make(output)


def records() -> list[list[object]]:
    """Return the lines of the journal but the first."""
    return [json.loads(line) for line in (PARTIAL / "journal.jsonl").read_text().splitlines()[1:]]


def rewrite(lines: list[object]) -> None:
    """Write the journal with other lines."""
    head = (PARTIAL / "journal.jsonl").read_text().splitlines()[0]
    (PARTIAL / "journal.jsonl").write_text("".join(f"{line}\n" for line in (head, *map(json.dumps, lines))))


def weights(folder: Path) -> dict[str, bytes]:
    """Return the bytes of a folder's files but the card's, which has the folder's name."""
    return {name: content for name, content in tree_bytes(folder).items() if name != "README.md"}


# What lies in the working folder


@pytest.mark.parametrize(
    "name",
    ["lock", "journal.jsonl", "journal.new", "result/model.safetensors", "result/config.json", "result/README.md"],
)
@pytest.mark.parametrize("kind", ["link", "FIFO", "folder"])
def test_what_is_no_file_of_a_run_is_named_and_left(place: Path, name: str, kind: str) -> None:
    """A link is not followed, a FIFO not waited for; --force gets out unless it is the lock."""
    (place / "victim").write_bytes(MINE)
    (PARTIAL / "result").mkdir(parents=True)
    PARTIAL.chmod(0o700)
    path = PARTIAL / name
    if kind == "link":
        path.symlink_to(place / "victim")
    elif kind == "FIFO":
        os.mkfifo(path)
    else:
        path.mkdir()
    with pytest.raises(RunError, match=rf"\.out\.partial.*no run of this program put there.*\n  - {name}$"):
        make(resume=True)
    assert (place / "victim").read_bytes() == MINE and path.exists() and not Path("out").exists()
    if name != "lock":
        make(force=True)
        make("whole")
        assert weights(Path("out")) == weights(Path("whole")) and (place / "victim").read_bytes() == MINE


@pytest.mark.parametrize("name", ["result/modeling_evil.py", "result/deep/tokenizer.json", "notes.txt", "result.old/x"])
def test_foreign_files_are_named_and_neither_published_nor_removed(name: str) -> None:
    stop()
    (PARTIAL / name).parent.mkdir(exist_ok=True)
    (PARTIAL / name).write_bytes(MINE)
    with pytest.raises(
        RunError, match=rf"no run of this program put there(?s:.*)- {'/'.join(name.split('/')[:2])[:10]}"
    ):
        make(resume=True)
    assert (PARTIAL / name).read_bytes() == MINE
    (PARTIAL / name).unlink()
    if (folder := (PARTIAL / name).parent) not in (PARTIAL, PARTIAL / "result"):
        folder.rmdir()
    make(resume=True)
    make("whole")
    assert weights(Path("out")) == weights(Path("whole"))


def test_files_that_come_while_a_run_works_are_not_published(monkeypatch: pytest.MonkeyPatch) -> None:
    publish = OutputWorkspace.publish

    def with_stranger(workspace: OutputWorkspace, **options: bool) -> None:
        (workspace.result / "modeling.py").write_bytes(MINE)
        publish(workspace, **options)

    monkeypatch.setattr(OutputWorkspace, "publish", with_stranger)
    with pytest.raises(RunError, match=r"put there(?s:.*)result/modeling\.py"):
        make()
    assert not Path("out").exists()


@pytest.mark.parametrize("kind", ["link", "file", "open to others", "of another user"])
def test_a_working_folder_that_is_not_the_user_s_own(place: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "elsewhere").mkdir()
    (place / "elsewhere" / "mine").write_bytes(MINE)
    if kind == "link":
        PARTIAL.symlink_to("elsewhere")
    elif kind == "file":
        PARTIAL.write_bytes(MINE)
    else:
        PARTIAL.mkdir()
        PARTIAL.chmod(0o777 if kind == "open to others" else 0o700)
    if kind == "of another user":
        other, own = os.geteuid() + 1, working_folder._access
        monkeypatch.setattr(os, "geteuid", lambda: other)
        monkeypatch.setattr(working_folder, "_access", lambda status: (status.st_ino, *own(status)))
    for options in ({"resume": True}, {"force": True}):
        with pytest.raises(RunError, match=r"\.out\.partial: (is in the way|other users may write there)"):
            make(**options)
    assert (place / "elsewhere" / "mine").read_bytes() == MINE and PARTIAL.exists()


def test_a_file_system_without_owners_is_no_reason_to_refuse(monkeypatch: pytest.MonkeyPatch) -> None:
    """There every folder looks like one that is open to others, one of our own as well."""
    stop()
    PARTIAL.chmod(0o777)
    monkeypatch.setattr(working_folder, "_access", lambda _: (0, 0))
    make(resume=True)
    assert not PARTIAL.exists()


def test_nobody_else_may_write_to_a_working_folder() -> None:
    before = os.umask(0)
    try:
        stop()
    finally:
        os.umask(before)
    assert PARTIAL.stat().st_mode & 0o077 == 0


def test_a_published_file_is_not_written_to_by_its_second_name() -> None:
    """A kill between a link and a removal leaves both names; the file may have been changed since."""
    stop("out.safetensors")
    result = Path(".out.safetensors.partial/result/out.safetensors")
    Path("out.safetensors").hardlink_to(result)
    with result.open("r+b") as file:
        file.seek(-1, os.SEEK_END)
        file.write(b"\1")
    changed = result.read_bytes()
    Path("kept").hardlink_to(result)
    make("out.safetensors", resume=True, force=True)
    make("whole.safetensors")
    assert Path("out.safetensors").read_bytes() == Path("whole.safetensors").read_bytes() != changed
    assert Path("kept").read_bytes() == changed


# Journals


def changes(line: list[object]) -> list[list[object]]:
    """Return a journal's line changed in every way: each field another, or of another type."""
    others: list[object] = [[1], {}, "x", -1, 10**30, True, None, 0.5, ["0" * 32], ["x"], [float("nan")], [77]]
    changed = [[*line[:n], other, *line[n + 1 :]] for n in range(len(line)) for other in others if line[n] != other]
    return [*changed, line[:-1], [*line, 0], []]


def test_a_changed_journal_is_work_done_again() -> None:
    """Its digests and sums would be published, in the manifest and the effective alpha."""
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    stop()
    make("whole")
    whole, unfinished = weights(Path("whole")), records()
    every = changes(unfinished[0])
    for line in random.Random(seed).sample(every, 12):
        rewrite([line, *unfinished[1:]])
        make(resume=True)
        assert weights(Path("out")) == whole, line
        renames.remove(Path("out"))
        stop()


@pytest.mark.parametrize(
    "line", [b"[" * 100_000 + b"]" * 100_000, b"9" * 5000, b"\xff\xfe", b"", b"null", b"\0" * 5000]
)
def test_a_line_that_no_run_wrote_is_dropped(line: bytes) -> None:
    stop()
    with (PARTIAL / "journal.jsonl").open("ab") as file:
        file.write(line + b"\n")
    make(resume=True)
    make("whole")
    assert weights(Path("out")) == weights(Path("whole"))


def test_lines_of_another_plan_are_dropped() -> None:
    """Even under the right head."""
    mergekit_lite.extrapolate("sft", "dpo", "whole", 0.9, threads=1)
    stop()
    head, *lines = (PARTIAL / "journal.jsonl").read_bytes().splitlines(keepends=True)
    other = {**json.loads(head), "plan": "0" * 32}
    (PARTIAL / "journal.jsonl").write_bytes(json.dumps(other).encode() + b"\n" + b"".join(lines))
    with pytest.raises(RunError, match="another plan"):
        make(resume=True)
    for sources in (None, [], {}, 5):
        changed = {**json.loads(head), "sources": sources}
        (PARTIAL / "journal.jsonl").write_bytes(json.dumps(changed).encode() + b"\n" + b"".join(lines))
        with pytest.raises(RunError, match="inputs that changed"):
            make(resume=True)
    make(force=True)


# Vectors


@pytest.mark.parametrize(("output", "options"), [("v.safetensors", {}), ("lora", {"format": "lora", "rank": 2})])
def test_an_extraction_that_is_done_is_not_done_again(output: str, options: dict[str, object]) -> None:
    def extract(**more: bool) -> mergekit_lite.Extracted:
        return mergekit_lite.extract_vector("sft", "dpo", output, threads=1, **options, **more)

    made = extract()
    file = Path(output) / "adapter_model.safetensors" if options else Path(output)
    before = file.stat().st_mtime_ns
    again = extract(resume=True)
    assert file.stat().st_mtime_ns == before
    assert again.to_json()["tensors"].keys() == made.to_json()["tensors"].keys()
    assert again.error == pytest.approx(made.error) and (again.nbytes, again.unchanged) == (made.nbytes, made.unchanged)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(UsageError, match="is not the result of this run"):
        extract(resume=True)
    extract(resume=True, force=True)
    assert file.read_bytes() != content
    manifest = json.loads(manifest_path(Path(output)).read_bytes())
    manifest_path(Path(output)).write_text(json.dumps(manifest | {"tensors": [1], "parts": 5}))
    with pytest.raises(UsageError, match="is not the result of this run"):
        extract(resume=True)


# Power cuts


@pytest.mark.parametrize("output", ["out", "out.safetensors", "deep/er/out"])
def test_sync_brings_everything_to_the_disk_in_the_right_order(
    output: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Files and folders before they get their names, then the folders that hold the names; nothing unasked."""
    calls: list[tuple[str, Path]] = []
    fsync, renameat2, remove = os.fsync, renames.renameat2, renames.remove

    def synced(descriptor: int) -> None:
        calls.append(("sync", Path(f"/proc/self/fd/{descriptor}").readlink()))
        fsync(descriptor)

    def renamed(source: Path, target: Path, flags: int) -> None:
        renameat2(source, target, flags)
        calls.append(("rename", target.absolute()))

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(renames, "renameat2", renamed)
    monkeypatch.setattr(renames, "remove", lambda path: calls.append(("remove", path)) or remove(path))
    make("unasked")
    assert not [call for call in calls if call[0] == "sync"]
    make(output, force=True)
    calls.clear()
    mergekit_lite.extrapolate("sft", "dpo", output, 0.9, threads=1, force=True, sync=True)
    target = place / output
    result = target.with_name(f".{target.name}.partial") / "result"
    removals = [number for number, (what, path) in enumerate(calls) if what == "remove" and path.name == "result"]
    names = [number for number, (what, _) in enumerate(calls) if what == "rename"]
    before, after = set(calls[: names[0]]), calls[names[-1] + 1 : removals[-1]]
    files = (
        [path.name for path in (place / output).iterdir()]
        if output != "out.safetensors"
        else [output, f"{output}.manifest.json"]
    )
    assert {("sync", result), *(("sync", result / name) for name in files)} <= before
    assert ("sync", target.parent) in after and ("sync", place) in after
    assert removals[-1] > names[-1], "what was replaced is removed last"


# Names, and streams that can't be written to


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("x" * 247, "too long a name"),
        ("x" * 255, "too long a name"),
        ("x" * 300, "too long a name"),
        ("é" * 125, "too long a name"),
        ("x" * 240 + ".pt", "too long a name"),
        ("new\nline", "can't be shown"),
        ("esc\x1b[31m", "can't be shown"),
        ("caf\udce9", "can't be shown"),
        ("dangling", "exists"),
        ("mine/out", "Not a directory"),
        ("loop", "exists"),
        ("..", "can't be an output"),
    ],
)
def test_names_that_no_output_can_have_are_refused_at_once(place: Path, name: str, message: str) -> None:
    (place / "dangling").symlink_to("nowhere")
    (place / "loop").symlink_to("loop")
    (place / "mine").write_bytes(MINE)
    before = sorted(place.iterdir())
    with pytest.raises(UsageError, match=message) as raised:
        make(name)
    assert str(raised.value).isprintable() and sorted(place.iterdir()) == before


@pytest.mark.parametrize("name", ["x" * 246, "x" * 229 + ".safetensors", "日本語", "👩\u200d🔬", "a[red]c", "[b"])
def test_names_that_an_output_may_have(name: str) -> None:
    make(name)
    make(name, resume=True)
    assert Path(name).exists()


@pytest.mark.parametrize(
    ("streams", "code"), [(">&- 2>&- <&-", 0), (">/dev/full", 0), (">/dev/full 2>/dev/full", 0), ("| true", 0)]
)
def test_an_output_is_made_even_if_nobody_can_be_told(streams: str, code: int) -> None:
    command = f"{sys.executable} -m mergekit_lite extrapolate sft dpo --alpha 0.3 --threads 1 -o 'a[b]c' {streams}"
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True)
    assert ended.returncode == code and "Traceback" not in ended.stderr, ended.stderr
    assert ("No space left" in ended.stderr) == (streams == ">/dev/full")
    make("whole")
    assert weights(Path("a[b]c")) == weights(Path("whole"))


def test_what_is_only_printed_has_failed_if_it_is_lost() -> None:
    command = f"{sys.executable} -m mergekit_lite methods >/dev/full"
    ended = subprocess.run(["bash", "-c", command], capture_output=True, text=True)
    assert ended.returncode == 1 and "No space left" in ended.stderr and "Traceback" not in ended.stderr
