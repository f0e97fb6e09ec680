"""Companions of the weights: index, config, tokenizer and other small files, model card, manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, BinaryIO

from mergekit_lite import block_fp8, dtypes
from mergekit_lite.checkpoint import Checkpoint, companion_patterns, formats, tied_weights
from mergekit_lite.checkpoint.folder import INDEX_ENDING, small_file
from mergekit_lite.checkpoint.formats import refused
from mergekit_lite.errors import CheckpointError, UnreadableError
from mergekit_lite.input_files import MAX_BYTES, opened
from mergekit_lite.layout import INDEX_NAME, index_json, is_single_file
from mergekit_lite.output.card import model_card
from mergekit_lite.output.manifest import manifest_of, text_pieces
from mergekit_lite.output.workspace import MANIFEST_NAME, manifest_path
from mergekit_lite.planning import Plan
from mergekit_lite.planning.fp8 import modules_not_quantised
from mergekit_lite.planning.tokenizers import is_template_file, is_tokenizer_file, tokenizer_config

CODE_SUFFIXES = (".ipynb", ".py", ".pyc", ".sh", ".so")
COEFFICIENTS_NAME = "mergekit_lite_coefficients.json"
REPLACED = (
    "config.json", "README.md", MANIFEST_NAME, "mergekit_config.yml", COEFFICIENTS_NAME, INDEX_NAME,
    "pytorch_model.bin.index.json",
)  # fmt: skip
WRITTEN = (
    INDEX_NAME, "config.json", "chat_template.jinja", "mergekit_config.yml", COEFFICIENTS_NAME, "README.md",
)  # fmt: skip


def companions_of(source: Checkpoint) -> tuple[list[str], dict[str, str]]:
    """Return the files of a model folder that are copied with its weights, and by name why every other one is not.

    Only files that ``companion_patterns`` lists are copied. Hidden files and what the output has of its own are not
    named; a folder is named as one, with a slash.
    """
    if source.folder is None:
        return [], {}
    copied: list[str] = []
    left: dict[str, str] = {}
    own = {*REPLACED, *(file.path.name for file in source.files)}
    for path in _listed(source.folder):
        name = path.relative_to(source.folder).as_posix()
        if name in own or path.name.startswith("."):
            continue
        if path.is_dir():
            left[f"{name}/"] = "a folder"
        elif not companion_patterns.matches(name, companion_patterns.COMPANIONS):
            left[name] = _unlisted(path)
        else:
            try:
                small_file(source.folder, name)
                copied.append(name)
            except UnreadableError as error:
                left[name] = error.why
            except CheckpointError:
                left[name] = "a link that leaves the folder, or no regular file"
    return copied, left


def _listed(folder: Path) -> Iterator[Path]:
    """Yield what is in a folder, and in the folders within it that may hold files to be copied."""
    within = {pattern.partition("/")[0] for pattern in companion_patterns.COMPANIONS if "/" in pattern}
    for path in sorted(folder.iterdir()):
        if path.is_dir() and not path.is_symlink() and companion_patterns.matches(path.name, within):
            yield from sorted(path.iterdir())
        else:
            yield path


def _unlisted(path: Path) -> str:
    if path.suffix.lower() in CODE_SUFFIXES:
        return "code"
    if path.name.lower().endswith((*formats.SUFFIXES, *refused.SUFFIXES, INDEX_ENDING)):
        return "other weights"
    return "no config, tokenizer, template or licence by its name"


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


def companion_names(plan: Plan, number: int) -> set[str]:
    """Return the names of all files that ``write_companions`` may write, relative to its folder."""
    output = plan.outputs[number]
    own = () if is_single_file(output) else (*companions(plan)[0], *WRITTEN)
    return {*own, manifest_path(output).name}


def write_companions(
    plan: Plan, number: int, folder: Path, device: str, effect: Mapping[str, Any], digests: Mapping[str, Any]
) -> None:
    """Write everything but the weights of the plan's output ``number`` into the folder where they are.

    ``device`` is the kind of device that computed; ``effect`` is the report, as plain data; ``digests`` are those of
    each tensor's output and inputs, by its name.
    """
    output = plan.outputs[number]
    if not is_single_file(output):
        _write_model(plan, number, folder, effect, digests)
    manifest = manifest_of(plan, number, folder, device, effect, digests)
    with _created(folder / manifest_path(output).name) as file:
        file.writelines(piece.encode() for piece in text_pieces(manifest))


def _write_model(plan: Plan, number: int, folder: Path, effect: Mapping[str, Any], digests: Mapping[str, Any]) -> None:
    if len(plan.layout.files) > 1:
        _write_json(folder / INDEX_NAME, index_json(plan.layout))
    if plan.source.config is not None:
        _write_json(folder / "config.json", written_config(plan, digests))
    for name, path in companions(plan)[0].items():
        with opened(path, MAX_BYTES) as content, _created(folder / name) as copy:
            shutil.copyfileobj(content, copy)
    if plan.chat_template is not None:
        _write_template(plan, folder, plan.chat_template)
    if plan.text:
        _write(folder / "mergekit_config.yml", plan.text)
    if effect["coefficients"]:
        _write_json(folder / COEFFICIENTS_NAME, effect["coefficients"], indent=1)
    _write(folder / "README.md", model_card(plan, number, effect))


def _write_template(plan: Plan, folder: Path, template: str) -> None:
    """Write a chat template where transformers looks for it, and into the tokenizer's config, where older ones do."""
    _write(folder / "chat_template.jinja", template)
    config = tokenizer_config(plan.source if plan.tokenizer is None else plan.inputs[plan.tokenizer])
    if config is not None:
        _write_json(folder / "tokenizer_config.json", config | {"chat_template": template})


def _write_json(path: Path, content: object, indent: int = 2) -> None:
    _write(path, json.dumps(content, indent=indent, ensure_ascii=False) + "\n")


def _write(path: Path, text: str) -> None:
    with _created(path) as file:
        file.write(text.encode())


def _created(path: Path) -> BinaryIO:
    """Open a new file for writing, in place of what an earlier run left there; a link is not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path.open("xb")


def written_config(plan: Plan, digests: Mapping[str, Any]) -> dict[str, Any]:
    """Return the config source's config, true to what is written: dtype, tied head, no quantisation that is gone."""
    source = plan.source
    config = dict(plan.config or source.config or {})
    if any(spec.quantised for spec in source.tensors.values()):
        config.pop("quantization_config", None)
        config.pop("quantization", None)  # MLX's name for it
        config.pop("compression_config", None)
    written = {job.dtype for job in plan.jobs if dtypes.is_float(job.dtype) and not job.scales_of}
    if len(written) == 1:
        config = _with_value(config, ("dtype", "torch_dtype"), *written)
    is_fp8 = plan.out_dtype == block_fp8.NAME
    if plan.out_dtype is not None and not {"dtype", "torch_dtype"} & config.keys():
        config["torch_dtype"] = block_fp8.BESIDE if is_fp8 else plan.out_dtype
    if is_fp8:
        config["quantization_config"] = block_fp8.config_section(modules_not_quantised(plan.jobs))
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
