"""Tiny mixtures of transformers' classes, and dense models, in folders."""

from __future__ import annotations

import zlib
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

State = dict[str, torch.Tensor]
SIZES = {
    "hidden_size": 16, "intermediate_size": 24, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64, "initializer_range": 0.3,
}  # fmt: skip
EXPERTS = {"num_experts": 6, "num_local_experts": 6, "n_routed_experts": 6, "num_experts_per_tok": 2,
           "moe_intermediate_size": 12}  # fmt: skip
SHARED = {"shared_expert_intermediate_size": 12}
LATENT = {"num_key_value_heads": 4, "q_lora_rank": 8, "kv_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 4,
          "v_head_dim": 4, "n_shared_experts": 1, "first_k_dense_replace": 1, "n_group": 2,
          "topk_group": 1}  # fmt: skip
CLASSES = {
    "llama": "LlamaForCausalLM", "mistral": "MistralForCausalLM", "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM", "olmo2": "Olmo2ForCausalLM", "mixtral": "MixtralForCausalLM",
    "qwen2_moe": "Qwen2MoeForCausalLM", "qwen3_moe": "Qwen3MoeForCausalLM", "flex_olmo": "FlexOlmoForCausalLM",
    "deepseek_v3": "DeepseekV3ForCausalLM",
}  # fmt: skip
MORE = {"qwen3": {"head_dim": 4}, "mixtral": EXPERTS, "qwen2_moe": EXPERTS | SHARED, "flex_olmo": EXPERTS,
        "qwen3_moe": EXPERTS | {"head_dim": 4}, "deepseek_v3": EXPERTS | LATENT}  # fmt: skip


def made(
    kind: str, folder: Path, dtype: torch.dtype = torch.float32, seed: int = 0, apart: bool = True, **sizes: Any
) -> Path:
    """Write a model with random weights, none of them zero or one; and return its folder."""
    import transformers

    torch.manual_seed(seed + zlib.crc32(kind.encode()))
    model_class = getattr(transformers, CLASSES[kind])
    model = model_class(model_class.config_class(**SIZES | MORE.get(kind, {}) | sizes))
    with torch.no_grad():
        for tensor in model.state_dict().values():
            tensor.add_(torch.randn_like(tensor) * 0.05)
    model.to(dtype).save_pretrained(folder, save_original_format=apart)
    return folder


def loaded(folder: Path) -> Any:
    """Load a folder in float32; every weight has to be found, and none may be left over."""
    from transformers import AutoModelForCausalLM

    model, info = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32, output_loading_info=True)
    assert not {kind: names for kind, names in info.items() if names}
    return model.eval()


def logits(folder: Path) -> torch.Tensor:
    """Return a model's logits on some tokens (batch, tokens, vocabulary)."""
    torch.manual_seed(1)
    with torch.inference_mode():
        return loaded(folder)(torch.randint(0, 64, (2, 12))).logits


def weights(folder: Path) -> State:
    """Return all tensors of a folder."""
    return {name: tensor for file in sorted(folder.glob("*.safetensors")) for name, tensor in load_file(file).items()}
