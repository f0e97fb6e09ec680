"""Adapters on bases under other names than those that peft saw: of other versions of transformers, or of wrappers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.errors import CheckpointError
from tests.adapters import PREFIX, lora, write_adapter
from tests.checkpoint.reading import read_all
from tests.models import State, same_bytes, state, write_folder

LAYOUTS = {  # the same tensors as peft names them, and as files of the hub do
    "Gemma-3, Mistral-3": ("model.language_model.", "language_model.model."),
    "Qwen2-VL": ("model.language_model.", "model."),
    "Qwen3-VL, by a text model": ("model.", "model.language_model."),
    "Gemma-3, by a text model": ("model.", "language_model.model."),
    "Nemotron-H": ("model.", "backbone."),
    "an embedding model": ("", "model."),
    "torch.compile": ("_orig_mod.model.", "model."),
    "FSDP": ("_fsdp_wrapped_module.model.", "model."),
    "the same": ("model.", "model."),
}


def tower(front: str, hidden: int = 8) -> State:
    """A vision tower whose layers have the names and shapes of the text's."""
    return {
        f"{front}.encoder.layers.{n}.self_attn.{part}_proj.weight": torch.randn(hidden, hidden).bfloat16()
        for n in range(2)
        for part in "qkv"
    }


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("parts", [("q_proj",), ("q_proj", "up_proj")])
def test_text_layers_of_another_naming(name: str, parts: tuple[str, ...], tmp_path: Path) -> None:
    peft_name, file_name = LAYOUTS[name]
    modules = {"q_proj": ("self_attn.q_proj", 8), "up_proj": ("mlp.up_proj", 16)}
    tensors: State = {}
    for layer in range(2):
        for part in parts:
            module, rows = modules[part]
            tensors |= lora(f"{peft_name}layers.{layer}.{module}", rows, 8, seed=layer)
    base = {key.replace("model.", file_name, 1): value for key, value in state(0).items()} | tower("vision_tower")
    write_folder(tmp_path / "base", base)
    write_adapter(tmp_path / "adapter", tensors)
    opened = open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    found = read_all(opened)
    assert found.keys() == base.keys()
    for key, tensor in found.items():
        is_adapted = "tower" not in key and any(f".{part}." in key for part in parts)
        assert same_bytes(tensor, base[key]) != is_adapted, key
        if is_adapted:
            a, b = (
                tensors[PREFIX + key.replace(file_name, peft_name, 1).replace("weight", f"lora_{x}.weight")]
                for x in "AB"
            )
            torch.testing.assert_close(tensor, base[key].float() + 2 * b @ a, rtol=1e-6, atol=1e-8)
    assert any("under other names" in note for note in opened.notes) == (peft_name != file_name)


def test_names_that_fit_nothing_are_one_sentence(tmp_path: Path) -> None:
    tensors: State = {}
    for layer in range(8):
        tensors |= lora(f"transformer.blocks.{layer}.attn.wq", 8, 8)
    write_folder(tmp_path / "base", state(0))
    write_adapter(tmp_path / "adapter", tensors)
    with pytest.raises(CheckpointError) as caught:
        open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}")
    message = str(caught.value)
    assert "\n" not in message and "transformer.blocks…" in message and "model.layers…" in message


FORMS = {
    "default": lambda name: name.replace("lora_A", "lora_A.default").replace("lora_B", "lora_B.default"),
    "another name": lambda name: name.replace("lora_A", "lora_A.my-lora").replace("lora_B", "lora_B.my-lora"),
    "no prefix": lambda name: name.removeprefix(PREFIX),
}


@pytest.mark.parametrize("form", FORMS)
def test_names_as_other_programs_store_them(form: str, tmp_path: Path) -> None:
    rename: Any = FORMS[form]
    own = "my-lora" if form == "another name" else "default"
    plain = lora("model.layers.0.self_attn.q_proj", 8, 8) | {f"{PREFIX}lm_head.weight": torch.ones(16, 8)}
    named = {rename(name): tensor for name, tensor in plain.items() if "lora" in name}
    named |= {f"{PREFIX}lm_head.modules_to_save.{own}.weight": torch.ones(16, 8)}
    named |= {f"{PREFIX}lm_head.original_module.weight": torch.zeros(16, 8)}
    write_folder(tmp_path / "base", state(0))
    write_adapter(tmp_path / "plain", plain)
    write_adapter(tmp_path / "named", named)
    one, other = (read_all(open_checkpoint(f"{tmp_path / 'base'}+{tmp_path / name}")) for name in ("plain", "named"))
    assert all(same_bytes(one[name], other[name]) for name in one)
