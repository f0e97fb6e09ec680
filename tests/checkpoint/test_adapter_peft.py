"""The fold against peft's own: adapters that peft writes, merged by ``merge_and_unload``."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.errors import CheckpointError
from tests.checkpoint.reading import read_all

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

ALL = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ADAPTERS: dict[str, dict[str, Any]] = {
    "plain": {"r": 4, "lora_alpha": 16, "target_modules": ALL},
    "rslora": {"r": 4, "lora_alpha": 3, "target_modules": ALL, "use_rslora": True},
    "patterns": {
        "r": 4,
        "target_modules": ALL,
        "rank_pattern": {"q_proj": 2, "^model.layers.1.mlp.up_proj": 6, "mlp.up_proj": 3},
        "alpha_pattern": {r"layers\.0\..*proj": 5, "down_proj": 32},
    },
    "embedding": {"r": 4, "target_modules": ["embed_tokens", "lm_head", "q_proj"]},
    "modules": {"r": 4, "target_modules": ["q_proj"], "modules_to_save": ["lm_head", "norm"]},
    "one layer": {"r": 4, "target_modules": ["q_proj"], "layers_to_transform": [1]},
    "lengths": {"r": 4, "target_modules": ALL, "use_dora": True},
    "tokens": {"r": 4, "target_modules": ALL, "trainable_token_indices": {"embed_tokens": [9, 2], "lm_head": [5]}},
    "gaussian": {"r": 8, "target_modules": "all-linear", "init_lora_weights": "gaussian"},
}


def llama() -> Any:
    config = transformers.LlamaConfig(
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        vocab_size=20,
        tie_word_embeddings=False,
    )
    return transformers.LlamaForCausalLM(config)


def gpt2() -> Any:
    config = transformers.GPT2Config(n_embd=16, n_layer=2, n_head=2, vocab_size=20, n_positions=8)
    return transformers.GPT2LMHeadModel(config)


def compare(model: Any, folder: Path, **config: Any) -> None:
    """Save base and trained adapter, let peft load and merge them, and compare every tensor."""
    model.save_pretrained(folder / "base")
    trained = peft.get_peft_model(model, peft.LoraConfig(**config))
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
    trained.save_pretrained(folder / "adapter")
    found = read_all(open_checkpoint(f"{folder / 'base'}+{folder / 'adapter'}"))
    before = read_all(open_checkpoint(folder / "base"))
    # Loaded anew: peft writes patterns in alphabetical order, and the first that matches decides.
    loaded = peft.PeftModel.from_pretrained(type(model).from_pretrained(folder / "base"), folder / "adapter")
    loaded.merge_and_unload().save_pretrained(folder / "merged")
    expected = read_all(open_checkpoint(folder / "merged"))
    assert found.keys() == expected.keys()
    assert any(not torch.equal(found[name], before[name]) for name in found)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=2e-6, atol=1e-7, msg=name)


@pytest.mark.parametrize("name", ADAPTERS)
def test_llama(name: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    compare(llama(), tmp_path, **ADAPTERS[name])


@pytest.mark.parametrize("bias", ["none", "lora_only", "all"])
def test_gpt2_stores_its_weights_turned(bias: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    compare(gpt2(), tmp_path, r=4, target_modules=["c_attn", "c_proj", "c_fc"], bias=bias)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"lora_bias": True}, "lora_bias"),
        ({"init_lora_weights": "pissa"}, "path_initial_model_for_weight_conversion"),
        ({"init_lora_weights": "olora"}, "path_initial_model_for_weight_conversion"),
        ({"layer_replication": [[0, 2], [1, 2]]}, "layer_replication"),
    ],
)
def test_what_is_refused_as_peft_writes_it(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(**{"r": 4, "target_modules": ["q_proj"]} | changes)
    peft.get_peft_model(model, config).save_pretrained(tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=told):
        open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")


@pytest.mark.parametrize("kind", ["LoHaConfig", "IA3Config", "LoKrConfig"])
def test_other_kinds_are_refused(kind: str, tmp_path: Path) -> None:
    model = llama()
    model.save_pretrained(tmp_path / "base")
    more = {"feedforward_modules": []} if kind == "IA3Config" else {}
    peft.get_peft_model(model, getattr(peft, kind)(target_modules=["q_proj"], **more)).save_pretrained(tmp_path / "a")
    with pytest.raises(CheckpointError, match="only LORA can be folded in"):
        open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'a'}")
