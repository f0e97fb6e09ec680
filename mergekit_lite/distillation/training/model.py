"""The model that is trained, and the model that is written in the end."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch

from mergekit_lite.answers import loading
from mergekit_lite.answers.loading import CAUSAL, Placed
from mergekit_lite.answers.logprobs import Batch, check_head, response_log_probs
from mergekit_lite.distillation.recipe import Training
from mergekit_lite.errors import UsageError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "adapter"
OWN_CODE = "only architectures that transformers has are trained."


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """The tokenizer of a model.

    Raises:
        CheckpointError: there is none.
    """
    return loading.tokenizer_of(name, OWN_CODE)


def trained_model(name: str, training: Training, dropout: bool, seed: int) -> PreTrainedModel:
    """The model to train; called, it gives the log-probabilities of responses.

    All of its weights are in float32, for steps of 1e-7 are lost on 16 bits: ``dtype`` is what it computes in. Under an
    adapter, only the adapter's are.

    Args:
        name: a folder or a name on the hub.
        training: the stage.
        dropout: whether to keep the dropout that its configuration asks for.
        seed: of an adapter's first weights.

    Raises:
        CheckpointError: it can't be loaded, or its weights are not all there.
        UsageError: its head is not what log-probabilities are made for.
    """
    frozen = training.lora is not None
    place = Placed(None, getattr(torch, training.dtype) if frozen else torch.float32)
    config = loading.config_of(name, CAUSAL, OWN_CODE)
    model = loading.causal_model(name, place, OWN_CODE, config=config if dropout else without_dropout(config))
    check_head(model)
    make_savable(model.generation_config)
    model.forward = MethodType(_log_probs, model)
    if not frozen:
        return model
    torch.manual_seed(seed)
    return cast("PreTrainedModel", with_adapter(model, training))


def make_savable(generation: GenerationConfig) -> None:
    """Say that it samples where it has a temperature: some released models don't, and transformers won't save them."""
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def without_dropout(config: Any) -> Any:
    """The configuration with every dropout at 0."""
    config = deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                setattr(part, key, 0.0)
    return config


def with_adapter(model: PreTrainedModel, training: Training) -> Any:
    """The model under a new LoRA."""
    import peft

    assert training.lora is not None
    modules = training.lora.target_modules
    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=training.lora.rank,
                lora_alpha=training.lora.alpha,  # type: ignore[arg-type]  # it takes any number
                lora_dropout=training.lora.dropout,
                target_modules=modules if isinstance(modules, str) else list(modules),
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise UsageError(f"peft can't put a LoRA on {model.name_or_path}: {error}") from error


def _log_probs(
    self: PreTrainedModel,
    input_ids: torch.Tensor,
    attention_mask: torch.Tensor,
    responses: torch.Tensor,
    squares: bool = False,
    **_: Any,
) -> dict[str, torch.Tensor]:
    """What the model's ``forward`` is while it is trained.

    Being the forward pass itself, it works inside of whatever wraps the model to spread it over devices.
    """
    scored = response_log_probs(self, Batch(input_ids, attention_mask, responses), squares)
    found = {"sums": scored.sums, "lengths": scored.lengths}
    return found if scored.squares is None else {**found, "squares": scored.squares}


def write_model(saved: Path, start: str, training: Training, folder: Path) -> None:
    """Put a complete model folder together from what the trainer saved.

    Args:
        saved: the trained weights in float32, or the adapter.
        start: the model that training started from: its configuration, generation configuration and tokenizer.
        training: the stage; its ``dtype`` is what is written.
        folder: to write.
    """
    from transformers import GenerationConfig

    config = loading.config_of(start, CAUSAL, OWN_CODE)
    trained = str(saved) if training.lora is None else start
    model: Any = loading.causal_model(trained, Placed(None, torch.float32), OWN_CODE, config=config)
    if training.lora is not None:
        import peft

        adapted = peft.PeftModel.from_pretrained(model, saved)
        adapted.save_pretrained(str(folder / ADAPTER))
        model = adapted.merge_and_unload()
    model.to(getattr(torch, training.dtype)).save_pretrained(folder)
    tokenizer_of(start).save_pretrained(folder)
    try:
        generation = GenerationConfig.from_pretrained(start)
    except OSError:  # it has none
        return
    make_savable(generation)
    generation.save_pretrained(folder)
