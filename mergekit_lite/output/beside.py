"""What travels beside the weights: index, config, tokenizer and other small files, model card, manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite._version import __version__
from mergekit_lite.checkpoint import Checkpoint, ties
from mergekit_lite.checkpoint.folder import WEIGHT_SUFFIXES, inside
from mergekit_lite.errors import CheckpointError
from mergekit_lite.output.card import model_card
from mergekit_lite.output.layout import INDEX_NAME, index_json
from mergekit_lite.output.workspace import is_single_file, manifest_path
from mergekit_lite.plan import Plan

SMALL = 100_000_000  # tokenizers of large vocabularies come to some tens of megabytes
FOREIGN_WEIGHTS = (
    *WEIGHT_SUFFIXES,
    ".gguf",
    ".onnx",
    ".h5",
    ".msgpack",
    ".ckpt",
    ".ot",
    ".npz",
    ".index.json",
)
LAYER_COUNTS = ("num_hidden_layers", "n_layer", "n_layers", "num_layers")
CODE_SUFFIXES = (".py", ".pyc", ".sh", ".so", ".ipynb")
REPLACED = (
    "config.json",
    "README.md",
    "mergekit_lite_manifest.json",
    "mergekit_config.yml",
    "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)


def files_beside(source: Checkpoint) -> tuple[list[str], dict[str, str]]:
    """Which files of a model folder are copied with its weights.

    Returns:
        Names to copy (relative, in order), and for every other file the reason why not.
    """
    if source.folder is None:
        return [], {}
    copied: list[str] = []
    left: dict[str, str] = {}
    replaced = {*REPLACED, *(file.path.name for file in source.files)}
    for path in sorted(source.folder.rglob("*")):
        name = path.relative_to(source.folder).as_posix()
        if not path.is_file() or name in replaced or any(part.startswith(".") for part in Path(name).parts):
            continue
        try:
            inside(source.folder, name)
        except CheckpointError:
            left[name] = "a link that leaves the folder"
            continue
        if name.endswith(CODE_SUFFIXES):
            left[name] = "code"
        elif name.endswith(FOREIGN_WEIGHTS):
            left[name] = "other weights"
        elif path.stat().st_size > SMALL:
            left[name] = f"larger than {SMALL // 1_000_000} MB"
        else:
            copied.append(name)
    return copied, left


def write_beside(plan: Plan, variant: int, folder: Path, effect: Mapping[str, Any], digests: Mapping[str, Any]) -> None:
    """Write everything but the weights into ``folder``.

    Args:
        plan: the plan.
        variant: which output.
        folder: where its weights are.
        effect: the report, as plain data.
        digests: for each tensor those of its output and inputs.
    """
    output = plan.outputs[variant]
    manifest = json.dumps(manifest_of(plan, variant, effect, digests), indent=1, ensure_ascii=False) + "\n"
    (folder / manifest_path(output).name).write_text(manifest, encoding="utf-8")
    if is_single_file(output):
        return
    source = plan.source
    if len(plan.layout.files) > 1:
        (folder / INDEX_NAME).write_text(json.dumps(index_json(plan.layout), indent=2) + "\n", encoding="utf-8")
    if source.config is not None:
        text = json.dumps(written_config(plan, digests), indent=2, ensure_ascii=False) + "\n"
        (folder / "config.json").write_text(text, encoding="utf-8")
    for name in files_beside(source)[0]:
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        assert source.folder is not None
        shutil.copyfile(source.folder / name, target)
    (folder / "README.md").write_text(model_card(plan, variant, effect), encoding="utf-8")


def written_config(plan: Plan, digests: Mapping[str, Any]) -> dict[str, Any]:
    """The first model's config, true to what is written: its dtype, its tie, no quantisation that is gone."""
    source = plan.source
    config = dict(source.config or {})
    if any(spec.scale for spec in source.tensors.values()):
        config.pop("quantization_config", None)
        config.pop("compression_config", None)
    written = {job.dtype for job in plan.jobs if dtypes.is_float(job.dtype)}
    if len(written) == 1:
        config = _with_value(config, ("dtype", "torch_dtype"), *written)
    if plan.out_dtype is not None and not {"dtype", "torch_dtype"} & config.keys():
        config["torch_dtype"] = plan.out_dtype
    if plan.layers is not None:
        config = _with_value(config, LAYER_COUNTS, plan.layers)
    if _has_own_head(plan, digests) and config.get("tie_word_embeddings") is not False:
        config = _with_value(config, ("tie_word_embeddings",), False) | {"tie_word_embeddings": False}
    return config


def _with_value(config: Mapping[str, Any], keys: tuple[str, ...], value: object) -> dict[str, Any]:
    """The config with these keys set wherever they stand, in its nested text or vision configs too."""
    changed = dict(config)
    for key, old in config.items():
        if key in keys:
            changed[key] = value
        elif key.endswith("_config") and isinstance(old, dict):
            changed[key] = _with_value(old, keys, value)
    return changed


def _has_own_head(plan: Plan, digests: Mapping[str, Any]) -> bool:
    """Whether an output head is written that differs from the embedding, so that loading must not tie them."""
    embeddings = {digests[job.name]["output"] for job in plan.jobs if ties.is_embedding(job.name)}
    return any(ties.is_head(job.name) and digests[job.name]["output"] not in embeddings for job in plan.jobs)


def manifest_of(plan: Plan, variant: int, effect: Mapping[str, Any], digests: Mapping[str, Any]) -> dict[str, Any]:
    """What made this output. Holds no times and no paths of this machine, so equal runs give equal manifests."""
    import torch

    return {
        "tool": "mergekit_lite",
        "version": __version__,
        "torch": torch.__version__,
        "plan": plan.digest(variant),
        "recipe": plan.recipes[variant],
        "inputs": [
            {
                "reference": source.reference,
                "revision": source.revision,
                "files": [
                    {"name": file.path.name, "size": file.size, "header_xxh3_128": file.header_digest}
                    for file in source.files
                ],
            }
            for source in plan.inputs
        ],
        "digest": "xxh3-128 of the hex xxh3-128 digests of every 8,388,608 elements",
        "tensors": digests,
        "left_out": [list(entry) for entry in plan.left_out],
        "effect": effect,
    }
