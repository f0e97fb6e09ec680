"""Whatever a file says, opening it gives tensors or one clear, bounded CheckpointError; nothing is run or written."""

from __future__ import annotations

import io
import tempfile
import time
import zipfile
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
from mergekit_lite.errors import CheckpointError
from tests.checkpoint.reading import assert_reads_as, read_all
from tests.hostile import make_hostile

HEADERS, FOLDERS = make_hostile.headers(), make_hostile.folders()
PICKLES = list(make_hostile.pickles(Path("unused")))
SOUND = {"a": torch.ones(4), "b": torch.ones(2, 3)}


def files_under(folder: Path) -> set[Path]:
    return set(folder.rglob("*"))


def refusal(reference: Path, folder: Path) -> str:
    """The message with which a reference is refused; it is clear, bounded, printable, and nothing was written."""
    before = files_under(folder)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(reference)
    message = str(caught.value)
    assert files_under(folder) == before
    assert str(reference) in message
    assert len(message) < 10_000
    assert message.encode() and message.replace("\n", "").isprintable()
    return message


@pytest.mark.parametrize("case", HEADERS)
def test_a_header_that_lies_is_refused(tmp_path, case):
    refusal(HEADERS[case](tmp_path), tmp_path)


@pytest.mark.parametrize("case", [case for case in HEADERS if "100 MB" not in case and "many" not in case])
def test_what_the_library_refuses_is_among_what_is_refused(tmp_path, case):
    """The other way round: no case here is one that only we find fault with, but those named."""
    path = HEADERS[case](tmp_path)
    stricter = (
        "name with",
        "name endless",
        "dtype a list",
        "more keys",
        "a key twice",
        "a name twice",
        "endless shape",
    )
    try:
        with safe_open(path, "pt") as opened:
            opened.keys()
    except Exception:
        return
    assert case.startswith(stricter), "the library opens this"


@pytest.mark.parametrize("case", FOLDERS)
def test_nothing_leads_out_of_a_folder(tmp_path, case):
    message = refusal(FOLDERS[case](tmp_path), tmp_path)
    assert "root:" not in message  # of /etc/passwd


def test_the_links_of_a_hub_cache_are_followed(tmp_path):
    assert_reads_as(make_hostile.hub_cache(tmp_path), SOUND)


def test_a_snapshot_may_link_to_its_own_blobs_only(tmp_path):
    snapshot = make_hostile.hub_cache(tmp_path)
    other = tmp_path / "models--org--other" / "blobs"
    other.mkdir(parents=True)
    (snapshot / "model.safetensors").unlink()
    (snapshot / "model.safetensors").symlink_to(make_hostile.written(other / "0123abcd", make_hostile.GOOD))
    assert "leaves its folder" in refusal(snapshot, tmp_path)


@pytest.mark.parametrize("case", PICKLES)
def test_no_pickle_is_run(tmp_path, case):
    touched = tmp_path / "touched"
    path = make_hostile.pickles(touched)[case](tmp_path)
    refusal(path, tmp_path)
    assert not touched.exists()


@pytest.mark.parametrize(
    ("case", "words"),
    [
        ("endless memory", "asks for memory"),
        ("two pickles", "not a file that torch.save"),
        ("disguised", "not a file that torch.save"),
        ("legacy", "not a file that torch.save"),
        ("nested", "nothing in it was run"),
        ("itself", "no dictionary of tensors"),
    ],
)
def test_each_trick_is_met_by_its_own_check(tmp_path, case, words):
    """Not by luck, later, in code that another version of torch may change."""
    assert words in refusal(make_hostile.pickles(tmp_path / "touched")[case](tmp_path), tmp_path)


def test_the_pickles_would_run_if_they_were_let(tmp_path):
    """Else the test above would prove nothing."""
    touched = tmp_path / "touched"
    torch.load(make_hostile.pickles(touched)["nested"](tmp_path), weights_only=False)
    assert touched.exists()


def test_very_many_tensors_open_in_seconds(tmp_path):
    path = make_hostile.many_tensors(tmp_path)
    begin = time.monotonic()
    assert len(open_checkpoint(path).tensors) == 100_000
    assert time.monotonic() - begin < 20


def opened(name: str, content: bytes) -> Checkpoint | None:
    """Open a file with this content. Anything but success and CheckpointError is a bug."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, name)
        path.write_bytes(content)
        try:
            checkpoint = open_checkpoint(path)
        except CheckpointError as error:
            assert str(path) in str(error) and len(str(error)) < 10_000
            return None
        if all(spec.numel < 1_000_000 for spec in checkpoint.tensors.values()):
            read_all(checkpoint)  # what opens can be read to the end
        return checkpoint


@st.composite
def damaged(draw, sound: bytes, within: int | None = None) -> bytes:
    """A sound file with some bytes exchanged, cut out or put in, most of them where the structure is."""
    content = bytearray(sound)
    for _ in range(draw(st.integers(1, 4))):
        position = draw(st.integers(0, min(within or len(content), len(content))))
        kind = draw(st.sampled_from(["flip", "set", "cut", "insert", "end"]))
        if kind == "end":
            del content[position:]
        elif kind == "cut":
            del content[position : position + draw(st.integers(1, 9))]
        elif kind == "insert":
            content[position:position] = draw(st.binary(min_size=1, max_size=9))
        elif position < len(content):
            content[position] = (
                content[position] ^ 1 << draw(st.integers(0, 7)) if kind == "flip" else draw(st.integers(0, 255))
            )
    return bytes(content)


@settings(max_examples=300)
@given(damaged(make_hostile.GOOD))
def test_any_damage_to_a_safetensors_file_is_success_or_a_clear_error(content):
    checkpoint = opened("x.safetensors", content)
    if checkpoint is not None:
        assert sum(spec.nbytes for spec in checkpoint.tensors.values()) <= len(content)


@settings(max_examples=150)
@given(st.binary(max_size=200))
def test_any_bytes_are_success_or_a_clear_error(content):
    opened("x.safetensors", len(content).to_bytes(8, "little") + content)
    opened("x.pt", content)
    opened("x.pt", b"PK\x03\x04" + content)


def torch_file() -> bytes:
    file = io.BytesIO()
    torch.save(
        {"model": {"a": torch.ones(4), "b": torch.ones(6, 2).T, "c": torch.ones(3).half()[1:]}, "epoch": 3}, file
    )
    return file.getvalue()


TORCH_FILE = torch_file()


@settings(max_examples=250)
@given(damaged(TORCH_FILE))
def test_any_damage_to_a_torch_file_is_success_or_a_clear_error(content):
    opened("x.pt", content)


@settings(max_examples=250)
@given(st.data())
def test_any_damage_to_a_pickle_is_success_or_a_clear_error(data):
    """The damage is inside the pickle and the zip around it sound, so that it is the loader that meets it."""
    file = io.BytesIO()
    with zipfile.ZipFile(io.BytesIO(TORCH_FILE)) as source, zipfile.ZipFile(file, "w") as forged:
        for record in source.infolist():
            content = source.read(record)
            if record.filename.endswith("data.pkl"):
                content = data.draw(damaged(content))
            forged.writestr(record.filename, content)
    opened("x.pt", file.getvalue())


def test_folders_that_others_may_change_are_opened_as_they_are(tmp_path):
    """Opening reads: no cache, lock or temporary file appears beside the weights."""
    make_hostile.written(tmp_path / "model.safetensors", make_hostile.GOOD)
    tmp_path.chmod(0o555)
    before = files_under(tmp_path)
    assert_reads_as(tmp_path, SOUND)
    assert files_under(tmp_path) == before
    tmp_path.chmod(0o755)
