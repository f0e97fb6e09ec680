"""Read a PEFT LoRA adapter from its folder: what each tensor of its file is for, by its name.

    base_model.model.X.lora_A.weight (r, in), X.lora_B.weight (out, r)      factors of X.weight
    base_model.model.X.lora_embedding_A (r, tokens), _B (width, r)          factors of an embedding
    base_model.model.X.lora_magnitude_vector (out)                          the lengths of the rows, of a DoRA
    base_model.model.X.token_adapter.trainable_tokens_delta (tokens, width) rows of X.weight
    base_model.model.X.weight, X.bias, X.base_layer.weight, …               a tensor instead of the base's

Programs that store a state dict as it is have the adapter's name in these: ``X.lora_A.default.weight``.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from pathlib import Path

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint import formats
from mergekit_lite.checkpoint.adapters.adapter import Adapter
from mergekit_lite.checkpoint.adapters.config import MERGE_IT, AdapterConfig, read_config
from mergekit_lite.checkpoint.adapters.factors import ExpertFactors, Factors, TokenRows
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.errors import CheckpointError, refuse

PREFIX = "base_model.model."
NAME = r"(?:\.(?P<adapter>(?!weight$|bias$)[^.]+))?"
PART = re.compile(
    rf"(?P<module>.+)\.(?:(?P<linear>lora_[AB]){NAME}\.weight|"
    rf"(?P<other>lora_embedding_[AB]|token_adapter\.trainable_tokens_delta){NAME.replace('adapter', 'second')}|"
    rf"(?P<lengths>lora_magnitude_vector){NAME.replace('adapter', 'third')}(?:\.weight)?)"
)
LINEAR, EMBEDDING = ("lora_A", "lora_B"), ("lora_embedding_A", "lora_embedding_B")
LENGTHS, TOKENS = "lora_magnitude_vector", "token_adapter.trainable_tokens_delta"
BEFORE_TRAINING = (".original_module.", ".trainable_tokens_original", ".token_adapter.base_layer.")
REFUSED = {
    "lora_B.bias": "a bias in the LoRA layers",
    ".hada_": "LoHa",
    ".lokr_": "LoKr",
    ".ia3_": "IA3",
    ".lora_": "an unknown kind of LoRA",
}


def read_adapter(reference: str, path: Path, revision: str | None = None) -> Adapter:
    """Open an adapter's folder. Raises CheckpointError where it is no LoRA, damaged, hostile or of a refused kind."""
    file = folders.inside(path, folders.adapter_weights(path, {entry.name for entry in path.iterdir()}))
    config = read_config(folders.inside(path, folders.ADAPTER_CONFIG))
    header = formats.read_header(file)
    names = _adapter_names(header.tensors)
    if len(names) > 1:
        raise CheckpointError(
            f"{file}: holds {len(names)} adapters: {', '.join(names)}. Save the one that is meant alone, "
            f"model.save_pretrained(OUT, selected_adapters=[{names[0]!r}]), and name its folder"
        )
    left_out = dict.fromkeys(header.left_out, "not a tensor")
    parts: dict[str, dict[str, TensorSpec]] = {}  # by module, what was trained for it
    replacements: dict[str, TensorSpec] = {}
    problems: list[str] = []
    for name, spec in header.tensors.items():
        twice = False
        plain = _without_saving(name, names)
        if part := PART.fullmatch(name):
            of_module = parts.setdefault(part["module"].removeprefix(PREFIX), {})
            twice = of_module.setdefault(part["linear"] or part["other"] or part["lengths"], spec) is not spec
        elif kind := next((kind for part, kind in REFUSED.items() if part in _without_names(name, names)), None):
            problems.append(f"{name}: is of {kind}, which can't be folded in. {MERGE_IT}")
        elif any(part in name for part in BEFORE_TRAINING):
            left_out[name] = "a module as it was before training"
        elif name != plain and plain in header.tensors:
            left_out[name] = f"saved twice; {plain} is taken"
        else:
            replaced = plain.removeprefix(PREFIX).replace(".base_layer.", ".")
            twice = replacements.setdefault(replaced, spec) is not spec
        if twice:
            problems.append(
                f"{name}: another tensor of the adapter is for the same place; it is not clear which is meant"
            )
    factors: dict[str, Factors] = {}
    experts: dict[str, list[ExpertFactors]] = {}
    tokens: dict[str, TokenRows] = {}
    for module, of_module in parts.items():
        try:
            if TOKENS in of_module:
                tokens[f"{module}.weight"] = _token_rows(module, of_module, config)
            elif ranks := _parameters(module, of_module, config):
                layer = module.replace(".base_layer", "")  # one around the other where several parameters have factors
                experts.setdefault(layer, []).append(ExpertFactors(*_pair(of_module), ranks))
            else:
                factors[f"{module}.weight"] = _factors(module, of_module, config)
        except CheckpointError as problem:
            problems.append(str(problem))
    if not (parts or replacements or problems):
        problems.append("holds no tensors")
    refuse(file, problems, "this adapter")
    return Adapter(reference, path, header.file, config, factors, experts, tokens, replacements, left_out, revision)


def _adapter_names(names: Iterable[str]) -> list[str]:
    """Return the names of the adapters in a file, as far as its tensors have them."""
    matches = filter(None, map(PART.fullmatch, names))
    return list(dict.fromkeys(name for m in matches if (name := m["adapter"] or m["second"] or m["third"])))


def _without_saving(name: str, names: Iterable[str]) -> str:
    """Return the name of a module's tensor without the wrapper that peft saves it in (``modules_to_save``)."""
    own = "|".join(map(re.escape, {"default", *names}))
    return re.sub(rf"\.modules_to_save(\.({own})(?=\.))?\.", ".", name)


def _without_names(name: str, names: Iterable[str]) -> str:
    for own in names:
        name = name.replace(f".{own}.", ".")
    return name


def _parameters(
    module: str, parts: Mapping[str, TensorSpec], config: AdapterConfig
) -> dict[str, tuple[int, float]] | None:
    """Return ranks and scales by the parameters of a module that its factors may be for; None where they are a layer's.

    A layer's factors have its rank; those of a stack of experts have the rank of all of them together.
    """
    a, b = (parts.get(part) for part in LINEAR)
    names = config.parameters_of(module.replace(".base_layer", ""))
    if a is None or b is None or len(a.shape) != 2 or len(b.shape) != 2 or not any(name != "weight" for name in names):
        return None
    if not module.endswith(".base_layer") and a.shape[0] == b.shape[1] == config.rank_of(module):
        return None
    paths = {name: f"{module.replace('.base_layer', '')}.{name}" for name in names}
    return {name: (config.rank_of(path), config.scale_of(path)) for name, path in paths.items()}


def _pair(parts: Mapping[str, TensorSpec]) -> tuple[TensorSpec, TensorSpec]:
    """Return the two factors of a module, each a matrix of floats. Raises CheckpointError where they aren't that."""
    kind = EMBEDDING if parts.keys() & {*EMBEDDING} else LINEAR
    if parts.keys() - {LENGTHS} != {*kind}:
        names = ", ".join(spec.name for spec in parts.values())
        raise CheckpointError(f"{names}: expected one lora_A and one lora_B. The adapter is damaged: download it again")
    a, b = (parts[part] for part in kind)
    for spec in (a, b):
        if len(spec.shape) != 2 or not spec.numel:
            raise CheckpointError(
                f"{spec.name}: has shape {list(spec.shape)}, expected a matrix. A LoRA on a convolution can't be "
                f"folded in. {MERGE_IT}"
            )
        _check_float(spec)
    return a, b


def _factors(module: str, parts: Mapping[str, TensorSpec], config: AdapterConfig) -> Factors:
    a, b = _pair(parts)
    rank = config.rank_of(module)
    if (a.shape[0], b.shape[1]) != (rank, rank):
        raise CheckpointError(
            f"{a.name}: has rank {a.shape[0]}, its lora_B rank {b.shape[1]}, and {folders.ADAPTER_CONFIG} says {rank}: "
            "they don't belong together. Download the adapter again"
        )
    is_embedding, lengths = EMBEDDING[0] in parts, parts.get(LENGTHS)
    if config.has_magnitudes != (lengths is not None):
        raise CheckpointError(
            f"{(lengths or a).name}: use_dora is {str(config.has_magnitudes).lower()} in {folders.ADAPTER_CONFIG}, but "
            f"there is {'no' if lengths is None else 'a'} {LENGTHS} of this module. Download the adapter again"
        )
    if lengths is not None:
        if is_embedding:
            raise CheckpointError(f"{lengths.name}: is of a DoRA on an embedding, which can't be folded in. {MERGE_IT}")
        _check_float(lengths)
        if lengths.shape != b.shape[:1]:
            raise CheckpointError(f"{lengths.name}: has shape {list(lengths.shape)}, expected {list(b.shape[:1])}")
    return Factors(a, b, config.scale_of(module), is_embedding or config.transposed, lengths)


def _token_rows(module: str, parts: Mapping[str, TensorSpec], config: AdapterConfig) -> TokenRows:
    rows, numbers = parts[TOKENS], config.tokens_of(module)
    if len(parts) > 1 or numbers is None or len(set(numbers)) != len(numbers):
        raise CheckpointError(
            f"{rows.name}: trainable_token_indices of {folders.ADAPTER_CONFIG} don't say which tokens its rows are of. "
            "Download the adapter again"
        )
    _check_float(rows)
    return TokenRows(rows, numbers)


def _check_float(spec: TensorSpec) -> None:
    if not dtypes.is_float(spec.dtype):
        raise CheckpointError(f"{spec.name}: is {spec.dtype}, expected one of {', '.join(dtypes.FLOATS)}")
