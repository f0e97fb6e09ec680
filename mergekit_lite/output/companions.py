"""Companions of the weights: index, config, tokenizer and other small files, model card, manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, formats, tied_weights
from mergekit_lite.checkpoint.folder import INDEX_ENDING, MAX_SMALL_BYTES, inside
from mergekit_lite.checkpoint.formats import refused
from mergekit_lite.errors import CheckpointError
from mergekit_lite.layout import INDEX_NAME, index_json, is_single_file
from mergekit_lite.output.card import model_card
from mergekit_lite.output.manifest import manifest_of, text_of
from mergekit_lite.output.workspace import MANIFEST_NAME, manifest_path
from mergekit_lite.planning import Plan
from mergekit_lite.planning.tokenizers import is_template_file, is_tokenizer_file

FOREIGN_WEIGHTS = (*formats.SUFFIXES, *refused.SUFFIXES, INDEX_ENDING)
CODE_SUFFIXES = (".py", ".pyc", ".sh", ".so", ".ipynb")
COEFFICIENTS_NAME = "mergekit_lite_coefficients.json"
REPLACED = (
    "config.json", "README.md", MANIFEST_NAME, "mergekit_config.yml", COEFFICIENTS_NAME, INDEX_NAME,
    "pytorch_model.bin.index.json",
)  # fmt: skip


def companions_of(source: Checkpoint) -> tuple[list[str], dict[str, str]]:
    """Return the files of a model folder that are copied with its weights, and by name why every other one is not."""
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
        elif path.stat().st_size > MAX_SMALL_BYTES:
            left[name] = f"larger than {MAX_SMALL_BYTES // 1_000_000} MB"
        else:
            copied.append(name)
    return copied, left


def companions(plan: Plan) -> tuple[dict[str, Path], dict[str, str]]:
    """Return the files copied with a plan's weights, by their names in the output, and why every other one is not.

    They are the config source's, and those of the tokenizer the plan was given.
    """
    names, left = companions_of(plan.source)
    owners = dict.fromkeys(names, plan.source)
    if plan.tokenizer is not None:
        owner = plan.inputs[plan.tokenizer]
        owners = {name: source for name, source in owners.items() if not is_tokenizer_file(name)}
        owners |= {name: owner for name in companions_of(owner)[0] if is_tokenizer_file(name)}
    if plan.chat_template is not None:
        left |= dict.fromkeys(filter(is_template_file, owners), "the recipe has a chat_template")
        owners = {name: source for name, source in owners.items() if not is_template_file(name)}
    return {name: source.folder / name for name, source in owners.items() if source.folder is not None}, left


def write_companions(
    plan: Plan, number: int, folder: Path, effect: Mapping[str, Any], digests: Mapping[str, Any]
) -> None:
    """Write everything but the weights of the plan's output ``number`` into the folder where they are.

    ``effect`` is the report, as plain data; ``digests`` are those of each tensor's output and inputs, by its name.
    """
    output = plan.outputs[number]
    if not is_single_file(output):
        _write_model(plan, number, folder, effect, digests)
    manifest = text_of(manifest_of(plan, number, folder, effect, digests))
    (folder / manifest_path(output).name).write_text(manifest, encoding="utf-8")


def _write_model(plan: Plan, number: int, folder: Path, effect: Mapping[str, Any], digests: Mapping[str, Any]) -> None:
    if len(plan.layout.files) > 1:
        (folder / INDEX_NAME).write_text(json.dumps(index_json(plan.layout), indent=2) + "\n", encoding="utf-8")
    if plan.source.config is not None:
        _write_json(folder / "config.json", written_config(plan, digests))
    for name, path in companions(plan)[0].items():
        target = folder / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)
    if plan.chat_template is not None:
        _write_template(folder, plan.chat_template)
    if plan.text:
        (folder / "mergekit_config.yml").write_bytes(plan.text.encode())
    if effect["coefficients"]:
        _write_json(folder / COEFFICIENTS_NAME, effect["coefficients"], indent=1)
    (folder / "README.md").write_text(model_card(plan, number, effect), encoding="utf-8")


def _write_template(folder: Path, template: str) -> None:
    """Write a chat template where transformers looks for it, and into the tokenizer's config, where older ones do."""
    (folder / "chat_template.jinja").write_bytes(template.encode())
    path = folder / "tokenizer_config.json"
    if path.exists():
        _write_json(path, json.loads(path.read_text(encoding="utf-8")) | {"chat_template": template})


def _write_json(path: Path, content: object, indent: int = 2) -> None:
    path.write_text(json.dumps(content, indent=indent, ensure_ascii=False) + "\n", encoding="utf-8")


def written_config(plan: Plan, digests: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config source's config, true to what is written: dtype, tied head, no quantisation that is gone."""
    source = plan.source
    config = dict(plan.config or source.config or {})
    if any(spec.quantised for spec in source.tensors.values()):
        config.pop("quantization_config", None)
        config.pop("quantization", None)  # MLX's name for it
        config.pop("compression_config", None)
    written = {job.dtype for job in plan.jobs if dtypes.is_float(job.dtype)}
    if len(written) == 1:
        config = _with_value(config, ("dtype", "torch_dtype"), *written)
    if plan.out_dtype is not None and not {"dtype", "torch_dtype"} & config.keys():
        config["torch_dtype"] = plan.out_dtype
    if _has_own_head(plan, digests) and config.get("tie_word_embeddings") is not False:
        config = _with_value(config, ("tie_word_embeddings",), False) | {"tie_word_embeddings": False}
    return config


def _with_value(config: Mapping[str, Any], keys: tuple[str, ...], value: object) -> dict[str, Any]:
    """Return the config with ``keys`` set wherever they occur, also in nested text or vision configs."""
    changed = dict(config)
    for key, old in config.items():
        if key in keys:
            changed[key] = value
        elif key.endswith("_config") and isinstance(old, dict):
            changed[key] = _with_value(old, keys, value)
    return changed


def _has_own_head(plan: Plan, digests: Mapping[str, Any]) -> bool:
    """Return True where a written head differs from the embedding, so that loading must not tie them."""
    embeddings = {digests[job.name]["output"] for job in plan.jobs if tied_weights.is_embedding(job.name)}
    return any(tied_weights.is_head(job.name) and digests[job.name]["output"] not in embeddings for job in plan.jobs)
