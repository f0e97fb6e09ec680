"""Models and tokenizers through transformers, with errors in a sentence. No code of a model folder is ever run."""

from __future__ import annotations

import gc
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypeVar

from mergekit_lite.errors import CheckpointError, UsageError, listing, shortened

if TYPE_CHECKING:
    import torch
    from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

T = TypeVar("T")
Dtype = Literal["float32", "bfloat16", "float16"]
NO_CODE: Mapping[str, Any] = {"trust_remote_code": False}  # without it transformers asks on the terminal
CAUSAL = "a causal language model"
SERVE = "serve it, and name the `server`."


class Placed(NamedTuple):
    """The device and dtype of a model."""

    device: str | None  # cpu, cuda, cuda:1 …, or auto: spread over all GPUs. None leaves it to the trainer.
    dtype: torch.dtype | Literal["auto"]  # auto is that of the model's folder


def placed(device: str | None, dtype: Dtype | None) -> Placed:
    """Fill in the defaults: the first GPU with the model's own dtype, else the CPU with float32.

    Raises:
        UsageError: there is no such device.
    """
    import torch

    if device not in (None, "auto"):
        try:
            torch.empty(0, device=device)
        except (RuntimeError, AssertionError) as error:  # the latter from a torch without CUDA
            why = shortened(str(error).strip().partition("\n")[0])
            raise UsageError(f"The device {device!r} is not there: {why}. Known: cpu, cuda, cuda:1 …, auto.") from error
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if dtype is not None:
        return Placed(device, getattr(torch, dtype))
    return Placed(device, torch.float32 if device == "cpu" else "auto")


def tokenizer_of(path: str, own_code: str = SERVE) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a folder or of org/name on the hub.

    Raises:
        CheckpointError: it can't be loaded.
    """
    from transformers import AutoTokenizer

    tokenizer: PreTrainedTokenizerBase = fetched(
        path, "a tokenizer", lambda: AutoTokenizer.from_pretrained(path, **NO_CODE), own_code
    )
    return tokenizer


def config_of(path: str, expected: str, own_code: str = SERVE) -> PretrainedConfig:
    """Load the configuration of a folder or of org/name on the hub.

    Raises:
        CheckpointError: it can't be loaded; ``expected`` says which kind of model it should be of.
    """
    from transformers import AutoConfig

    config: PretrainedConfig = fetched(path, expected, lambda: AutoConfig.from_pretrained(path, **NO_CODE), own_code)
    return config


def causal_model(path: str, place: Placed, own_code: str = SERVE, **how: Any) -> PreTrainedModel:
    """Load a causal language model in evaluation mode.

    Raises:
        CheckpointError: it can't be loaded, or some of its weights are missing.
    """
    from transformers import AutoModelForCausalLM

    model, missing, _ = model_of(AutoModelForCausalLM, path, CAUSAL, place, own_code, **how)
    if missing:
        raise CheckpointError(listing(f"{path} is no causal language model", [f"no {name}" for name in missing]))
    return model


class LoadedModel(NamedTuple):
    """A model in evaluation mode, on its device."""

    model: PreTrainedModel
    missing: list[str]  # tensors that the weights don't have; transformers initialised them at random
    unexpected: list[str]  # tensors of the weights that the model doesn't have


def model_of(auto: Any, path: str, expected: str, place: Placed, own_code: str = SERVE, **how: Any) -> LoadedModel:
    """Load a folder or org/name on the hub with one of transformers' ``AutoModel…`` classes.

    Raises:
        CheckpointError: it can't be loaded; ``expected`` says which kind of model it should be.
    """
    how |= {"dtype": place.dtype, "output_loading_info": True}
    if place.device == "auto":
        how["device_map"] = "auto"
    model, info = fetched(path, expected, lambda: auto.from_pretrained(path, **NO_CODE, **how), own_code)
    if place.device not in ("auto", None):
        model = model.to(place.device)
    return LoadedModel(model.eval(), sorted(info["missing_keys"]), sorted(info["unexpected_keys"]))


def context_of(model: PreTrainedModel) -> int | None:
    """Return the longest sequence that a model takes, in tokens, or None where its config doesn't say."""
    most = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    return most if isinstance(most, int) and most > 0 else None


def fetched(path: str, expected: str, load: Callable[[], T], own_code: str = SERVE) -> T:
    """Call ``load``, a function of transformers, and turn its complaint into a sentence.

    Raises:
        CheckpointError: with that complaint and what is expected at ``path``; for a model that comes with code of its
            own, with ``own_code``.
    """
    from transformers.utils import logging

    untyped: Any = logging
    untyped.disable_progress_bar()  # that of the weights would appear in the middle of our own
    try:
        return load()
    except Exception as error:  # of a damaged file any: tokenizers raises the class itself, transformers TypeError
        lines = str(error).strip().splitlines() or [type(error).__name__]
        remedy = (
            f"It comes with code of its own, which is never run here: {own_code}"
            if "trust_remote_code" in str(error)
            else f"Expected is a folder with {expected}, or org/name on the hub."
        )
        raise CheckpointError(f"Can't load the model {path}: {shortened(lines[0])} {remedy}") from error


def free_memory() -> None:
    """Return the memory of models that are no longer referenced to the device."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
