"""The model that candidates are judged in: built once, without weights, by transformers' own loading.

transformers gets uninitialised tensors instead of a checkpoint's. So it handles names, dtypes, ties, buffers and fused
parameters (the experts of a layer in one) as if it loaded the written model. Which parameter a tensor of the checkpoint
became is then found the other way round: from the state the model would be saved as, taken in views, so that writing
into a view writes into the model.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.tokenizer_file import FLAGS
from mergekit_lite.errors import PlanError, UsageError, nearest, one_line
from mergekit_lite.input_files import read_json
from mergekit_lite.output.companions import GENERATION, companions, written_config
from mergekit_lite.planning import Plan

Places = Mapping[str, torch.Tensor]


@dataclass(frozen=True)
class Built:
    """A model whose weights are still to be set.

    Attributes:
        model: of transformers, in evaluation mode. Its parameters require gradients, as after loading: where they
            don't, torch multiplies the sliced states of generation with a copy of the head for each row of a batch
            (3.7 GB for eight rows of a 1.5 B model, and fifteen times the time).
        places: for each tensor of the plan that the model uses, a view of its parameter, or of the part it is.
        unused: tensors of the plan that the model class doesn't use.
    """

    model: Any
    places: Places
    unused: tuple[str, ...]


def build(plan: Plan, device: str) -> Built:
    """Build the model that loading the plan's output with transformers would give, but for its weights.

    Args:
        plan: of any candidate: they differ in params only.
        device: of its parameters.

    Raises:
        UsageError: the config is missing, or not that of a causal language model that transformers knows.
        PlanError: the plan's tensors are not those of the model; the message names each of them.
    """
    from transformers import MODEL_FOR_CAUSAL_LM_MAPPING

    config = config_of(plan)
    blank = {job.name: torch.empty(job.shape, dtype=dtypes.torch_dtype(job.dtype)) for job in plan.jobs}
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(config)]
    with _quiet():
        model, info = model_class.from_pretrained(
            None,
            config=config,
            state_dict=blank,
            dtype="auto",
            device_map=None if device == "cpu" else {"": device},
            ignore_mismatched_sizes=True,  # reported below, by name
            output_loading_info=True,
        )
    del blank
    problems = [f"{name}: the model has it, but no model here does" for name in sorted(info["missing_keys"])]
    problems += [
        f"{name}: shape {list(shape)}, but the model's config wants {list(wanted)}"
        for name, shape, wanted in sorted(info["mismatched_keys"])
    ]
    if problems:
        raise PlanError(problems)
    places, unused = _places(plan, model)
    if (generation := generation_config_of(plan)) is not None:
        model.generation_config = generation
    return Built(model, places, unused)


def tokenizer_of(plan: Plan) -> Any:
    """Load the tokenizer of the plan's output, with its chat template.

    Raises:
        UsageError: the model has no tokenizer.
    """
    from transformers import AddedToken, AutoTokenizer

    giver = plan.tokenizer_source
    if giver.tokenizer_folder is None:
        raise UsageError(f"{giver.reference}: is a single file, without a tokenizer. Name the folder of the model.")
    try:
        tokenizer = AutoTokenizer.from_pretrained(giver.tokenizer_folder, trust_remote_code=False)
    except (OSError, ValueError) as error:
        raise UsageError(
            f"{giver.tokenizer_folder}: transformers finds no tokenizer: {str(error).splitlines()[0]}"
        ) from error
    for entry in plan.added_tokens:
        tokenizer.add_tokens([AddedToken(entry["content"], **{flag: entry[flag] for flag in FLAGS})])
    if plan.chat_template is not None:
        tokenizer.chat_template = plan.chat_template
    return tokenizer


def config_of(plan: Plan) -> Any:
    """Return the configuration, of transformers, that loading the plan's output would give.

    Raises:
        UsageError: it is missing, or not that of a causal language model that transformers knows.
    """
    from transformers import CONFIG_MAPPING, MODEL_FOR_CAUSAL_LM_MAPPING

    if plan.source.config is None:
        raise UsageError(
            f"{plan.source.reference}: has no config.json: the model can't be built. Name a folder as transformers "
            "writes it."
        )
    # A head that is written may come to differ from the embedding, so it never shares its memory.
    content = written_config(plan, {job.name: {"output": job.name} for job in plan.jobs})
    kind = content.get("model_type", "")
    if kind not in CONFIG_MAPPING:
        why = "its own code is not run" if "auto_map" in content else "transformers doesn't know it"
        raise UsageError(f"{plan.source.reference}: model_type {kind!r}: {why}.{nearest(kind, CONFIG_MAPPING)}")
    config = CONFIG_MAPPING[kind].from_dict(content)
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise UsageError(f"{plan.source.reference}: model_type {kind!r} is no causal language model in transformers.")
    return config


def generation_config_of(plan: Plan) -> Any:
    """Return the configuration, of transformers, with which the plan's output answers; None where it has none.

    Raises:
        CheckpointError: the file may not be opened, or is no JSON object.
        UsageError: transformers doesn't take its settings.
    """
    from transformers import GenerationConfig

    path = companions(plan)[0].get(GENERATION)  # the tokenizer's model may have one of its own
    if path is None:
        return None
    settings: Any = GenerationConfig  # has no types
    try:
        return settings.from_dict(read_json(path))
    except (TypeError, ValueError) as error:
        raise UsageError(f"{path}: transformers refuses it: {one_line(str(error))}") from error


def _places(plan: Plan, model: Any) -> tuple[Places, tuple[str, ...]]:
    """Return the place of each tensor of the plan in the model, and the tensors that have none."""
    from transformers.core_model_loading import revert_weight_conversion

    own = {tensor.untyped_storage().data_ptr(): name for name, tensor in model.state_dict().items()}
    with _AsViews():  # the state it would be saved as, in views of its parameters wherever their order allows
        saved: dict[str, torch.Tensor] = revert_weight_conversion(model, model.state_dict())
    names = {job.name: name for job in plan.jobs if (name := _name_in(saved, job.name, model.base_model_prefix))}
    places = {name: saved[known].detach() for name, known in names.items()}
    shapes = {job.name: job.shape for job in plan.jobs}
    problems = [
        f"{name}: {type(model).__name__} stores it in another order than the checkpoint: not supported"
        for name, place in places.items()
        if place.untyped_storage().data_ptr() not in own or tuple(place.shape) != shapes[name]
    ]
    filled: dict[int, str] = {}
    for name, place in places.items():
        if place.numel() and (other := filled.setdefault(place.data_ptr(), name)) != name:
            problems.append(f"{name}: the model ties it to {other}, but both are written")
    problems += [
        f"{name}: is in the model, but no tensor of the output is"
        for name, tensor in saved.items()
        if name not in names.values() and tensor.data_ptr() not in filled
    ]
    if problems:
        raise PlanError(problems)
    return places, tuple(job.name for job in plan.jobs if job.name not in places)


class _AsViews(TorchFunctionMode):
    """Makes ``Tensor.contiguous`` return the tensor itself, so that a part of a parameter stays one."""

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        return args[0] if func is torch.Tensor.contiguous else func(*args, **(kwargs or {}))


def _name_in(saved: Mapping[str, torch.Tensor], name: str, prefix: str) -> str | None:
    """Return the model's name of a tensor: with or without the prefix of the model below the head, as on loading."""
    options = (name, f"{prefix}.{name}", name.removeprefix(f"{prefix}."))
    return next((option for option in options if option in saved), None)


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence transformers' progress bar and report: nothing is loaded, and misfits are raised as errors."""
    from transformers.utils import logging as _their_logging

    their_logging: Any = _their_logging  # not all of it has types
    before, bars = their_logging.get_verbosity(), their_logging.is_progress_bar_enabled()
    their_logging.set_verbosity(logging.CRITICAL)
    their_logging.disable_progress_bar()
    try:
        yield
    finally:
        their_logging.set_verbosity(before)
        if bars:
            their_logging.enable_progress_bar()
