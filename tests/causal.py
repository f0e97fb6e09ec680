"""Tiny causal language models of the transformers library, with random weights."""

from __future__ import annotations

import torch

ARCHITECTURES = ("llama", "gpt2", "qwen2", "gemma2", "granite", "cohere")


def causal_model(architecture: str = "llama", vocabulary: int = 340, hidden: int = 32, layers: int = 2, seed: int = 0):
    """A model in float32 and evaluation mode; its weights are large enough for log-probabilities that differ."""
    import transformers

    if architecture == "gpt2":
        config = transformers.GPT2Config(
            vocab_size=vocabulary, n_embd=hidden, n_layer=layers, n_head=2, n_positions=2048, initializer_range=0.2
        )
    else:
        # Not dir(transformers): that takes half a second, and the names' values are modules still to be imported.
        names = transformers.models.auto.configuration_auto.CONFIG_MAPPING_NAMES.values()
        kind = getattr(transformers, next(name for name in names if name.lower() == f"{architecture}config"))
        extra = {
            "gemma2": {"head_dim": 16, "final_logit_softcapping": 5.0, "sliding_window": 64},
            "granite": {"logits_scaling": 4.0},
            "cohere": {"logit_scale": 0.25},
            "gemma3text": {"head_dim": 16, "sliding_window": 8, "layer_types": ["sliding_attention", "full_attention"]},
            "mistral": {"sliding_window": 8},
            "lfm2": {"layer_types": ["conv", "full_attention"]},
        }
        config = kind(
            vocab_size=vocabulary,
            hidden_size=hidden,
            intermediate_size=2 * hidden,
            num_hidden_layers=layers,
            num_attention_heads=2,
            num_key_value_heads=2,
            max_position_embeddings=2048,
            initializer_range=0.2,
            tie_word_embeddings=architecture in ("gemma2", "cohere"),
            **extra.get(architecture, {}),
        )
    config.bos_token_id = config.eos_token_id = config.pad_token_id = 0
    torch.manual_seed(seed)
    return transformers.AutoModelForCausalLM.from_config(config).eval()
