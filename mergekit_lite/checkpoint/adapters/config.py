"""The ``adapter_config.json`` of a PEFT LoRA: the scale of each module, and what is refused by name.

scale = alpha / r, or alpha / √r with ``use_rslora`` (Kalajdzievski 2023, arXiv 2312.03732). ``rank_pattern`` and
``alpha_pattern`` give some modules numbers of their own, by regular expressions: the first that matches the whole path
of the module, or its end behind a dot, decides.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, TypeVar

from mergekit_lite.checkpoint.encodings.low_rank import MAX_RANK
from mergekit_lite.checkpoint.patterns import pattern_problem
from mergekit_lite.errors import CheckpointError, listing, shortened
from mergekit_lite.input_files import read_json

MAX_ALPHA = 1e30
MERGE_IT = "Merge it with peft (model.merge_and_unload()), save that, and name the result"
HARMLESS = (  # keys on how it was trained, or on what the tensors' names and shapes say as well
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "corda_config",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "loftq_config",
    "lora_alpha",
    "lora_dropout",
    "lora_ga_config",
    "megatron_config",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "alpha_pattern",
    "revision",
    "runtime_config",
    "target_modules",
    "target_parameters",
    "task_type",
    "trainable_token_indices",
    "use_dora",
    "use_rslora",
)
REFUSED = {
    "lora_bias": "a bias in the LoRA layers",
    "layer_replication": "layers that are replicated",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "an activated LoRA, which is on for some tokens only and can't be folded in",
}
BASE_KEPT_BY = (True, False, None, "gaussian", "eva", "orthogonal")  # initialisations that leave the base as it is
N = TypeVar("N")


@dataclass(frozen=True)
class AdapterConfig:
    """The numbers in the config of a LoRA. Rank and alpha are those of the modules that no pattern matches."""

    rank: int
    alpha: float
    rank_stabilised: bool  # whether the scale is alpha / √r
    transposed: bool  # whether the layers store their weights as (in, out)
    rank_pattern: Mapping[str, int]  # by regular expression
    alpha_pattern: Mapping[str, float]
    parameters: tuple[str, ...] = ()  # ends of the names of parameters that have factors of their own (experts)
    tokens: Mapping[str, tuple[int, ...]] = field(default_factory=dict)  # rows trained apart, by the end of a module
    has_magnitudes: bool = False  # whether it is a DoRA
    task: str | None = None  # what its model is for: CAUSAL_LM, SEQ_CLS, …
    peft_version: tuple[int, ...] = ()  # of the program that wrote it, as far as it says
    base: str | None = None  # the model it says it was trained on
    base_revision: str | None = None

    def rank_of(self, module: str) -> int:
        """Return the rank of a module's LoRA."""
        return _matching(self.rank_pattern, module, self.rank)

    def scale_of(self, module: str) -> float:
        """Return the number that the product of a module's factors is multiplied by."""
        rank = self.rank_of(module)
        return _matching(self.alpha_pattern, module, self.alpha) / (math.sqrt(rank) if self.rank_stabilised else rank)

    def parameters_of(self, module: str) -> list[str]:
        """Return the names of a module's parameters, within it, that may have factors of their own."""
        names: list[str] = []
        for target in self.parameters:
            parent, _, name = target.rpartition(".")
            if not parent or f".{module}".endswith(f".{parent}"):
                names.append(name)
        return names

    def tokens_of(self, module: str) -> tuple[int, ...] | None:
        """Return the numbers of the tokens whose rows of a module were trained; None where it names none."""
        return next((rows for name, rows in self.tokens.items() if not name or f".{module}".endswith(f".{name}")), None)


def read_config(path: Path) -> AdapterConfig:
    """Read and check an ``adapter_config.json``. Raises CheckpointError with every problem."""
    config = read_json(path)
    kind = config.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(f"{path}: its peft_type is {_shown(kind)}; only LORA can be folded in. {MERGE_IT}.")
    problems = [*_unsupported(config), *_unsound(config)]
    if problems:
        raise CheckpointError(listing(f"{path}: this adapter can't be used", problems))
    return AdapterConfig(
        config["r"],
        config["lora_alpha"],
        bool(config.get("use_rslora")),
        bool(config.get("fan_in_fan_out")),
        config.get("rank_pattern") or {},
        config.get("alpha_pattern") or {},
        tuple(config.get("target_parameters") or ()),
        _tokens(config),
        bool(config.get("use_dora")),
        config.get("task_type"),
        tuple(int(part) for part in re.findall(r"\d+", str(config.get("peft_version") or ""))[:3]),
        _text(config.get("base_model_name_or_path")),
        _text(config.get("revision")),
    )


def _unsupported(config: Mapping[str, Any]) -> list[str]:
    """Return a problem for each key that is refused, by its name or because it is unknown."""
    problems = [f"{key}: {what} can't be folded in. {MERGE_IT}" for key, what in REFUSED.items() if config.get(key)]
    problems += [
        f"{_shown(key)}: {_shown(value)} is not known here, and may change what the weights mean. {MERGE_IT}"
        for key, value in config.items()
        if value and key not in HARMLESS and key not in REFUSED
    ]
    if config.get("init_lora_weights") not in BASE_KEPT_BY:
        problems.append(
            f"init_lora_weights: {_shown(config['init_lora_weights'])} changes the base before training, so the "
            "adapter doesn't fit the original. Save it with peft's path_initial_model_for_weight_conversion. "
            f"{MERGE_IT}"
        )
    return problems


def _unsound(config: Mapping[str, Any]) -> list[str]:
    problems = [
        f"{key}: expected true or false, got {_shown(config[key])}"
        for key in ("use_dora", "use_rslora", "fan_in_fan_out")
        if not isinstance(config.get(key), bool | None)
    ]
    parameters = config.get("target_parameters") or []
    if not isinstance(parameters, list) or not all(isinstance(name, str) for name in parameters):
        problems.append(f"target_parameters: expected a list of names, got {_shown(parameters)}")
    if not all(_are_tokens(rows) for rows in _listed_tokens(config).values()):
        problems.append(
            "trainable_token_indices: expected the numbers of tokens, or lists of them by the name of a module, got "
            f"{_shown(config['trainable_token_indices'])}"
        )
    if not isinstance(config.get("task_type"), str | None):
        problems.append(f"task_type: expected a name, got {_shown(config['task_type'])}")
    numbers = (
        ("r", "rank_pattern", _is_rank, f"a whole number of 1 to {MAX_RANK}"),
        ("lora_alpha", "alpha_pattern", _is_alpha, "a number"),
    )
    for key, pattern_key, is_sound, expected in numbers:
        if not is_sound(config.get(key)):
            problems.append(f"{key}: expected {expected}, got {_shown(config.get(key))}")
        patterns = config.get(pattern_key) or {}
        if not isinstance(patterns, dict):
            problems.append(f"{pattern_key}: expected patterns with numbers, got {_shown(patterns)}")
            continue
        for pattern, number in patterns.items():
            expectation = None if is_sound(number) else f"expected {expected}, got {_shown(number)}"
            if problem := pattern_problem(pattern) or expectation:
                problems.append(f"{pattern_key}: {_shown(pattern)}: {problem}")
    return problems


def _listed_tokens(config: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return what ``trainable_token_indices`` gives for each module; a bare list is for the input embedding."""
    listed = config.get("trainable_token_indices") or {}
    return listed if isinstance(listed, dict) else {"": listed}


def _tokens(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    return {name: tuple(rows) for name, rows in _listed_tokens(config).items()}


def _are_tokens(rows: object) -> bool:
    return isinstance(rows, list) and bool(rows) and all(type(row) is int and row >= 0 for row in rows)


def _matching(patterns: Mapping[str, N], module: str, default: N) -> N:
    matching = (number for pattern, number in patterns.items() if re.match(rf"(.*\.)?({pattern})$", module))
    return next(matching, default)


def _is_rank(value: object) -> bool:
    return type(value) is int and 1 <= value <= MAX_RANK


def _is_alpha(value: object) -> bool:
    return type(value) in (int, float) and abs(value) < MAX_ALPHA  # type: ignore[arg-type]


def _text(value: object) -> str | None:
    return value if isinstance(value, str) else None


def _shown(value: object) -> str:
    return shortened(repr(value), 80)
