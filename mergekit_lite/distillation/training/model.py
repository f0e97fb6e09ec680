"""Loading the model to train, and writing the trained model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from dataclasses import fields
from importlib.util import find_spec
from pathlib import Path
from types import MethodType
from typing import TYPE_CHECKING, Any, cast

import torch

from mergekit_lite.answers import loading
from mergekit_lite.answers.loading import CAUSAL, Placed
from mergekit_lite.answers.logprobs import Batch, by_sequence, check_head, response_log_probs
from mergekit_lite.answers.packing import Packed, packs
from mergekit_lite.distillation.recipe.schema import Noise, Training
from mergekit_lite.distillation.training.deepspeed import is_partitioned
from mergekit_lite.distillation.training.mixing import Mixture, mixed_log_probs
from mergekit_lite.distillation.training.noise import noisy
from mergekit_lite.distillation.training.rows import Layout
from mergekit_lite.errors import UsageError

if TYPE_CHECKING:
    from transformers import GenerationConfig, PreTrainedModel, PreTrainedTokenizerBase

ADAPTER = "adapter"
# From a model, a batch and what each teacher says of it to the log-probabilities of its tokens (R,), and to each
# teacher's distances (G,).
Distances = Callable[[Any, Batch | Packed, Sequence[Any]], tuple[torch.Tensor, list[torch.Tensor]]]
OWN_CODE = "only architectures that transformers has are trained."  # ends the refusal of models with own code


def tokenizer_of(name: str) -> PreTrainedTokenizerBase:
    """Return the tokenizer of a model.

    Raises:
        CheckpointError: the model has none.
    """
    return loading.tokenizer_of(name, OWN_CODE)


def trained_model(
    name: str,
    training: Training,
    dropout: bool,
    seed: int,
    distances: Distances | None = None,
    mixture: Mixture | None = None,
    noise: Noise | None = None,
) -> PreTrainedModel:
    """Return the model to train, with a forward pass that returns log-probabilities of responses (``_log_probs``).

    Its weights are in float32, as 16 bits lose steps of 1e-7; ``dtype`` is that of the computation. With an adapter,
    only the adapter's weights are in float32, and with QLoRA (2305.14314) the linear layers' are in 4 bits.

    Args:
        name: a folder or a name on the hub.
        training: of the recipe.
        dropout: whether to keep the dropout of the model's configuration.
        seed: of an adapter's initial weights.
        distances: computes the distances to teachers, for trainings that have such.
        mixture: of its logits with those of another model, for objectives that need such.
        noise: on the embeddings in training mode.

    Raises:
        CheckpointError: it can't be loaded, or weights are missing.
        UsageError: log-probabilities can't be computed for its head. With weights that ZeRO-3 has partitioned,
            ``check_whole_model`` finds out.
    """
    frozen = training.lora is not None
    place = Placed(None, getattr(torch, training.dtype) if frozen else torch.float32)
    config = loading.config_of(name, CAUSAL, OWN_CODE)
    how = loading_arguments(training)
    model = loading.causal_model(name, place, OWN_CODE, config=config if dropout else without_dropout(config), **how)
    for layer in model.modules():
        if hasattr(layer, "support_avx512bf16_for_cpu"):  # of bitsandbytes: a form for generating only, in bfloat16
            setattr(layer, "support_avx512bf16_for_cpu", False)  # noqa: B010  # no attribute of a module that types know
    if not is_partitioned(model):
        check_head(model)
    make_savable(model.generation_config)
    set_layout(model, training)
    for part, value in (("distances", distances), ("mixture", mixture), ("embedding_noise", noise)):
        setattr(model, part, value)  # no attribute of a module that types know
    model.forward = MethodType(_log_probs, model)
    if not frozen:
        return model
    torch.manual_seed(seed)
    return cast("PreTrainedModel", with_adapter(model, training))


def frozen_model(name: str, training: Training, device: torch.device) -> PreTrainedModel:
    """Return another model than the one to train, whole on a device, to compute what that computes without gradient.

    Raises:
        CheckpointError: it can't be loaded.
        UsageError: log-probabilities can't be computed for its head, or ZeRO-3 has partitioned it.
    """
    model = trained_model(name, training.model_copy(update={"lora": None}), dropout=False, seed=0)
    if is_partitioned(model):
        raise UsageError(f"{name} has to be whole in each process, and ZeRO-3 partitions it. Use ZeRO-2, or DDP.")
    frozen: PreTrainedModel = model.requires_grad_(False).eval().to(device)  # type: ignore[no-untyped-call]
    return frozen


def unavailable(training: Training, stage: str) -> list[str]:
    """Return messages about what a training needs and this machine doesn't have, or its dtype doesn't allow."""
    from transformers.utils.import_utils import is_flash_attn_2_available, is_flash_attn_3_available

    problems = []
    wanted = training.attn_implementation or ""
    there = {"flash_attention_2": is_flash_attn_2_available, "flash_attention_3": is_flash_attn_3_available}
    if wanted in there:
        where, version = f"train.{stage}.attn_implementation", wanted[-1]
        if not there[wanted]():
            package = "flash-attn" if version == "2" else "flash-attn-3"
            text = f"{wanted} needs the package {package} and a GPU that it runs on. Install it, or leave the key out"
            problems.append(f"{where}: {text}: sdpa does the same.")
        if training.dtype == "float32":
            problems.append(f"{where}: flash attention computes in 16 bits: set dtype to bfloat16, or use sdpa.")
    if training.lora is not None and training.lora.base is not None and find_spec("bitsandbytes") is None:
        text = "4 bits need the package bitsandbytes: pip install bitsandbytes, or leave the key out."
        problems.append(f"train.{stage}.lora.base: {text}")
    return problems


def loading_arguments(training: Training) -> dict[str, Any]:
    """Return what transformers is told on loading the model to train, beside its place."""
    how: dict[str, Any] = {}
    if training.attn_implementation is not None:
        how["attn_implementation"] = training.attn_implementation
    if training.lora is not None and training.lora.base is not None:
        from transformers import BitsAndBytesConfig

        how["quantization_config"] = BitsAndBytesConfig(  # type: ignore[no-untyped-call]
            load_in_4bit=True,
            bnb_4bit_quant_type=training.lora.base,
            bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=getattr(torch, training.dtype),
        )
    return how


def set_layout(model: Any, training: Training) -> None:
    """Set the model's ``layout``, and its attention to what that needs.

    Flash attention keeps sequences apart by itself, if the rest of the model does, but can't share prompts.
    """
    model.layout = "padded"
    whole = not is_partitioned(model)  # else it can't be tried before ZeRO-3's engine is there
    own = model.own_attention = model.config._attn_implementation
    flash = own.startswith("flash_attention")
    if training.packing and (flash or training.attn_implementation in (None, "sdpa")) and whole and packs(model):
        model.layout = "packed" if flash else "shared"
        if flash:
            model.set_attn_implementation(own)


def layout_of(model: Any) -> Layout:
    """Return how the rows of a batch must lie for ``trained_model``'s model."""
    layout: Layout = model.layout
    return layout


def check_whole_model(model: Any) -> None:
    """Do what ``trained_model`` can't do with weights that ZeRO-3 has partitioned: check the head, by its engine.

    Every process must call this, with the model on its devices. Does nothing for other models.

    Raises:
        UsageError: log-probabilities can't be computed for its head.
    """
    if not is_partitioned(model):
        return
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ours = base.__dict__.pop("forward")  # leaves the forward pass of its class, with logits
    try:
        check_head(base)
    finally:
        base.forward = ours


@contextmanager
def answering(model: Any) -> Iterator[Any]:
    """Give ``trained_model``'s model meanwhile as it answers: its own forward pass and attention, no dropout.

    A model with an adapter answers with it.
    """
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    ours, attention, generation = base.__dict__.pop("forward"), base.config._attn_implementation, base.generation_config
    mode = model.training
    base.set_attn_implementation(base.own_attention)
    model.eval()
    try:
        yield base
    finally:
        base.forward = ours
        base.set_attn_implementation(attention)
        base.generation_config = generation
        model.train(mode)


def make_savable(generation: GenerationConfig) -> None:
    """Enable sampling where the configuration is invalid without it: transformers would refuse to save the model.

    Some released models have a temperature without ``do_sample``.
    """
    try:
        generation.validate(strict=True)
    except ValueError:
        generation.do_sample = True


def without_dropout(config: Any) -> Any:
    """Return a copy of the configuration with every dropout at 0."""
    config = deepcopy(config)
    for part in {id(part): part for part in (config, config.get_text_config())}.values():
        for key, value in part.to_dict().items():
            if isinstance(value, float) and ("dropout" in key or key.endswith("pdrop")):
                setattr(part, key, 0.0)
    return config


def with_adapter(model: PreTrainedModel, training: Training) -> Any:
    """Return the model with a new LoRA.

    Raises:
        UsageError: peft refuses the model or the modules.
    """
    import peft

    assert training.lora is not None
    modules = training.lora.target_modules
    whole = list(training.lora.modules_to_save) or None
    try:
        return peft.get_peft_model(
            model,
            peft.LoraConfig(
                r=training.lora.rank,
                lora_alpha=training.lora.alpha,  # type: ignore[arg-type]  # it takes any number
                lora_dropout=training.lora.dropout,
                target_modules=modules if isinstance(modules, str) else list(modules),
                modules_to_save=whole,
                # A head that is the embedding stays so.
                ensure_weight_tying=whole is not None and bool(model.config.get_text_config().tie_word_embeddings),
                use_rslora=training.lora.rslora,
                use_dora=training.lora.dora,
                task_type="CAUSAL_LM",
            ),
        )
    except ValueError as error:
        raise UsageError(f"peft can't put a LoRA on {model.name_or_path}: {error}") from error


def _log_probs(
    self: PreTrainedModel,
    squares: bool = False,
    by_token: bool = False,
    taught: Sequence[Any] | None = None,
    mixed: bool = False,
    **inputs: Any,
) -> dict[str, Any]:
    """Replace the model's ``forward`` during training, so that FSDP's and other wrappers see a forward pass.

    The inputs are the fields of a ``Batch`` or of a ``Packed`` batch of R responses. ``sums`` and ``lengths`` of the
    responses are (R,), and so are ``squares``: mean_t log Σ_v π(v)². With ``by_token`` there are the log-probabilities
    of all ``tokens`` instead, in one row; with what teachers say (``taught``) the ``distances`` to them too. With
    ``mixed`` there are the sums under the ``mixture`` too.
    """
    kind = Packed if "sizes" in inputs else Batch
    batch = kind(**{field.name: inputs[field.name] for field in fields(kind)})
    if taught is not None:
        distances: Distances = self.distances  # type: ignore[assignment]  # no attribute that transformers has
        tokens, losses = distances(self, batch, taught)
        return {"sums": by_sequence(tokens, batch.lengths), "lengths": batch.lengths, "distances": losses}
    noise: Noise | None = self.embedding_noise if self.training else None  # type: ignore[assignment]
    with nullcontext() if noise is None else noisy(self, batch, noise):
        scored = response_log_probs(self, batch, squares)
    if by_token:
        return {"tokens": scored.tokens}
    outputs = {"sums": scored.sums, "lengths": scored.lengths}
    if scored.squares is not None:
        outputs["squares"] = scored.squares
    if mixed:
        outputs["mixed"] = mixed_log_probs(self, batch, scored.states, self.mixture)  # type: ignore[arg-type]
    return outputs


def write_model(saved: Path, start: str, training: Training, folder: Path) -> None:
    """Write a complete model folder from what the trainer saved.

    Args:
        saved: the folder of the trained weights in float32, or of the adapter.
        start: the model that training started from; it gives configuration, generation configuration and tokenizer.
        training: of the recipe; weights are written in its ``dtype``.
        folder: to write.

    An adapter is folded into the weights that training started from, in float32. After QLoRA these aren't the 4-bit
    ones that were trained beside: the result differs from the model in training by the base's rounding to 4 bits.
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
    except OSError:  # the model has none
        return
    make_savable(generation)
    generation.save_pretrained(folder)
