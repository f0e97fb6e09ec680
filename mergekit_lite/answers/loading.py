"""Models and tokenizers through transformers, with errors in a sentence. No code of a model folder is ever run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from mergekit_lite.errors import CheckpointError, listing, shortened

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16", "float16"]
NO_CODE: Mapping[str, Any] = {"trust_remote_code": False}  # if it is not said, transformers asks the terminal
CAUSAL = "a causal language model"
SERVE = "serve it, and name the `server`."


class Placed(NamedTuple):
    """Where a model computes, and in what.

    Attributes:
        device: cpu, cuda, cuda:1 …, or auto: spread over all GPUs. None leaves it to who trains the model.
        dtype: auto is what the model's folder says.
    """

    device: str | None
    dtype: torch.dtype | Literal["auto"]


def placed(device: str | None, dtype: Dtype | None) -> Placed:
    """By default on the first GPU in the model's own dtype, else on the CPU in float32."""
    import torch

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is not None:
        return Placed(device, getattr(torch, dtype))
    return Placed(device, torch.float32 if device == "cpu" else "auto")


def tokenizer_of(path: str, own_code: str = SERVE) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or of org/name on the hub.

    Raises:
        CheckpointError: it can't be loaded.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = fetched(
        path, "a tokenizer", lambda: AutoTokenizer.from_pretrained(path, **NO_CODE), own_code
    )
    return tokenizer


def config_of(path: str, expected: str, own_code: str = SERVE) -> PretrainedConfig:
    """The configuration of a folder or of org/name on the hub.

    Raises:
        CheckpointError: it can't be loaded; ``expected`` says what it should be of.
    """
    from transformers import AutoConfig

    config: PretrainedConfig = fetched(path, expected, lambda: AutoConfig.from_pretrained(path, **NO_CODE), own_code)
    return config


def causal_model(path: str, place: Placed, own_code: str = SERVE, **how: Any) -> PreTrainedModel:
    """A causal language model in evaluation mode.

    Raises:
        CheckpointError: it can't be loaded, or its weights are not all there.
    """
    from transformers import AutoModelForCausalLM

    model, missing, _ = model_of(AutoModelForCausalLM, path, CAUSAL, place, own_code, **how)
    if missing:
        raise CheckpointError(listing(f"{path} is no causal language model", [f"no {name}" for name in missing]))
    return model


class Loaded(NamedTuple):
    """A model in evaluation mode, on its device."""

    model: PreTrainedModel
    missing: list[str]  # tensors that the weights don't have; they were drawn at random
    unexpected: list[str]  # tensors of the weights that the model has no place for


def model_of(auto: Any, path: str, expected: str, place: Placed, own_code: str = SERVE, **how: Any) -> Loaded:
    """What one of transformers' ``AutoModel…`` classes makes of a folder or of org/name on the hub.

    Raises:
        CheckpointError: it can't be loaded; ``expected`` says what it should be.
    """
    how |= {"dtype": place.dtype, "output_loading_info": True}
    if place.device == "auto":
        how["device_map"] = "auto"
    model, told = fetched(path, expected, lambda: auto.from_pretrained(path, **NO_CODE, **how), own_code)
    if place.device not in ("auto", None):
        model = model.to(place.device)
    return Loaded(model.eval(), sorted(told["missing_keys"]), sorted(told["unexpected_keys"]))


def context_of(model: PreTrainedModel) -> int | None:
    """How many tokens a model takes, where it tells."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def fetched(path: str, expected: str, load: Callable[[], T], own_code: str = SERVE) -> T:
    """What transformers loads, or its complaint in a sentence.

    Raises:
        CheckpointError: what it said, and what was expected at ``path``; or where a model comes with code of its own,
            what to do then.
    """
    from transformers.utils import logging

    told: Any = logging
    told.disable_progress_bar()  # of the weights, in the middle of our own
    try:
        return load()
    except (OSError, ValueError, KeyError, ImportError, RuntimeError) as error:
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = (
            f"It comes with code of its own, which is never run here: {own_code}"
            if "trust_remote_code" in str(error)
            else f"Expected is a folder with {expected}, or org/name on the hub."
        )
        raise CheckpointError(f"Can't load the model {path}: {shortened(lines[0])} {remedy}") from error


def free_memory() -> None:
    """Give the memory of models that nobody holds any more back to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
