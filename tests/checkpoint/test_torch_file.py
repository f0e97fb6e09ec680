"""Files of torch.save: read as torch.load reads them, or refused with the way out."""

from __future__ import annotations

import json
import tempfile
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.commands import main
from mergekit_lite.errors import CheckpointError
from tests.checkpoint.reading import assert_reads_as

DTYPES = (torch.float64, torch.float32, torch.bfloat16, torch.float16, torch.int64, torch.uint8, torch.bool)


def saved(folder: Path, content: object, name: str = "x.pt", **options) -> Path:
    torch.save(content, folder / name, **options)
    return folder / name


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(path)
    return str(caught.value)


@st.composite
def views(draw) -> torch.Tensor:
    """A tensor that is some view of some storage: sliced, transposed, expanded, empty."""
    shape = draw(st.lists(st.integers(1, 5), min_size=1, max_size=3))
    tensor = torch.randn(shape).mul(3).to(draw(st.sampled_from(DTYPES)))
    for _ in range(draw(st.integers(0, 2))):
        axis = draw(st.integers(0, tensor.dim() - 1))
        kind = draw(st.sampled_from(["slice", "transpose", "expand", "step"]))
        if kind == "slice":
            tensor = tensor.narrow(axis, begin := draw(st.integers(0, tensor.shape[axis])), tensor.shape[axis] - begin)
        elif kind == "transpose":
            tensor = tensor.transpose(axis, 0)
        elif kind == "expand":
            tensor = tensor[None].expand(draw(st.integers(1, 3)), *tensor.shape)
        else:
            tensor = tensor[(slice(None),) * axis + (slice(None, None, 2),)]
    return tensor


@settings(max_examples=80)
@given(
    st.dictionaries(st.text("abc.", min_size=1, max_size=6).map("{}.mask".format), views(), min_size=1, max_size=5),
    st.integers(0, 2),
)
def test_any_view_reads_as_torch_loads_it(tensors, depth):
    content = tensors
    for key in ["state_dict", "model"][:depth]:
        content = {key: content}
    with tempfile.TemporaryDirectory() as folder:
        path = saved(Path(folder), content)
        loaded = torch.load(path, weights_only=True)
        for key in ["model", "state_dict"][2 - depth :]:
            loaded = loaded[key]
        assert_reads_as(path, loaded)


@settings(max_examples=30)
@given(st.data())
def test_any_part_of_a_strided_tensor_is_that_part_of_the_whole(data):
    whole = torch.arange(5 * 6 * 7).view(5, 6, 7).permute(data.draw(st.permutations(range(3))))[:, 1:, ::2]
    start = data.draw(st.integers(0, whole.numel()))
    with tempfile.TemporaryDirectory() as folder, Reader() as reader:
        out = torch.empty(data.draw(st.integers(0, whole.numel() - start)), dtype=whole.dtype)
        open_checkpoint(saved(Path(folder), {"x": whole})).tensors["x"].read(reader, start, out)
        assert torch.equal(out, whole.flatten()[start : start + len(out)])


def test_shared_storage_and_parameters(tmp_path):
    weight = torch.nn.Parameter(torch.randn(4, 6))
    tensors = OrderedDict(embed=weight, head=weight, part=weight.detach()[1:3], transposed=weight.detach().T)
    checkpoint = assert_reads_as(saved(tmp_path, tensors), tensors)
    assert checkpoint.tensors["embed"].offset == checkpoint.tensors["head"].offset


def test_the_nest_and_what_is_left_out(tmp_path):
    content = {"model": {"a": torch.ones(2), "version": 3}, "epoch": 7, "optimizer": {"state": {}}, 5: 6}
    checkpoint = open_checkpoint(saved(tmp_path, content))
    assert checkpoint.nest == ("model",)
    assert set(checkpoint.tensors) == {"a"}
    assert set(checkpoint.left_out) == {"epoch", "optimizer", "<int>", "model.version"}
    assert open_checkpoint(saved(tmp_path, {"a": torch.ones(2)})).nest == ()
    assert open_checkpoint(saved(tmp_path, {"state": {"module": {"a": torch.ones(2)}}})).nest == ("state", "module")


WEIGHTS = {"wte.weight": torch.ones(16, 8), "norm.weight": torch.ones(8)}
BESIDE = {
    "a loss": {"best_val_loss": torch.tensor(3.1)},
    "losses": {"losses": torch.ones(20), "step": torch.tensor(5)},
    "a random generator": {"rng_state": torch.zeros(5056, dtype=torch.uint8)},
    "random generators": {"rng": {"cpu": torch.zeros(5056, dtype=torch.uint8), "count": torch.tensor(2)}},
    "an optimizer": {"optimizer": {"state": {0: {"exp_avg": torch.ones(16, 8)}}, "param_groups": []}},
    "metrics": {"metrics": {"loss": torch.tensor(1.0), "curve": torch.ones(50)}, "epoch": 3},
}


@pytest.mark.parametrize("key", ["model", "state_dict", "state", "model_state_dict", "net"])
@pytest.mark.parametrize("kind", BESIDE)
def test_what_stands_beside_the_state_dict_is_left_out_by_name(tmp_path, key, kind):
    for number, content in enumerate([{key: WEIGHTS} | BESIDE[kind], BESIDE[kind] | {key: WEIGHTS}]):
        checkpoint = assert_reads_as(saved(tmp_path, content, f"{number}.pt"), WEIGHTS)
        assert checkpoint.nest == (key,)
        assert set(checkpoint.left_out) == set(BESIDE[kind])


def test_a_model_of_vectors_under_a_known_name_is_found_beside_a_loss(tmp_path):
    checkpoint = open_checkpoint(saved(tmp_path, {"loss": torch.tensor(1.0), "model": {"a": torch.ones(2)}}))
    assert checkpoint.nest == ("model",) and set(checkpoint.left_out) == {"loss"}


def test_a_plain_state_dict_may_have_other_things_beside_it(tmp_path):
    extra = {"layer._extra_state": {"scale": torch.ones(3), "amax": torch.tensor(1.0)}, "state": {"step": 3}}
    checkpoint = assert_reads_as(saved(tmp_path, WEIGHTS | extra), WEIGHTS)
    assert checkpoint.nest == () and set(checkpoint.left_out) == set(extra)


MOVING_AVERAGE = {"ema": {name: tensor * 2 for name, tensor in WEIGHTS.items()}}


@pytest.mark.parametrize(
    ("content", "places"),
    [
        ({"model": WEIGHTS} | MOVING_AVERAGE, ["under model", "under ema"]),
        ({"model": {"state_dict": WEIGHTS}, "loss": torch.tensor(1.0)} | MOVING_AVERAGE, ["under model", "under ema"]),
        ({"state_dict": {"model": WEIGHTS} | MOVING_AVERAGE}, ["under state_dict.model", "under state_dict.ema"]),
        ({"generator": WEIGHTS, "discriminator": WEIGHTS}, ["under generator", "under discriminator"]),
        ({"head.weight": torch.ones(4, 8), "model": WEIGHTS}, ["the top level", "under model"]),
        ({"model": {"a": torch.ones(2)}, "b": torch.ones(2)}, ["the top level", "under model"]),
        (WEIGHTS | MOVING_AVERAGE, ["the top level", "under ema"]),
    ],
    ids=["ema", "deeper", "nested", "two models", "head", "vectors", "flat"],
)
def test_weights_in_two_places_are_refused_and_the_command_in_the_message_parts_them(
    tmp_path, monkeypatch, content, places
):
    message = refusal(saved(tmp_path, content))
    assert [line.removeprefix("  - ") for line in message.splitlines()[1:-1]] == places
    monkeypatch.chdir(tmp_path)
    exec(message.split('python -c "')[1].split('"')[0])
    key = next(place for place in places if place.startswith("under "))
    for part in key.removeprefix("under ").split("."):
        content = content[part]
    assert_reads_as(Path("x.weights.pt"), content.get("state_dict", content))


def test_a_module_state_dict_of_every_suffix(tmp_path):
    module = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.BatchNorm1d(4))
    for suffix in (".pt", ".pth", ".bin"):
        assert_reads_as(saved(tmp_path, module.state_dict(), f"x{suffix}"), module.state_dict())


@pytest.mark.parametrize(
    "content",
    [
        {},
        [torch.ones(2)],
        torch.ones(2),
        {"model": {"epoch": 3}},
        {"weights": {"a": torch.ones(2)}},
        {3: torch.ones(1)},
        7,
    ],
    ids=str,
)
def test_what_holds_no_dictionary_of_tensors_is_refused(tmp_path, content):
    assert "no dictionary of tensors" in refusal(saved(tmp_path, content))


ODD = {
    "sparse": lambda: torch.ones(3).to_sparse(),
    "quantized": lambda: torch.quantize_per_tensor(torch.ones(3), 0.1, 0, torch.qint8),
    "conjugated": lambda: torch.ones(3, dtype=torch.complex64).conj(),
    "negated": lambda: torch.ones(3, dtype=torch.complex64).conj().imag,
    "complex128": lambda: torch.ones(3, dtype=torch.complex128),
    "meta": lambda: torch.empty(3, device="meta"),
}


@pytest.mark.parametrize("kind", ODD)
@pytest.mark.filterwarnings("ignore:.*quantize.*deprecated", "ignore:TypedStorage is deprecated")
def test_tensors_that_are_not_plain_are_refused(tmp_path, kind):
    assert "x.pt" in refusal(saved(tmp_path, {"x": ODD[kind]()}))


def test_a_whole_module_is_refused_with_the_remedy(tmp_path):
    message = refusal(saved(tmp_path, torch.nn.Linear(2, 2)))
    assert "nothing in it was run" in message and "GLOBAL torch.nn.modules.linear.Linear" in message
    assert "state_dict()" in message


def test_the_legacy_format_is_refused_and_the_command_in_the_message_converts_it(tmp_path):
    tensors = {"a": torch.randn(3)}
    message = refusal(saved(tmp_path, tensors, _use_new_zipfile_serialization=False))
    command = message.split('python -c "')[1].split('"')[0]
    command = command.replace("'x.pt'", repr(str(tmp_path / "x.pt"))).replace(
        "'x.new.pt'", repr(str(tmp_path / "new.pt"))
    )
    exec(command)
    assert_reads_as(tmp_path / "new.pt", tensors)


def rezipped(path: Path, compression: int = zipfile.ZIP_STORED, prefix: str = "") -> Path:
    """The same records, written by another tool."""
    target = path.with_name("again.pt")
    with zipfile.ZipFile(path) as source, zipfile.ZipFile(target, "w", compression) as copy:
        for entry in source.infolist():
            copy.writestr(prefix + entry.filename, source.read(entry))
    return target


def test_a_compressed_zip_is_refused(tmp_path):
    assert "compressed zip" in refusal(rezipped(saved(tmp_path, {"a": torch.ones(99)}), zipfile.ZIP_DEFLATED))


def test_a_zip_of_another_tool_is_read_right_or_refused(tmp_path):
    tensors = {"a": torch.arange(99.0), "b": torch.arange(7.0)}
    path = rezipped(saved(tmp_path, tensors))
    try:
        assert_reads_as(path, tensors)
    except CheckpointError as error:
        assert "torch's" in str(error)


def test_a_big_endian_file_is_refused(tmp_path):
    path = saved(tmp_path, {"a": torch.ones(2)})
    path.write_bytes(path.read_bytes().replace(b"little", b"big\0\0\0"))
    message = refusal(path)
    assert "big-endian" in message or "not a file that torch.save" in message


def test_sharded_bin_files_with_an_index(tmp_path):
    shards = {
        "pytorch_model-00001-of-00002.bin": {"a": torch.randn(3, 2).T},
        "pytorch_model-00002-of-00002.bin": {"b": torch.ones(2)},
    }
    weight_map = {}
    for file, tensors in shards.items():
        saved(tmp_path, tensors, file)
        weight_map |= dict.fromkeys(tensors, file)
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    checkpoint = assert_reads_as(tmp_path, {name: tensor for part in shards.values() for name, tensor in part.items()})
    assert len(checkpoint.files) == 2


@pytest.mark.parametrize("key", ["model", "ema", "state.ema"])
def test_a_key_chooses_the_weights(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, key: str) -> None:
    monkeypatch.chdir(tmp_path)
    twice = {name: tensor * 2 for name, tensor in WEIGHTS.items()}
    content = {"model": WEIGHTS, "ema": twice, "state": {"ema": twice, "step": torch.tensor(3)}, "loss": torch.ones(1)}
    for name, change in (("sft", 0), ("dpo", 0.25)):
        moved = {part: {k: v + change for k, v in content[part].items()} for part in ("model", "ema")}
        saved(tmp_path, content | moved | {"state": {"ema": moved["ema"]}}, f"{name}.pt")
    expected = WEIGHTS if key == "model" else twice
    checkpoint = assert_reads_as(Path(f"sft.pt:{key}"), expected)
    assert checkpoint.nest == tuple(key.split("."))
    assert "loss" in checkpoint.left_out
    command = ["extrapolate", f"sft.pt:{key}", f"dpo.pt:{key}", "--alpha", "1"]
    made = CliRunner().invoke(main, command)
    assert made.exit_code == 0, made.output
    loaded = torch.load("dpo-expo-1.pt", weights_only=True)
    for part in key.split("."):
        loaded = loaded[part]
    torch.testing.assert_close(loaded, {name: tensor + 0.5 for name, tensor in expected.items()})
    verified = CliRunner().invoke(main, ["verify", "dpo-expo-1.pt", "--all"])
    assert verified.exit_code == 0, verified.output


def test_a_key_that_is_not_there(tmp_path: Path) -> None:
    path = saved(tmp_path, {"model": WEIGHTS, "ema": WEIGHTS, "step": 3})
    with pytest.raises(CheckpointError, match=r"has no mapping 'eam' at its top level\. Did you mean 'ema'"):
        open_checkpoint(f"{path}:eam")
    with pytest.raises(CheckpointError, match="no mapping 'x' under ema"):
        open_checkpoint(f"{path}:ema.x")
    assert f"such as {path}:model" in refusal(path)
