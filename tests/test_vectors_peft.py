"""Adapters made of a difference: peft loads them, merges them to what we say, and so do we."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.errors import PlanError
from mergekit_lite.vectors.application import apply_vectors
from mergekit_lite.vectors.extraction import extract_vector
from tests.checkpoint.reading import read_all
from tests.models import read_folder, state, tuned, write_folder

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")


def model(seed: int, kind: str = "Llama", **changes: Any) -> Any:
    torch.manual_seed(seed)
    config = getattr(transformers, f"{kind}Config")(
        **{
            "hidden_size": 32,
            "intermediate_size": 48,
            "num_hidden_layers": 2,
            "num_attention_heads": 2,
            "num_key_value_heads": 1,
            "vocab_size": 20,
            "tie_word_embeddings": False,
        }
        | changes
    )
    return getattr(transformers, f"{kind}ForCausalLM")(config)


def save_pair(folder: Path, kind: str, matrices_only: bool = False) -> None:
    """A model, and what became of it: every matrix took a step of rank 3, and all else a small one."""
    made = model(0, kind)
    if kind == "Qwen2":
        torch.nn.init.normal_(made.model.layers[0].self_attn.q_proj.bias, std=0.1)
    made.save_pretrained(folder / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in made.named_parameters():
            if parameter.ndim == 2 and "proj" in name:
                left, right = (torch.randn(size, 3, generator=generator) for size in parameter.shape)
                parameter += 0.02 * left @ right.T
            elif not matrices_only:
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    made.save_pretrained(folder / "tuned")


def merged_by_peft(folder: Path, kind: str) -> dict[str, torch.Tensor]:
    named = f"{kind}Model" if kind.endswith("Head") else f"{kind}ForCausalLM"
    base = getattr(transformers, named).from_pretrained(folder / "base")
    loaded = peft.PeftModel.from_pretrained(base, folder / "adapter")
    loaded.merge_and_unload().save_pretrained(folder / "merged")
    return read_all(open_checkpoint(folder / "merged"))


@pytest.mark.parametrize("kind", ["Llama", "Qwen2"])
@pytest.mark.parametrize("matrices_only", [True, False])
@pytest.mark.parametrize("how", [{"rank": 4}, {"energy": 0.9999}], ids=str)
def test_peft_loads_what_is_made(kind: str, matrices_only: bool, how: dict[str, Any], tmp_path: Path) -> None:
    save_pair(tmp_path, kind, matrices_only)
    made = extract_vector(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", format="lora", **how)
    assert made.error < (1e-3 if "rank" in how else 1e-2)
    assert sorted(path.name for path in (tmp_path / "adapter").iterdir()) == [
        "adapter_config.json",
        "adapter_model.safetensors",
        "mergekit_lite_manifest.json",
    ]
    theirs = merged_by_peft(tmp_path, kind)
    ours = read_all(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))
    wanted = read_all(open_checkpoint(tmp_path / "tuned"))
    assert theirs.keys() == ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        torch.testing.assert_close(theirs[name], ours[name], rtol=2e-6, atol=1e-7, msg=name)
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=3e-5 if "rank" in how else 5e-3, msg=name)


def test_several_adapters_act_as_products(tmp_path: Path) -> None:
    """Two adapters scaled and added, against peft's merge of one after the other."""
    base = model(0)
    base.save_pretrained(tmp_path / "base")
    for number in (1, 2):
        config = peft.LoraConfig(r=3 + number, lora_alpha=8, target_modules=["q_proj", "down_proj"])
        trained = peft.get_peft_model(model(0), config)
        with torch.no_grad():
            for parameter in trained.parameters():
                if parameter.requires_grad:
                    parameter.add_(torch.randn_like(parameter) * 0.1)
        trained.save_pretrained(tmp_path / f"a{number}")
    merged = model(0)
    for number in (1, 2):
        merged = peft.PeftModel.from_pretrained(merged, tmp_path / f"a{number}").merge_and_unload()
    expected = merged.state_dict()
    apply_vectors(tmp_path / "base", [str(tmp_path / "a1"), str(tmp_path / "a2")], tmp_path / "out")
    for name, tensor in read_folder(tmp_path / "out").items():
        torch.testing.assert_close(tensor, expected[name], rtol=2e-6, atol=1e-7, msg=name)


def test_modules_of_lesser_rank_have_patterns(tmp_path: Path) -> None:
    save_pair(tmp_path, "Llama")
    extract_vector(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", format="lora", rank=20)
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["r"] == config["lora_alpha"] == 20
    assert config["rank_pattern"] and set(config["rank_pattern"].values()) == {16}  # k_proj and v_proj are (16, 32)
    theirs = merged_by_peft(tmp_path, "Llama")
    for name, tensor in read_all(open_checkpoint(tmp_path / "tuned")).items():
        torch.testing.assert_close(theirs[name], tensor, rtol=0, atol=1e-5, msg=name)


@pytest.mark.parametrize("bare", [False, True])
@pytest.mark.parametrize("how", [{"rank": 4}, {"energy": 0.9999}], ids=str)
def test_layers_that_store_their_weights_transposed(bare: bool, how: dict[str, Any], tmp_path: Path) -> None:
    """GPT-2's: square and oblong ones, a table of positions; named as its first checkpoint names them or in full."""
    config = transformers.GPT2Config(
        n_embd=32, n_layer=2, n_head=2, vocab_size=20, n_positions=16, bos_token_id=0, eos_token_id=0
    )
    torch.manual_seed(0)
    base = transformers.GPT2LMHeadModel(config)
    base.save_pretrained(tmp_path / "base")
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for name, parameter in base.named_parameters():
            if parameter.ndim == 2 and ".h." in name:
                left, right = (torch.randn(size, 3, generator=generator) for size in parameter.shape)
                parameter += 0.02 * left @ right.T
            elif "wte" not in name:  # the head is tied to it
                parameter += 0.01 * torch.randn(parameter.shape, generator=generator)
    base.save_pretrained(tmp_path / "tuned")
    if bare:
        for name in ("base", "tuned"):
            file = tmp_path / name / "model.safetensors"
            tensors = {key.removeprefix("transformer."): tensor for key, tensor in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})
    made = extract_vector(tmp_path / "base", tmp_path / "tuned", tmp_path / "adapter", format="lora", **how)
    assert made.error < (1e-3 if "rank" in how else 1e-2)
    theirs = merged_by_peft(tmp_path, "GPT2LMHead")
    ours = read_all(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))
    wanted = read_all(open_checkpoint(tmp_path / "tuned"))
    assert ours.keys() == wanted.keys()
    for name, tensor in wanted.items():
        theirs_of_it = theirs["transformer." * bare + name]
        torch.testing.assert_close(theirs_of_it, ours[name], rtol=2e-6, atol=1e-7, msg=name)
        torch.testing.assert_close(ours[name], tensor, rtol=0, atol=3e-5 if "rank" in how else 5e-3, msg=name)


def test_what_an_adapter_can_not_hold(tmp_path: Path) -> None:
    base = state(0)
    del base["lm_head.weight"]
    write_folder(tmp_path / "tied", base, config={"tie_word_embeddings": True})
    write_folder(tmp_path / "embeds", tuned(base, 1))
    write_folder(tmp_path / "more", base | {"value_head.weight": torch.ones(1, 8)})
    experts = {"model.experts.gate_up": torch.zeros(2, 3, 4)}
    write_folder(tmp_path / "experts", base | experts)
    write_folder(tmp_path / "trained", base | {name: tensor + 1 for name, tensor in experts.items()})
    for before, after, told in (
        ("tied", "embeds", "ties its head to it"),
        ("tied", "more", "value_head.weight: only one of the models has it"),
        ("experts", "trained", "no weight or bias of a layer"),
    ):
        with pytest.raises(PlanError, match=told):
            extract_vector(tmp_path / before, tmp_path / after, tmp_path / "adapter", format="lora", rank=2)
        assert not (tmp_path / "adapter").exists()
