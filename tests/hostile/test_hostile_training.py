"""Training checkpoints that lie or mean harm: one clear CheckpointError, and nothing of their pickles runs."""

from __future__ import annotations

import os
import pickle
import tarfile
import time
import tracemalloc
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.formats import plain_pickle
from mergekit_lite.errors import CheckpointError
from tests.checkpoint.reading import read_all

STORED = Path(__file__).parents[1] / "checkpoint" / "data" / "training.tar.xz"
WEIGHT = "model.layer.weight"  # 5 × 5, in pieces of three rows and two


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    with tarfile.open(STORED) as archive:
        archive.extractall(tmp_path, filter="data")
    return tmp_path / "training"


def refusal(path: Path) -> str:
    before = set(path.rglob("*"))
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    message = str(caught.value)
    assert set(path.rglob("*")) == before and len(message) < 3000 and message.replace("\n", "").isprintable()
    return message


class Runs:
    """What runs a command where it is unpickled."""

    def __init__(self, target: Path) -> None:
        self.target = target

    def __reduce__(self) -> Any:
        return os.system, (f"touch {self.target}",)


def forged(folder: Path, change: Callable[[Any], object]) -> Path:
    """The folder with other metadata: those it has, unpickled, changed and pickled again."""
    path = folder / "fsdp2" / ".metadata"
    metadata = pickle.loads(path.read_bytes())
    path.write_bytes(pickle.dumps(change(metadata) or metadata))
    return folder / "fsdp2"


def tensor_of(metadata: Any) -> Any:
    return metadata.state_dict_metadata[WEIGHT]


def place_of(metadata: Any) -> Any:
    return next(info for index, info in metadata.storage_data.items() if index.fqn == WEIGHT)


def swapped(metadata: Any) -> None:
    """Two pieces of one shape in each other's place: only their own headers could say so, and they are alike."""
    first, second = (
        next(index for index in metadata.storage_data if index.fqn == name)
        for name in ("model.layer.weight", "model.frozen.weight")
    )
    data = metadata.storage_data
    data[first], data[second] = data[second], data[first]


def hole(metadata: Any) -> None:
    tensor_of(metadata).chunks.pop()


def overlap(metadata: Any) -> None:
    chunk = tensor_of(metadata).chunks[1]
    chunk.offsets = torch.Size((1, 0))


def beyond(metadata: Any) -> None:
    tensor_of(metadata).chunks[1].offsets = torch.Size((4, 0))


def other_dtype(metadata: Any) -> None:
    tensor_of(metadata).properties.dtype = torch.float16


def elsewhere(metadata: Any) -> None:
    place_of(metadata).relative_path = "../two/__0_0.distcp"


def by_a_link(metadata: Any) -> None:
    place_of(metadata).relative_path = "link"


def behind_the_end(metadata: Any) -> None:
    place_of(metadata).offset = 1 << 50


def of_no_length(metadata: Any) -> None:
    place_of(metadata).length = 10


def negative(metadata: Any) -> None:
    place_of(metadata).offset = -5


def compressed(metadata: Any) -> None:
    place_of(metadata).transform_descriptors = ["zstd"]


def endless(metadata: Any) -> None:
    tensor_of(metadata).size = torch.Size((1 << 40, 1 << 40))


def terminal(metadata: Any) -> None:
    metadata.state_dict_metadata["\x1b[2J"] = tensor_of(metadata)


def no_metadata(metadata: Any) -> object:
    return {"state_dict_metadata": {}}


def unknown_class(metadata: Any) -> None:
    metadata.planner_data = zipfile.ZipInfo()


FORGERIES = {
    swapped: "the metadata say",
    hole: "elements, it has",
    overlap: "is in no file",
    beyond: "is in no file",
    other_dtype: "the metadata say",
    elsewhere: "no file of this folder",
    by_a_link: "leaves its folder",
    behind_the_end: "cut short",
    of_no_length: "no file of torch.save",
    negative: "has no place",
    compressed: "compressed",
    endless: "damaged or forged",
    terminal: "unprintable",
    no_metadata: "holds no metadata",
    unknown_class: "zipfile.ZipInfo",
}


@pytest.mark.parametrize("change", FORGERIES, ids=lambda change: change.__name__)
def test_metadata_that_lie_are_refused(folder, change):
    (folder / "fsdp2" / "link").symlink_to("/etc/hostname")
    assert FORGERIES[change] in refusal(forged(folder, change))


def test_overlapping_pieces_are_refused(folder):
    """Also where the storage has a piece at the forged place."""

    def change(metadata: Any) -> None:
        chunk = tensor_of(metadata).chunks[1]
        old = next(i for i in metadata.storage_data if i.fqn == WEIGHT and i.offset == chunk.offsets)
        info = metadata.storage_data.pop(old)
        chunk.offsets = torch.Size((1, 0))
        metadata.storage_data[type(old)(WEIGHT, chunk.offsets)] = info

    assert "overlap" in refusal(forged(folder, change))


def test_nothing_in_metadata_runs(folder, tmp_path):
    mark = tmp_path / "ran"

    def everywhere(metadata: Any) -> None:
        metadata.planner_data = Runs(mark)

    assert "system" in refusal(forged(folder, everywhere)) and not mark.exists()
    (folder / "two" / ".metadata").write_bytes(pickle.dumps(Runs(mark)))
    assert "Nothing in it was run" in refusal(folder / "two") and not mark.exists()


def test_nothing_in_a_piece_runs(folder, tmp_path):
    mark = tmp_path / "ran"
    torch.save(Runs(mark), tmp_path / "piece")
    piece = (tmp_path / "piece").read_bytes()
    (folder / "fsdp2" / "piece").write_bytes(piece)

    def change(metadata: Any) -> None:
        place = place_of(metadata)
        place.relative_path, place.offset, place.length = "piece", 0, len(piece)

    assert "system" in refusal(forged(folder, change)) and not mark.exists()


def test_nothing_in_files_of_deepspeed_runs(folder, tmp_path):
    """There objects of any class stand among the weights: they are left out, and nothing of them is run."""
    mark = tmp_path / "ran"
    path = folder / "zero0" / "global_step2" / "mp_rank_00_model_states.pt"
    content = torch.load(path, weights_only=False)
    torch.save(content | {"lr_scheduler": Runs(mark)}, path)
    assert read_all(open_checkpoint(folder / "zero0")) and not mark.exists()
    torch.save(content | {"module": Runs(mark)}, path)
    assert "holds no tensors" in refusal(folder / "zero0") and not mark.exists()


def test_a_tensor_beyond_its_record(folder):
    path = folder / "zero2" / "global_step2" / "mp_rank_00_model_states.pt"
    with zipfile.ZipFile(path) as archive:
        records = {entry.filename: archive.read(entry) for entry in archive.infolist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, data in records.items():
            archive.writestr(name, data[:4] if "/data/" in name else data)
    assert "damaged or forged" in refusal(folder / "zero2")


def test_what_was_checked_can_not_be_changed():
    """A tensor's place is checked when it is made: the pickle can't give it another one afterwards."""
    tensor = (
        b"ctorch._utils\n_rebuild_tensor_v2\n((X\x07\0\0\0storagectorch\nFloatStorage\nX\x01\0\0\x000X\x03\0\0\0cpu"
        b"K\x04tQK\x00K\x04\x85K\x01\x85\x89NtR"
    )
    assert plain_pickle.load("here", b"\x80\x02" + tensor + b".", {}) == ("0", "float32", 0, (4,), (1,))
    for change in (b"}X\x05\0\0\0startK\x09sb.", b"N}X\x05\0\0\0startK\x09s\x86b."):
        with pytest.raises(CheckpointError, match="Nothing in it was run"):
            plain_pickle.load("here", b"\x80\x02" + tensor + change, {})


def no_pieces(metadata: Any) -> None:
    tensor_of(metadata).chunks = 7


def odd_place(metadata: Any) -> None:
    metadata.planner_data = {WEIGHT: ("\x1b[2J", "weight"), "model.odd": ([],)}


@pytest.mark.parametrize("change", [no_pieces, odd_place], ids=lambda change: change.__name__)
def test_metadata_of_odd_kinds(folder, change):
    try:
        checkpoint = open_checkpoint(forged(folder, change))
    except CheckpointError as error:
        assert str(error).replace("\n", "").isprintable()
    else:
        assert all(name.isprintable() for name in (*checkpoint.tensors, *checkpoint.left_out))


GREEDY = {
    "a place in the memo": b"\x80\x04Nr\xff\xff\xff\xff.",
    "a byte array": b"\x80\x05\x96" + (1 << 40).to_bytes(8, "little") + b".",
    "a long text": b"\x80\x04\x8d" + (1 << 40).to_bytes(8, "little") + b".",
    "a frame": b"\x80\x04\x95" + (1 << 40).to_bytes(8, "little") + b".",
    "a long number": b"\x80\x04\x8b" + (1 << 30).to_bytes(4, "little") + b".",
    "digits": b"I" + b"9" * 100_000 + b"\n.",
    "nesting": b"\x80\x04N" + b"\x85" * 50_000 + b".",
    "registered classes": b"\x80\x04\x82\x01.",
    "a text as a class": b"\x80\x04\x8c\x05torch\x8c\x07float32\x93)\x81.",
    "a state for a class": b"\x80\x04\x8c\x0btorch._utils\x8c\x12_rebuild_tensor_v2\x93}b.",
}


@pytest.mark.parametrize("pickled", GREEDY.values(), ids=GREEDY.keys())
def test_pickles_that_ask_for_much_get_nothing(folder, pickled):
    (folder / "two" / ".metadata").write_bytes(pickled)
    tracemalloc.start()
    began = time.process_time()
    refusal(folder / "two")
    assert tracemalloc.get_traced_memory()[1] < 100e6 and time.process_time() - began < 10
    tracemalloc.stop()


@settings(max_examples=40, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(st.lists(st.tuples(st.integers(0, 7000), st.integers(0, 255)), min_size=1, max_size=3))
def test_changed_bytes_are_refused_or_harmless(folder, changes):
    """Whatever bytes of the metadata are changed: they still describe the weights, or there is one clear error."""
    path = folder / "two" / ".metadata"
    sound = path.read_bytes()
    damaged = bytearray(sound)
    for at, value in changes:
        damaged[at % len(damaged)] = value
    path.write_bytes(damaged)
    try:
        read_all(open_checkpoint(f"{folder / 'two'}:ema"))
    except CheckpointError as error:
        assert len(str(error)) < 5000
    finally:
        path.write_bytes(sound)
