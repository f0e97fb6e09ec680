"""Training checkpoints: read as their own libraries read them, or refused with the way out.

``data/training.tar.xz`` was written by real runs of two processes; ``data/make_training.py`` makes it.
"""

from __future__ import annotations

import json
import shutil
import tarfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner
from safetensors.torch import load_file

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.commands import main
from mergekit_lite.errors import CheckpointError
from tests.checkpoint.reading import assert_reads_as, bits, read_all

DISTRIBUTED = {"fsdp2": "", "titan": "", "cuts": "", "two": ":ema", "shards": ""}
ZERO = ("zero1", "zero2", "zero3", "zero3-groups")


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("stored")
    with tarfile.open(Path(__file__).parent / "data" / "training.tar.xz") as archive:
        archive.extractall(folder, filter="data")
    return folder / "training"


@pytest.fixture
def copied(stored: Path, tmp_path: Path) -> Iterator[Path]:
    shutil.copytree(stored, tmp_path / "training")
    yield tmp_path / "training"


def refusal(reference: object) -> str:
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(str(reference))
    return str(caught.value)


def run(*arguments: object) -> str:
    result = CliRunner().invoke(main, list(map(str, arguments)), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.output


@pytest.mark.parametrize("name", DISTRIBUTED)
def test_pieces_read_as_their_library_loads_them(stored, name):
    expected = load_file(stored / f"{name}.safetensors")
    checkpoint = assert_reads_as(f"{stored / name}{DISTRIBUTED[name]}", expected)
    assert not any("exp_avg" in each for each in checkpoint.tensors)


def test_what_is_no_weight_is_named(stored):
    assert set(open_checkpoint(stored / "fsdp2").left_out) == {"optim", "step", "extra"}
    assert open_checkpoint(stored / "fsdp2").nest == ("model",)
    assert {"optimizer", "train_state"} == set(open_checkpoint(stored / "titan").left_out)


def test_a_key_chooses_among_several_places(stored):
    two = stored / "two"
    message = refusal(two)
    assert "several places" in message and "under ema" in message and f"such as {two}:model" in message
    assert "Did you mean 'ema'" in refusal(f"{two}:emma")
    model, average = (read_all(open_checkpoint(f"{two}:{key}")) for key in ("model", "ema"))
    assert all(torch.equal(average[name], 2 * model[name]) for name in model)


@pytest.mark.parametrize("name", ZERO)
@pytest.mark.parametrize("step", ["", "global_step2"])
def test_masters_are_those_of_zero_to_fp32(stored, name, step):
    checkpoint = open_checkpoint(stored / name / step)
    tensors, expected = read_all(checkpoint), load_file(stored / f"{name}.safetensors")
    more = set(tensors) - set(expected)
    assert set(expected) <= set(tensors)
    assert more == ({"frozen.weight"} if name == "zero1" else set())  # which their script loses
    for key, tensor in expected.items():
        assert tensors[key].shape == tensor.shape and tensors[key].dtype == tensor.dtype
        assert bits(tensors[key]) == bits(tensor), key
    assert tensors["frozen.weight"].dtype == torch.bfloat16
    assert "float32 masters" in checkpoint.notes[0]


@pytest.mark.parametrize("name", ["zero0", "zero1:module", "zero2:module"])
def test_weights_in_the_training_dtype(stored, name):
    checkpoint = open_checkpoint(f"{stored / name}")
    folder = stored / name.partition(":")[0]
    expected = torch.load(folder / "global_step2" / "mp_rank_00_model_states.pt", weights_only=False)["module"]
    tensors = read_all(checkpoint)
    assert tensors.keys() == expected.keys() and all(torch.equal(tensors[key], expected[key]) for key in expected)
    assert "bfloat16" in checkpoint.notes[0]


def test_zero_3_has_no_other_weights(stored, copied):
    assert "float32 masters" in refusal(f"{stored / 'zero3'}:module")
    assert "need no key" in refusal(f"{stored / 'zero2'}:ema")
    for file in (copied / "zero3" / "global_step2").glob("*optim_states.pt"):
        file.unlink()
    assert "files (*_optim_states.pt) are missing" in refusal(copied / "zero3")


def test_the_commands_take_them(stored, tmp_path, monkeypatch):
    """Extrapolate, verify, compare, inspect and a task vector of two states in pieces."""
    monkeypatch.chdir(tmp_path)
    sft, aligned = f"{stored / 'two'}:model", f"{stored / 'two'}:ema"
    assert "not a tensor of the model's state" in run(
        "extrapolate", sft, aligned, "-a", "0.5", "-o", "out", "--dry-run", "-v"
    )
    run("extrapolate", sft, aligned, "-a", "0.5", "-o", "out")
    made, one, other = (
        load_file(tmp_path / "out" / "model.safetensors"),
        *(read_all(open_checkpoint(each)) for each in (sft, aligned)),
    )
    for name, tensor in made.items():
        assert torch.equal(tensor, (other[name].float() * 1.5 - 0.5 * one[name].float()).bfloat16())
    assert "is sound" in run("verify", "out", "--all")
    run("vector", "extract", sft, aligned, "-o", "v.safetensors")
    run("vector", "apply", sft, "v.safetensors", "-o", "again.safetensors")
    again = load_file(tmp_path / "again.safetensors")
    assert all(torch.equal(again[name], other[name]) for name in other)
    run("compare", sft, aligned)
    assert "134 parameters" in run("inspect", aligned)
    output = run("extrapolate", stored / "zero2", stored / "zero3", "-a", "0.5", "-o", "masters", "--dry-run")
    assert "float32 masters" in output


def test_the_tag_is_followed_inside_the_folder_only(copied):
    (copied / "zero2" / "latest").write_text("../zero3/global_step2")
    assert "no folder in this one" in refusal(copied / "zero2")
    (copied / "zero2" / "latest").write_text("global_step9\n")
    assert "isn't there" in refusal(copied / "zero2")
    (copied / "zero2" / "latest").unlink()
    (copied / "zero2" / "latest").symlink_to("/dev/zero")
    assert "not a regular file" in refusal(copied / "zero2")


def test_steps_beside_each_other(copied):
    run_folder = copied / "run"
    run_folder.mkdir()
    shutil.copytree(copied / "fsdp2", run_folder / "step-10")
    assert open_checkpoint(run_folder).tensors  # the only one
    shutil.copytree(copied / "fsdp2", run_folder / "step-20")
    assert "several training checkpoints" in refusal(run_folder)
    (copied / "accelerate" / "optimizer_0").mkdir(parents=True)
    shutil.copytree(copied / "fsdp2", copied / "accelerate" / "pytorch_model_fsdp_0")
    (copied / "accelerate" / "config.json").write_text(json.dumps({"model_type": "llama"}))
    assert open_checkpoint(copied / "accelerate").config == {"model_type": "llama"}
    shutil.copytree(copied / "fsdp2", copied / "megatron" / "iter_0000020")
    (copied / "megatron" / "latest_checkpointed_iteration.txt").write_text("20")
    assert open_checkpoint(copied / "megatron").tensors


def test_a_saved_model_comes_before_what_it_was_trained_from(copied):
    """Trainers save a checkpoint beside the finished model."""
    shutil.copy(copied / "zero2.safetensors", copied / "zero2" / "model.safetensors")
    assert [file.path.name for file in open_checkpoint(copied / "zero2").files] == ["model.safetensors"]


def test_what_is_missing_is_named(copied):
    (copied / "fsdp2" / "__1_0.distcp").rename(copied / "gone")
    assert "__1_0.distcp: is missing" in refusal(copied / "fsdp2")
    (copied / "fsdp2" / ".metadata").unlink()
    assert "interrupted" in refusal(copied / "fsdp2")
    step = copied / "zero2" / "global_step2"
    (step / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    assert "by 2 processes, but has the optimizer states of 0" in refusal(step)
    (copied / "shards" / "shard-00001-model-00001-of-00001.safetensors").unlink()
    assert "process 1 are missing" in refusal(copied / "shards")


def test_one_shard_alone_is_no_model(stored):
    shard = stored / "shards" / "shard-00002-model-00001-of-00001.safetensors"
    assert "one process's pieces" in refusal(shard) and str(shard.parent) in refusal(shard)


def test_a_file_that_was_cut_short(copied):
    path = copied / "fsdp2" / "__1_0.distcp"
    path.write_bytes(path.read_bytes()[:1000])
    assert "cut short" in refusal(copied / "fsdp2")


@pytest.mark.parametrize(
    ("files", "words"),
    [
        (["mp_rank_00_model_states.pt", "mp_rank_01_model_states.pt"], "tensor parallelism (mp_rank_01)"),
        (["layer_00-model_00-model_states.pt", "mp_rank_00_model_states.pt"], "pipeline parallelism"),
        (
            ["layer_0_expert_0_mp_rank_00_model_states.pt", "mp_rank_00_model_states.pt"],
            "experts in files of their own",
        ),
        (["mp_rank_00/model_optim_rng.pt", "mp_rank_01/model_optim_rng.pt"], "Megatron's older format"),
    ],
)
def test_models_cut_without_a_description_are_refused_with_the_remedy(tmp_path, files, words):
    for file in files:
        (tmp_path / file).parent.mkdir(exist_ok=True)
        torch.save({"module": {"w": torch.ones(2, 2)}}, tmp_path / file)
    message = refusal(tmp_path)
    assert words in message and ("ds_to_universal.py" in message or "torch_dist" in message)


def test_other_folders_have_no_keys(tmp_path):
    torch.save({"w": torch.ones(2)}, tmp_path / "pytorch_model.bin")
    assert "have no keys" in refusal(f"{tmp_path}:ema")
