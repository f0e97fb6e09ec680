"""The models of a preview, known by their headers: what they are, whether they read the same tokens, what they take."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.answers.local import ends_of
from mergekit_lite.engine.devices import memory_left
from mergekit_lite.errors import MergekitLiteError, UsageError, counted, listing, shortened
from mergekit_lite.planning import Plan, make_plan
from mergekit_lite.recipe import Recipe, Slice, Source
from mergekit_lite.resident.model import config_of, generation_config_of, tokenizer_of

SHOWN = 3  # tokens that a message names
UNWRITTEN = Path("previewed")  # the output in plans that are never run


@dataclass(frozen=True)
class Opened:
    """One model of the preview, whose weights are not read yet."""

    role: str  # SFT, ALIGNED or ON
    reference: str  # as the user gave it
    plan: Plan  # of the model as it is, in the dtype that it computes in
    config: Any  # of transformers

    @cached_property
    def tokenizer(self) -> Any:
        """The model's tokenizer. Raises UsageError where it has none."""
        return tokenizer_of(self.plan)

    @cached_property
    def tokens(self) -> dict[int, str]:
        """The tokens by their numbers."""
        return {number: token for token, number in self.tokenizer.get_vocab().items()}

    @property
    def width(self) -> int:
        """How many tokens the model has logits for, those that only pad the matrix included."""
        return int(self.config.get_text_config().vocab_size)

    @property
    def context(self) -> int | None:
        """The longest sequence that the model takes, in tokens; None where its config doesn't say."""
        most: int | None = getattr(self.config.get_text_config(), "max_position_embeddings", None)
        return most

    @property
    def weights(self) -> int:
        """The bytes of the weights in memory."""
        return sum(job.numel * dtypes.size(job.dtype) for job in self.plan.jobs)

    def ends(self) -> frozenset[int]:
        """Return the tokens that end an answer of this model."""
        config = generation_config_of(self.plan) or self.config.get_text_config()
        return ends_of(config.eos_token_id, self.tokenizer)

    def cached(self, tokens: int) -> int:
        """Estimate the bytes of the keys and values of so long a sequence; 0 where the config doesn't tell."""
        config = self.config.get_text_config()
        try:
            heads = int(getattr(config, "num_key_value_heads", None) or config.num_attention_heads)
            size = int(getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads)
            layers = int(config.num_hidden_layers)
        except AttributeError:
            return 0
        return 2 * layers * heads * size * tokens * max(dtypes.size(job.dtype) for job in self.plan.jobs)


def opened(references: Mapping[str, str], dtype: str | None) -> list[Opened]:
    """Open models by their roles, from headers alone.

    Args:
        references: by role; any that the other commands take.
        dtype: what the weights are converted to; None for their own.

    Raises:
        UsageError: some can't be opened, or transformers can't load them; the message has all reasons.
    """
    models, problems = [], []
    for role, reference in references.items():
        try:
            recipe = Recipe("passthrough", (Slice((Source(reference),)),), out_dtype=dtype)
            plan = make_plan(recipe, [UNWRITTEN])
            models.append(Opened(role, reference, plan, config_of(plan)))
        except MergekitLiteError as error:
            problems.append(f"{role}: {error}")
    if problems:
        raise UsageError(problems[0] if len(problems) == 1 else listing("Models that can't be previewed", problems))
    return models


def check_vocabularies(models: Sequence[Opened]) -> list[str]:
    """Compare what the numbers of tokens stand for, whatever the tokenizers are called; return notes.

    Models may have logits for more tokens than their tokenizers know (padding), and a tokenizer may have tokens that
    another one leaves unused.

    Raises:
        UsageError: a number stands for different tokens in two models; the message names some.
    """
    problems, notes = [], []
    (first, *others) = models
    for other in others:
        shared = first.tokens.keys() & other.tokens.keys()
        unlike = sorted(number for number in shared if first.tokens[number] != other.tokens[number])
        if unlike:
            shown = ", ".join(
                f"{number} is {shortened(first.tokens[number], 20)!r} and {shortened(other.tokens[number], 20)!r}"
                for number in unlike[:SHOWN]
            )
            problems.append(f"{first.role} and {other.role} differ in {counted(len(unlike), 'token')}: {shown}")
        elif missing := sorted(first.tokens.keys() - other.tokens.keys()):
            shown = ", ".join(repr(first.tokens[number]) for number in missing[:SHOWN])
            notes.append(
                f"{counted(len(missing), 'token')} of {first.role} ({shown}) are not in {other.role}'s tokenizer: "
                "what it makes of them was not trained."
            )
    if problems:
        title = "Logits of unlike vocabularies can't be added. Take models with one tokenizer"
        raise UsageError(f"{title}: {problems[0]}." if len(problems) == 1 else listing(title, problems))
    return notes


def check_memory(models: Sequence[Opened], device: str) -> None:
    """Refuse, before anything is loaded, models whose weights alone don't fit into what is free.

    Raises:
        UsageError: with what they take and what is there.
    """
    taken, free = sum(model.weights for model in models), memory_left(device)
    if free is not None and taken > free:
        each = ", ".join(f"{model.role} {model.weights / 1e9:.2f}" for model in models)
        raise UsageError(
            f"The weights take {taken / 1e9:.2f} GB ({each}), but only {free / 1e9:.2f} GB of memory are free on "
            f"{device}. Take --dtype bfloat16, or another --device; alpha 0 and -1 alone take one model."
        )
