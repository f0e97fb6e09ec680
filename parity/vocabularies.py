"""Rows of mergekit 0.1.5 where vocabularies differ: the constants of ``tests/test_mergekits_rows.py``.

    .venv-parity/bin/python -m parity.vocabularies

Row r of model m is 100·m + r everywhere, so a row's first element says whose it is.
"""

from __future__ import annotations

import json
import tempfile
from pathlib import Path
from typing import Any

WIDTH = 8
MODELS = {  # tokens by their numbers, special ones first
    "one": ["<s>", "</s>", "a", "b", "c", "d"],
    "more": ["<s>", "</s>", "a", "b", "c", "d", "e"],
    "other": ["<s>", "</s>", "d", "c", "b", "a"],
}
CASES: dict[str, dict[str, Any]] = {
    "union with one superset": {"models": ("one", "more"), "tokenizer": {"source": "union"}},
    "a model's": {"models": ("one", "other"), "tokenizer": {"source": "other"}},
    "a model's with more": {"models": ("one", "more"), "tokenizer": {"source": "more"}},
    "the base's": {"models": ("one", "more"), "tokenizer": {"source": "base"}},
    "tokens": {
        "models": ("one", "other"),
        "tokenizer": {
            "source": "one",
            "tokens": {
                "a": {"source": {"kind": "zero"}, "force": True},
                "b": {"source": "other", "force": True},
                "c": {"source": {"kind": "model_token", "model": "other", "token": "a"}, "force": True},
                "d": {"source": {"kind": "model_token", "model": "one", "token_id": 0}, "force": True},
            },
        },
    },
}


def model(folder: Path, number: int, tokens: list[str]) -> None:
    """Write a llama of one layer, with its tokenizer."""
    import torch
    from safetensors.torch import save_file

    rows = torch.full((len(tokens), WIDTH), 100.0 * number) + torch.arange(len(tokens))[:, None]
    shapes = {f"self_attn.{name}_proj": (WIDTH, WIDTH) for name in "qkvo"}
    shapes |= {f"mlp.{name}_proj": (WIDTH, WIDTH) for name in ("gate", "up", "down")}
    shapes |= {"input_layernorm": (WIDTH,), "post_attention_layernorm": (WIDTH,)}
    tensors = {f"model.layers.0.{name}.weight": torch.ones(shape) for name, shape in shapes.items()}
    tensors |= {"model.embed_tokens.weight": rows, "lm_head.weight": rows + 50, "model.norm.weight": torch.ones(WIDTH)}
    folder.mkdir()
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    config = {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": WIDTH, "intermediate_size": WIDTH,
        "num_hidden_layers": 1, "num_attention_heads": 2, "num_key_value_heads": 2, "vocab_size": len(tokens),
        "torch_dtype": "float32", "tie_word_embeddings": False, "bos_token_id": 0, "eos_token_id": 1,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    added = [
        {"id": at, "content": token, "special": True, "single_word": False, "lstrip": False, "rstrip": False,
         "normalized": False}
        for at, token in enumerate(tokens[:2])
    ]  # fmt: skip
    vocabulary = {token: at for at, token in enumerate(tokens)}
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    content = {
        "version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
        "pre_tokenizer": level, "post_processor": None, "decoder": level,
        "model": {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
                  "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False, "ignore_merges": False,
                  "vocab": vocabulary, "merges": []},
    }  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(content))
    about = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": "</s>"}
    (folder / "tokenizer_config.json").write_text(json.dumps(about))


def recipe(case: dict[str, Any]) -> dict[str, Any]:
    """Return the recipe of a case: half of each model."""
    named = [{"model": name, "parameters": {"weight": 0.5}} for name in case["models"]]
    return {
        "merge_method": "linear", "models": named, "base_model": case["models"][0], "dtype": "float32",
        "tokenizer": case["tokenizer"],
    }  # fmt: skip


def main() -> None:
    """Print the first element of each row of the embedding that mergekit writes."""
    import os

    import yaml
    from mergekit.config import MergeConfiguration
    from mergekit.merge import run_merge
    from mergekit.options import MergeOptions
    from safetensors.torch import load_file

    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for number, (name, tokens) in enumerate(MODELS.items()):
            model(Path(name), number + 1, tokens)
        for name, case in CASES.items():
            config = MergeConfiguration.model_validate(yaml.safe_load(yaml.safe_dump(recipe(case))))
            run_merge(config, "out", options=MergeOptions(copy_tokenizer=True, write_model_card=False))
            made = load_file(next(Path("out").glob("model*.safetensors")))
            print(json.dumps({name: made["model.embed_tokens.weight"][:, 0].tolist()}))


if __name__ == "__main__":
    main()
