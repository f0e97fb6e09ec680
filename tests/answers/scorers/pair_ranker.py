"""A tiny pair ranker on DeBERTa-v3, in both published layouts, with weights that follow from their names alone."""

from __future__ import annotations

import json
import string
from pathlib import Path
from typing import Any
from zlib import crc32

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor

HIDDEN = 16
PREFIXES = ("<|source|>", "<|candidate1|>", "<|candidate2|>", "<|candidate|>")
SPECIAL = ("[PAD]", "[CLS]", "[SEP]", "[UNK]")
PIECES = ("▁", *string.ascii_letters, *string.digits, *"?!.,:;<>|[]()'\n", "▁the", "▁is", "▁one", "▁and", "ing", "er")
LENGTHS = {"source_maxlength": 30, "candidate_maxlength": 40}  # tokens
CONFIG = {
    "model_type": "deberta-v2",
    "hidden_size": HIDDEN,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 64,
    "relative_attention": True,
    "position_buckets": 8,
    "max_relative_positions": -1,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "pos_att_type": ["p2c", "c2p"],
    "position_biased_input": False,
    "layer_norm_eps": 1e-7,
    "type_vocab_size": 0,
    "pad_token_id": 0,
}


def write_backbone(folder: Path) -> Path:
    """Write a backbone as microsoft/deberta-v3-large is laid out: its embeddings have more rows than its tokenizer."""
    _write_tokenizer(folder, ())
    config = {**CONFIG, "architectures": ["DebertaV2Model"], "vocab_size": len(_vocabulary()) + 8}
    _write(folder, config, _named("deberta.", _backbone(config["vocab_size"])))
    return folder


def write_ranker(folder: Path, backbone: str = "microsoft/deberta-v3-large", **changes: Any) -> Path:
    """Write a ranker as llm-blender/PairRM is laid out: a configuration of its own, which names the backbone."""
    config = {"ranker_type": "pairranker", "model_type": "deberta", "model_name": backbone, "n_tasks": 1, **LENGTHS}
    folder.mkdir()
    _write(folder, {**config, **changes}, ranker_tensors(config["n_tasks"]))
    return folder


def write_for_transformers(folder: Path, **changes: Any) -> Path:
    """Write the same ranker as llm-blender/PairRM-hf is laid out: with transformers' configuration, and a tokenizer."""
    first = len(_vocabulary())
    names = ("source_prefix_id", "cand1_prefix_id", "cand2_prefix_id", "cand_prefix_id")
    ids = {name: first + place for place, name in enumerate(names)}
    config = {**CONFIG, **ids, "architectures": ["DebertaV2PairRM"], "vocab_size": first + 4, "n_tasks": 1}
    _write_tokenizer(folder, PREFIXES)
    _write(folder, {**config, "sep_token_id": 2, "drop_out": 0.05, **changes}, ranker_tensors())
    return folder


def ranker_tensors(tasks: int = 1) -> dict[str, Tensor]:
    """Return the tensors of the ranker by their published names."""
    head = {
        "head_layer.1.weight": (HIDDEN, 2 * HIDDEN),
        "head_layer.1.bias": (HIDDEN,),
        "head_layer.4.weight": (tasks, HIDDEN),
        "head_layer.4.bias": (tasks,),
    }
    backbone = _backbone(len(_vocabulary()) + len(PREFIXES))
    return _named("pretrained_model.", backbone) | {name: _drawn(name, shape) for name, shape in head.items()}


def _backbone(vocabulary: int) -> dict[str, Tensor]:
    from transformers import DebertaV2Config, DebertaV2Model

    model = DebertaV2Model(DebertaV2Config(**{**CONFIG, "vocab_size": vocabulary}))
    return {name: _drawn(name, tuple(tensor.shape)) for name, tensor in model.named_parameters()}


def _drawn(name: str, shape: tuple[int, ...]) -> Tensor:
    """Return float32 numbers that any version of torch makes the same."""
    draws = np.random.default_rng(crc32(name.encode())).standard_normal(shape)
    return torch.tensor(0.4 * draws + (1.0 if name.endswith("LayerNorm.weight") else 0.0), dtype=torch.float32)


def _named(prefix: str, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {f"{prefix}{name}": tensor for name, tensor in tensors.items()}


def _vocabulary() -> list[str]:
    return [*SPECIAL, *PIECES, "[MASK]"]


def _write(folder: Path, config: dict[str, Any], tensors: dict[str, Tensor]) -> None:
    (folder / "config.json").write_text(json.dumps(config, indent=1))
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _write_tokenizer(folder: Path, added: tuple[str, ...]) -> None:
    from tokenizers import AddedToken, Tokenizer, models, normalizers, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    scores = [(piece, 0.0 if piece in SPECIAL else -1.0 - 0.01 * place) for place, piece in enumerate(_vocabulary())]
    tokenizer = Tokenizer(models.Unigram(scores, unk_id=3))
    tokenizer.normalizer = normalizers.Strip()
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
    tokenizer.add_special_tokens([AddedToken(text, special=True) for text in (*SPECIAL, "[MASK]")])
    tokenizer.post_processor = processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[("[CLS]", 1), ("[SEP]", 2)]
    )
    names = {"pad_token": "[PAD]", "cls_token": "[CLS]", "sep_token": "[SEP]", "unk_token": "[UNK]"}
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, mask_token="[MASK]", **names)
    fast.add_tokens(list(added))
    folder.mkdir()
    fast.save_pretrained(folder)
