"""Companions of the weights: index, config, tokenizer and other small files, model card, manifest."""

from __future__ import annotations

import json
import shutil
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from mergekit_lite import block_fp8, dtypes
from mergekit_lite.checkpoint import Checkpoint, formats, own_code, tied_weights
from mergekit_lite.checkpoint.companion_patterns import COMPANIONS, matches, travels
from mergekit_lite.checkpoint.folder import INDEX_ENDING, small_file
from mergekit_lite.checkpoint.formats import refused
from mergekit_lite.checkpoint.parts import in_folder, surveyed
from mergekit_lite.errors import CheckpointError, UnreadableError
from mergekit_lite.input_files import MAX_BYTES, opened, read_json
from mergekit_lite.layout import index_json, indexed_files, is_single_file
from mergekit_lite.output.card import model_card
from mergekit_lite.output.manifest import manifest_of, text_pieces
from mergekit_lite.output.workspace import MANIFEST_NAME, manifest_path
from mergekit_lite.planning import Job, Plan
from mergekit_lite.planning.fp8 import modules_not_quantised
from mergekit_lite.planning.token_numbers import other_numbers
from mergekit_lite.planning.tokenizers import is_template_file, is_tokenizer_file, tokenizer_config
from mergekit_lite.planning.unions import TOKENIZER, written_tokenizer

CODE_SUFFIXES = (".ipynb", ".py", ".pyc", ".sh", ".so")
COEFFICIENTS_NAME = "mergekit_lite_coefficients.json"
REPLACED = (
    "config.json", "README.md", MANIFEST_NAME, "mergekit_config.yml", COEFFICIENTS_NAME, "model.safetensors.index.json",
    "pytorch_model.bin.index.json",
)  # fmt: skip
GENERATION = "generation_config.json"
QUANTIZATION_KEYS = ("quantization_config", "compression_config", "quantization")  # the last one is MLX's
WRITTEN = ("config.json", "chat_template.jinja", "mergekit_config.yml", COEFFICIENTS_NAME, "README.md")


def companions_of(source: Checkpoint) -> tuple[list[str], dict[str, str]]:
    """Return the files of a model folder that are copied with its weights, and by name why every other one is not.

    Only files that ``companion_patterns`` lists are copied. Hidden files and what the output has of its own are not
    named; a folder is named as one, with a slash.
    """
    weights = [file.name for file in source.files]
    return _companions_in(source.folder, {*weights, *indexed_files(weights), *_config_names(source)})


def _companions_in(folder: Path | None, own: Collection[str] = ()) -> tuple[list[str], dict[str, str]]:
    if folder is None:
        return [], {}
    copied: list[str] = []
    left: dict[str, str] = {}
    own = {*REPLACED, *own}
    folders = surveyed(folder)[1]
    for path in _listed(folder, folders):
        name = path.relative_to(folder).as_posix()
        if name in own or path.name.startswith("."):
            continue
        if path.is_dir():
            left[f"{name}/"] = "a folder"
        elif not travels(name, folders):
            left[name] = _unlisted(path)
        else:
            try:
                small_file(folder, name)
                copied.append(name)
            except UnreadableError as error:
                left[name] = error.why
            except CheckpointError:
                left[name] = "a link that leaves the folder, or no regular file"
    return copied, left


def _listed(root: Path, folders: Collection[str]) -> Iterator[Path]:
    """Yield what is in a model's folder, and in the folders within it that may hold files to be copied."""
    opened = {parent for folder in folders for parent in (folder, folder.rpartition("/")[0])}
    patterns = {pattern.partition("/")[0] for pattern in COMPANIONS if "/" in pattern}
    unvisited = [root]
    while unvisited:
        for path in sorted(unvisited.pop(0).iterdir()):
            is_known = path.relative_to(root).as_posix() in opened or matches(path.name, patterns)
            if is_known and path.is_dir() and not path.is_symlink():
                unvisited.append(path)
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

    They are the config source's, and those of the tokenizer the plan was given; and the code that their configs name,
    where the plan copies it.
    """
    owners, left = _owners(plan)
    if plan.copy_code:
        code = code_needed(plan)[0]
        owners |= {name: source.folder for name, source in code.items()}
        left = {name: why for name, why in left.items() if name not in code}
    return {name: folder / name for name, folder in owners.items() if folder is not None}, left


def _owners(plan: Plan) -> tuple[dict[str, Path | None], dict[str, str]]:
    """Return the folder that each file copied with a plan's weights is from, code aside, and why others are not."""
    names, left = companions_of(plan.source)
    owners: dict[str, Path | None] = dict.fromkeys(names, plan.source.folder)
    tokenizer = plan.tokenizer_source.tokenizer_folder
    if tokenizer != plan.source.folder:
        owners = {name: folder for name, folder in owners.items() if not is_tokenizer_file(name)}
        owners |= dict.fromkeys(filter(is_tokenizer_file, _companions_in(tokenizer)[0]), tokenizer)
        if tokenizer is not None and small_file(tokenizer, GENERATION) is not None:
            owners[GENERATION] = tokenizer  # it ends at tokens by their numbers
        elif plan.tokenizer is not None and GENERATION in owners and plan.source.folder is not None:
            generation = read_json(small_file(plan.source.folder, GENERATION) or plan.source.folder / GENERATION)
            if other := other_numbers(generation, plan.inputs[plan.tokenizer].config or {}):
                del owners[GENERATION]
                left[GENERATION] = f"{', '.join(other)}: numbers of another tokenizer than the output's"
    if plan.chat_template is not None:
        left |= dict.fromkeys(filter(is_template_file, owners), "the recipe has a chat_template")
        owners = {name: folder for name, folder in owners.items() if not is_template_file(name)}
    return owners, left


def code_needed(plan: Plan) -> tuple[dict[str, Checkpoint], list[str]]:
    """Return the files of code that an output's configs name: those that are there, by their models, and all others.

    transformers can't load the output without them, unless it knows the model. Code in a repository of the hub is found
    there, and not listed.
    """
    owners = _owners(plan)[0]
    present: dict[str, Checkpoint] = {}
    missing: list[str] = []
    for source in plan.inputs:
        names = [name for name, folder in owners.items() if folder == source.folder]
        names += _config_names(source) if source is plan.source else []
        own, lacking = own_code.needed_files(source, own_code.configs_of(source, names))
        present = dict.fromkeys(own, source) | present
        missing += lacking
    return present, [name for name in dict.fromkeys(missing) if name not in present]


def _config_names(source: Checkpoint) -> list[str]:
    """Return the configs of a model that are written anew, by their paths in its folder."""
    return [in_folder(folder, "config.json") for folder in source.configs]


def what_is_missing(plan: Plan) -> str | None:
    """Return what a plan's outputs lack to be loaded, and what to do; None where nothing is known to be missing."""
    if is_single_file(plan.outputs[0]):
        return None
    return " ".join(filter(None, (_missing_configs(plan), _missing_code(plan)))) or None


def _missing_configs(plan: Plan) -> str | None:
    source = plan.source
    if source.config_made:  # of a bare GGUF the plan's notes tell
        return None
    folders = dict.fromkeys(part.folder for part in source.parts if part.folder not in source.configs)
    names = ", ".join(in_folder(folder, "config.json") for folder in folders)
    if not names:
        return None
    return (
        f"the output has no {names}, as {source.reference} has none: transformers can't load it without. Copy it there "
        "from where the model is from."
    )


def _missing_code(plan: Plan) -> str | None:
    present, missing = code_needed(plan)
    left = [] if plan.copy_code else list(present)
    if not left and not missing:
        return None
    text = (
        f"the model has code of its own (auto_map in its config), and the output lacks {', '.join([*left, *missing])}"
    )
    if left:
        places = ", ".join(dict.fromkeys(str(present[name].folder) for name in left))
        text += f". --copy-code copies {'it' if len(left) == 1 else 'these'} from {places}, without running anything"
    if missing:
        text += f". {plan.source.reference} has no {', '.join(missing)} itself: copy them from where the model is from"
    return f"{text}. Until then transformers can't load it, unless it knows the model by itself."


def companion_names(plan: Plan, number: int) -> set[str]:
    """Return the names of all files that ``write_companions`` may write, relative to its folder."""
    output = plan.outputs[number]
    if is_single_file(output):
        return {manifest_path(output).name}
    indexes = indexed_files(file.name for file in plan.layout.files)
    return {*companions(plan)[0], *WRITTEN, *_config_names(plan.source), *indexes, manifest_path(output).name}


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
    files = {file.name: file for file in plan.layout.files}
    for name, shards in indexed_files(files).items():
        _write_json(folder / name, index_json([files[shard] for shard in shards]))
    for name in _config_names(plan.source):
        config = written_config(plan, digests, name.removesuffix("config.json").rstrip("/"))
        _write_json(folder / name, _with_its_code(config, name, plan.source))
    folders, models = _owners(plan)[0], {source.folder: source for source in plan.inputs}
    for name, path in companions(plan)[0].items():
        model = models.get(folders.get(name))
        content = own_code.configs_of(model, [name]).get(name) if model is not None else None
        if name == TOKENIZER and plan.added_tokens:
            _write_json(folder / name, written_tokenizer(plan.tokenizer_source, plan.added_tokens))
        elif model is not None and (rewritten := _with_its_code(content, name, model)) != content:
            _write_json(folder / name, rewritten)
        else:
            _copy(path, folder / name)
    if plan.chat_template is not None:
        _write_template(plan, folder, plan.chat_template)
    if plan.text:
        _write(folder / "mergekit_config.yml", plan.text)
    if effect["coefficients"]:
        _write_json(folder / COEFFICIENTS_NAME, effect["coefficients"], indent=1)
    _write(folder / "README.md", model_card(plan, number, effect))


def _copy(path: Path, target: Path) -> None:
    with opened(path, MAX_BYTES) as content, _created(target) as copy:
        shutil.copyfileobj(content, copy)


def _with_its_code(content: Any, name: str, source: Checkpoint) -> Any:
    """Return a config whose own classes are named in the hub repository that its model is from, if it is from one.

    transformers looks for a model's code there at the top alone, so configs in folders stay.
    """
    repository = own_code.repository_of(source)
    if repository is None or "/" in name or not own_code.code_names(content):
        return content
    return own_code.from_hub(content, repository)


def _write_template(plan: Plan, folder: Path, template: str) -> None:
    """Write a chat template where transformers looks for it, and into the tokenizer's config, where older ones do."""
    _write(folder / "chat_template.jinja", template)
    giver = plan.tokenizer_source
    config = tokenizer_config(giver)
    if config is not None:
        config = _with_its_code(config, "tokenizer_config.json", giver)
        _write_json(folder / "tokenizer_config.json", config | {"chat_template": template})


def json_text(content: object, indent: int = 2) -> str:
    """Return the text of a JSON file of an output."""
    return json.dumps(content, indent=indent, ensure_ascii=False) + "\n"


def _write_json(path: Path, content: object, indent: int = 2) -> None:
    _write(path, json_text(content, indent))


def _write(path: Path, text: str) -> None:
    with _created(path) as file:
        file.write(text.encode())


def _created(path: Path) -> BinaryIO:
    """Open a new file for writing, in place of what an earlier run left there; a link is not followed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    return path.open("xb")


def written_config(plan: Plan, digests: Mapping[str, Any], folder: str = "") -> dict[str, Any]:
    """Return the config source's config, true to what is written: dtype, tied head, no quantisation that is gone.

    ``folder`` is that of a part of a model of several.
    """
    source = plan.source
    config = dict(source.configs.get(folder, {}) if folder else plan.config or source.config or {})
    jobs = [job for job in plan.jobs if source.part_of(job.name).folder == folder]
    if any(spec.quantised for name, spec in source.tensors.items() if source.part_of(name).folder == folder):
        config = _without(config, QUANTIZATION_KEYS)
    written = {job.dtype for job in jobs if dtypes.is_float(job.dtype) and not job.scales_of}
    if len(written) == 1:
        config = _with_value(config, ("dtype", "torch_dtype"), *written)
    is_of_transformers = "model_type" in config if folder else "_class_name" not in config
    is_fp8 = plan.out_dtype == block_fp8.NAME
    if plan.out_dtype is not None and is_of_transformers and not {"dtype", "torch_dtype"} & config.keys():
        config["torch_dtype"] = block_fp8.BESIDE if is_fp8 else plan.out_dtype
    if is_fp8:
        config["quantization_config"] = block_fp8.config_section(modules_not_quantised(jobs))
    if _has_own_head(jobs, digests) and config.get("tie_word_embeddings") is not False:
        config = _with_value(config, ("tie_word_embeddings",), False) | {"tie_word_embeddings": False}
    return config


def _without(config: Mapping[str, Any], keys: Collection[str]) -> dict[str, Any]:
    """Return the config without some keys, also in nested text or vision configs."""
    return {
        key: _without(value, keys) if key.endswith("_config") and isinstance(value, dict) else value
        for key, value in config.items()
        if key not in keys
    }


def _with_value(config: Mapping[str, Any], keys: tuple[str, ...], value: object) -> dict[str, Any]:
    """Return the config with ``keys`` set wherever they occur, also in nested text or vision configs."""
    changed = dict(config)
    for key, old in config.items():
        if key in keys:
            changed[key] = value
        elif key.endswith("_config") and isinstance(old, dict):
            changed[key] = _with_value(old, keys, value)
    return changed


def _has_own_head(jobs: Sequence[Job], digests: Mapping[str, Any]) -> bool:
    """Return True where a written head differs from the embedding, so that loading must not tie them."""
    embeddings = {digests[job.name]["output"] for job in jobs if tied_weights.is_embedding(job.name)}
    return any(tied_weights.is_head(job.name) and digests[job.name]["output"] not in embeddings for job in jobs)
