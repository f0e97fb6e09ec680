"""Small folders of several models, of exactly the files that diffusers and sentence-transformers save."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

State = dict[str, torch.Tensor]
INDEX = {
    "_class_name": "StableDiffusionPipeline",
    "_diffusers_version": "0.42.1",
    "feature_extractor": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", "DDIMScheduler"],
    "text_encoder": ["transformers", "CLIPTextModel"],
    "tokenizer": ["transformers", "CLIPTokenizer"],
    "unet": ["diffusers", "UNet2DConditionModel"],
    "vae": ["diffusers", "AutoencoderKL"],
}
SHAPES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "text_encoder": {"text_model.embeddings.token_embedding.weight": (6, 4), "text_model.final_layer_norm.bias": (4,)},
    "unet": {"conv_in.weight": (4, 2, 3, 3), "down_blocks.0.attentions.0.proj_in.weight": (4, 4), "conv_in.bias": (4,)},
    "vae": {"encoder.conv_in.weight": (2, 3, 3, 3), "quant_conv.bias": (2,)},
}
SMALL = {
    "model_index.json": INDEX,
    "scheduler/scheduler_config.json": {"_class_name": "DDIMScheduler", "clip_sample": True},
    "text_encoder/config.json": {
        "architectures": ["CLIPTextModel"],
        "model_type": "clip_text_model",
        "dtype": "float32",
    },
    "tokenizer/tokenizer.json": {"model": {"vocab": {"a": 0}}},
    "tokenizer/tokenizer_config.json": {"tokenizer_class": "CLIPTokenizer"},
    "unet/config.json": {"_class_name": "UNet2DConditionModel", "sample_size": 8, "cross_attention_dim": 4},
    "vae/config.json": {"_class_name": "AutoencoderKL", "latent_channels": 4, "force_upcast": True},
}
MODULES = [
    {"idx": 0, "name": "0", "path": "", "type": "sentence_transformers.base.modules.transformer.Transformer"},
    {"idx": 1, "name": "1", "path": "1_Pooling", "type": "sentence_transformers.sentence_transformer.modules.Pooling"},
    {"idx": 2, "name": "2", "path": "2_Dense", "type": "sentence_transformers.base.modules.dense.Dense"},
]
DENSE = {"in_features": 4, "out_features": 2, "bias": True, "activation_function": "torch.nn.modules.activation.Tanh"}
SENTENCES = {
    "modules.json": MODULES,
    "config.json": {"architectures": ["BertModel"], "model_type": "bert", "dtype": "float32", "num_hidden_layers": 1},
    "config_sentence_transformers.json": {"model_type": "SentenceTransformer"},
    "sentence_bert_config.json": {"transformer_task": "feature-extraction"},
    "tokenizer.json": {"model": {"vocab": {"a": 0}}},
    "1_Pooling/config.json": {"embedding_dimension": 4, "pooling_mode": "mean"},
    "2_Dense/config.json": DENSE,
}
OF_SENTENCES: Mapping[str, Mapping[str, tuple[int, ...]]] = {
    "": {"embeddings.word_embeddings.weight": (6, 4), "encoder.layer.0.output.dense.weight": (4, 4)},
    "2_Dense": {"linear.weight": (2, 4), "linear.bias": (2,)},
}


def states(shapes: Mapping[str, Mapping[str, tuple[int, ...]]], seed: int) -> dict[str, State]:
    """Return a state for each folder."""
    generator = torch.Generator().manual_seed(seed)
    return {
        folder: {name: torch.randn(shape, generator=generator) for name, shape in own.items()}
        for folder, own in shapes.items()
    }


def write_small(root: Path, small: Mapping[str, object]) -> None:
    for name, content in small.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content, indent=2))


def write_pipeline(root: Path, seed: int, dtype: torch.dtype = torch.float32, variant: str = "") -> dict[str, State]:
    """Write a diffusers pipeline, and return the states of its parts."""
    write_small(root, SMALL)
    parts = states(SHAPES, seed)
    for folder, own in parts.items():
        stem = "model" if folder == "text_encoder" else "diffusion_pytorch_model"
        parts[folder] = {name: tensor.to(dtype) for name, tensor in own.items()}
        save_file(parts[folder], root / folder / f"{stem}{variant}.safetensors", metadata={"format": "pt"})
    return parts


def write_sentences(root: Path, seed: int, modules: object = MODULES) -> dict[str, State]:
    """Write a sentence-transformers model with a dense module, and return the states of its parts."""
    write_small(root, SENTENCES | {"modules.json": modules})
    parts = states(OF_SENTENCES, seed)
    for folder, own in parts.items():
        save_file(own, root / folder / "model.safetensors", metadata={"format": "pt"})
    return parts


def stored(root: Path) -> dict[str, State]:
    """Return the states of all safetensors files below a folder, joined by the folder they lie in."""
    found: dict[str, State] = {}
    for path in sorted(root.rglob("*.safetensors")):
        folder = path.parent.relative_to(root).as_posix().removeprefix(".")
        found.setdefault(folder, {}).update(load_file(path))
    return found
