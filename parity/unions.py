"""The rows that mergekit gives each token of a union of two tokenizers: the digest that ``tests/test_unions.py`` holds.

    python -m parity.unions

Models are made on the spot, in float32, so that means of two rows are exact.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file

HIDDEN = 8
ALPHABET = [chr(letter) for letter in range(ord("a"), ord("z") + 1)] + ["Ġ", "<", ">"]
MODELS: dict[str, tuple[list[str], list[str]]] = {  # words, each of two pieces, and special tokens
    "base": (["Ġ s", "Ġ a", "n o", "a n", "Ġa n", "Ġan d", "w i"], ["<s>", "</s>"]),
    "chat": (
        ["i n", "w in", "e r", "t er", "a n", "an d", "Ġ and", "n o", "Ġ s", "no w", "Ġs now"],
        ["<s>", "</s>", "<|im_end|>"],
    ),
    "code": (["d e", "de f", "Ġ s", "w i", "i n", "s i"], ["<s>", "<tool>"]),
}  # fmt: skip
VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")


def tokenizer(merges: list[str], special: list[str], more: list[str] | None = None) -> dict[str, Any]:
    """Return the content of a byte-level ``tokenizer.json``: special tokens first, then ``more`` words as they are."""
    texts = [*special, *ALPHABET, *("".join(merge.split(" ")) for merge in merges), *(more or [])]
    texts = list(dict.fromkeys(texts))
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": True}
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [{"id": texts.index(text), "content": text, **flags} for text in special],
        "normalizer": None,
        "pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True},
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {text: number for number, text in enumerate(texts)},
            "merges": merges,
        },
    }


def write_models(folder: Path) -> None:
    """Write the models, each with its tokenizer; one of them has the other's special token among its words."""
    for seed, (name, (merges, special)) in enumerate(MODELS.items()):
        content = tokenizer(merges, special, ["<tool>"] * (name == "base"))
        rows = len(content["model"]["vocab"])
        generator = torch.Generator().manual_seed(seed)
        shapes = {"model.embed_tokens.weight": (rows, HIDDEN), "lm_head.weight": (rows, HIDDEN)}
        shapes |= {"model.norm.weight": (HIDDEN,)}
        for part, shape in {
            "self_attn.q_proj": (HIDDEN, HIDDEN),
            "self_attn.k_proj": (HIDDEN, HIDDEN),
            "self_attn.v_proj": (HIDDEN, HIDDEN),
            "self_attn.o_proj": (HIDDEN, HIDDEN),
            "mlp.gate_proj": (16, HIDDEN),
            "mlp.up_proj": (16, HIDDEN),
            "mlp.down_proj": (HIDDEN, 16),
            "input_layernorm": (HIDDEN,),
            "post_attention_layernorm": (HIDDEN,),
        }.items():
            shapes[f"model.layers.0.{part}.weight"] = shape
        own = folder / name
        own.mkdir(parents=True)
        tensors = {tensor: torch.randn(shape, generator=generator) for tensor, shape in shapes.items()}
        save_file(tensors, own / "model.safetensors", metadata={"format": "pt"})
        config = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "hidden_size": HIDDEN}
        config |= {"intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": rows}
        config |= {"num_key_value_heads": 2, "tie_word_embeddings": False, "torch_dtype": "float32"}
        config |= {"bos_token_id": 0, "eos_token_id": 1}
        (own / "config.json").write_text(json.dumps(config), encoding="utf-8")
        (own / "tokenizer.json").write_text(json.dumps(content), encoding="utf-8")
        described = {"tokenizer_class": "PreTrainedTokenizerFast", "bos_token": "<s>", "eos_token": special[1]}
        (own / "tokenizer_config.json").write_text(json.dumps(described), encoding="utf-8")


def recipe(folder: Path) -> dict[str, Any]:
    """Return a union of the three: halves of two, and the base with weight 0; and a token that none has."""
    weights = {"base": 0.0, "chat": 0.5, "code": 0.5}
    models = [{"model": str(folder / name), "parameters": {"weight": weight}} for name, weight in weights.items()]
    tokens = {"<new>": {"source": {"kind": "model_token", "model": str(folder / "chat"), "token": "win"}}}
    return {
        "merge_method": "linear",
        "base_model": str(folder / "base"),
        "models": models,
        "dtype": "float32",
        "tokenizer": {"source": "union", "tokens": tokens},
    }


def digest_of(numbers: Mapping[str, int], output: Path) -> str:
    """Return the digest of all tokens with their rows, in the order of their texts."""
    tensors = load_file(output / "model.safetensors")
    digest = hashlib.sha256()
    for text in sorted(numbers):
        digest.update(text.encode())
        for name in VOCABULARY:
            digest.update(tensors[name][numbers[text]].numpy().tobytes())
    return digest.hexdigest()


def main() -> int:
    """Print mergekit's digest, its tokens, and those of them that it added."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge
    from transformers import AutoTokenizer

    with tempfile.TemporaryDirectory() as here:
        write_models(Path(here))
        out = Path(here) / "out"
        options = MergeOptions(write_model_card=False, quiet=True)
        run_merge(MergeConfiguration.model_validate(recipe(Path(here))), str(out), options=options)
        loaded = AutoTokenizer.from_pretrained(out)
        numbers = loaded.get_vocab()
        print(digest_of(numbers, out))
        print(len(numbers), sorted(text for text, number in numbers.items() if number in loaded.added_tokens_decoder))
        print({text: info.special for text, info in ((i.content, i) for i in loaded.added_tokens_decoder.values())})
    return 0


if __name__ == "__main__":
    sys.exit(main())
