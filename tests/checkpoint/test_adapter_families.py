"""Adapters of families whose files have other names than transformers' modules: the outputs of peft's own forward."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_lite

peft = pytest.importorskip("peft")
transformers = pytest.importorskip("transformers")
pytestmark = pytest.mark.filterwarnings("ignore")

TEXT: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "vocab_size": 64,
    "pad_token_id": 0,
}
TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "image_size": 28,
    "patch_size": 14,
}
QWEN_TOWER: dict[str, Any] = {"depth": 2, "num_heads": 4, "patch_size": 14}
IDS = {"input_ids": torch.arange(20, 40)[None]}
IMAGE = {"pixel_values": torch.linspace(-1, 1, 3 * 28 * 28).view(1, 3, 28, 28)}
TOKENS = {"image_token_id": 10, "video_token_id": 11, "vision_start_token_id": 12, "vision_end_token_id": 13}
MROPE = {"type": "mrope", "rope_type": "default", "mrope_section": [1, 1, 2]}


def made(kind: str, config: str, **settings: Any) -> Any:
    return getattr(transformers, kind)(getattr(transformers, config)(**settings))


def gemma3() -> Any:
    text, tower = TEXT | {"head_dim": 8}, TOWER
    own = {"mm_tokens_per_image": 4, "image_token_index": 10}
    return made("Gemma3ForConditionalGeneration", "Gemma3Config", text_config=text, vision_config=tower, **own)


def mistral3() -> Any:
    text, tower = TEXT | {"model_type": "mistral", "head_dim": 8}, TOWER | {"model_type": "pixtral", "head_dim": 8}
    kind = "Mistral3ForConditionalGeneration"
    return made(kind, "Mistral3Config", text_config=text, vision_config=tower, image_token_index=10)


def qwen2_vl() -> Any:
    text, tower = TEXT | {"rope_scaling": MROPE}, QWEN_TOWER | {"embed_dim": 32, "hidden_size": 32}
    return made("Qwen2VLForConditionalGeneration", "Qwen2VLConfig", text_config=text, vision_config=tower, **TOKENS)


def qwen25_vl(tied: bool = False) -> Any:
    text = TEXT | {"rope_scaling": MROPE, "tie_word_embeddings": tied}
    tower = QWEN_TOWER | {
        "hidden_size": 32,
        "intermediate_size": 48,
        "out_hidden_size": 32,
        "fullatt_block_indexes": [1],
    }
    kind = "Qwen2_5_VLForConditionalGeneration"
    return made(kind, "Qwen2_5_VLConfig", text_config=text, vision_config=tower, tie_word_embeddings=tied, **TOKENS)


def vit() -> Any:
    return made("ViTForImageClassification", "ViTConfig", **TOWER)


def nemotron_h() -> Any:
    sizes = {"head_dim": 8, "num_hidden_layers": 4, "hybrid_override_pattern": "M-*M"}
    mamba = {"mamba_num_heads": 8, "mamba_head_dim": 8, "n_groups": 1, "ssm_state_size": 4}
    return made("NemotronHForCausalLM", "NemotronHConfig", **TEXT | sizes | mamba)


def mixtral() -> Any:
    return made("MixtralForCausalLM", "MixtralConfig", **TEXT, num_local_experts=4, num_experts_per_tok=2)


FAMILIES: dict[str, tuple[Callable[[], Any], Any, Any]] = {
    "Gemma-3": (gemma3, r".*language_model.*\.(q_proj|up_proj)", IDS),
    "Gemma-3, all": (gemma3, "all-linear", IDS),
    "Gemma-3, tied embedding": (gemma3, r".*language_model.*(q_proj|embed_tokens)", IDS),
    "Mistral-3": (mistral3, r".*language_model.*\.(q_proj|up_proj)", IDS),
    "Qwen2-VL": (qwen2_vl, ["q_proj", "up_proj"], IDS),
    "Qwen2-VL, all": (qwen2_vl, "all-linear", IDS),
    "Qwen2.5-VL": (qwen25_vl, ["q_proj", "up_proj"], IDS),
    "Qwen2.5-VL, tied embedding": (lambda: qwen25_vl(True), ["q_proj", "embed_tokens"], IDS),
    "ViT": (vit, ["q_proj", "v_proj", "fc1"], IMAGE),
    "Nemotron-H": (nemotron_h, ["in_proj", "q_proj", "up_proj"], IDS),
    "Mixtral": (mixtral, "all-linear", IDS),
}
ALIKE = ("Gemma-3", "Gemma-3, all", "Qwen2-VL, all", "Qwen2.5-VL", "Qwen2.5-VL, tied embedding")  # as another one is


@pytest.mark.parametrize("name", [pytest.param(name, marks=[pytest.mark.slow] * (name in ALIKE)) for name in FAMILIES])
def test_a_family(name: str, tmp_path: Path) -> None:
    make, targets, inputs = FAMILIES[name]
    torch.manual_seed(0)
    made_anew = make()
    made_anew.save_pretrained(tmp_path / "base")
    kind = type(made_anew)
    trained = peft.get_peft_model(
        kind.from_pretrained(tmp_path / "base"), peft.LoraConfig(r=4, target_modules=targets)
    ).eval()
    with torch.no_grad():
        for parameter in trained.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter) * 0.1)
        trained.save_pretrained(tmp_path / "adapter")
        expected = trained(**inputs).logits
    recipe = {"merge_method": "passthrough", "models": [{"model": f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"}]}
    (tmp_path / "r.yml").write_text(json.dumps(recipe | {"dtype": "float32"}))
    mergekit_lite.merge(tmp_path / "r.yml", tmp_path / "out")
    model, loading = kind.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not any(loading.values()), loading
    with torch.no_grad():
        assert float((model.eval()(**inputs).logits - expected).abs().max()) < 2e-6
