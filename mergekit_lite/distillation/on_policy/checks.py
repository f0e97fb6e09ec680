"""What is wrong with a recipe's ``train.on_policy``, before anything is asked or trained."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lite.distillation.recipe.schema import OnPolicy, Recipe, RecipeSource
from mergekit_lite.distillation.training import arguments
from mergekit_lite.distillation.training.model import unavailable

SECTION = "train.on_policy"


def check(recipe: Recipe) -> list[str]:
    """Return all problems of ``train.on_policy``, as messages; none where the recipe has no such section."""
    settings = recipe.train.on_policy
    if settings is None:
        return []
    return [
        *arguments.wrong_trainer_keys(settings, "on_policy"),
        *unavailable(settings, "on_policy"),
        *_teachers(recipe),
        *_lengths(settings),
        *_without_effect(settings),
        *_drawing(settings, recipe.target_source),
    ]


def prompt_limit(settings: OnPolicy) -> int:
    """Return the most tokens that a prompt may have: so that no answer makes a row too long."""
    return settings.max_prompt_length or settings.max_length - settings.sampling.max_tokens


def _teachers(recipe: Recipe) -> Iterator[str]:
    if not recipe.teachers:
        yield f"{SECTION}: learns from teachers, and the recipe has no 'teachers'"
    if recipe.rows is None and not recipe.prompts and not any(source.answers for source in recipe.sources):
        yield f"{SECTION}: asks prompts, and the recipe has no 'prompts'"


def _lengths(settings: OnPolicy) -> Iterator[str]:
    limit = settings.sampling.max_tokens
    if limit >= settings.max_length:
        yield (
            f"{SECTION}: answers of up to {limit:,} tokens (sampling.max_tokens) leave no room for a prompt in "
            f"max_length, {settings.max_length:,}"
        )
    elif settings.max_prompt_length is not None and settings.max_prompt_length + limit > settings.max_length:
        yield (
            f"{SECTION}: prompts of {settings.max_prompt_length:,} tokens (max_prompt_length) and answers of {limit:,} "
            f"(sampling.max_tokens) are longer than max_length, {settings.max_length:,}"
        )


def _without_effect(settings: OnPolicy) -> Iterator[str]:
    if settings.eval or settings.eval_steps is not None or settings.keep == "best":
        yield (
            f"{SECTION}: holds no prompts out: leave 'eval', 'eval_steps' and 'keep' out. Each round's answers are "
            "new, so the log's reverse_kl is of answers that were not trained on"
        )
    if settings.too_long == "cut":
        yield f"{SECTION}: too_long: cut would train on other prompts than were asked; too long ones are left out"
    if settings.in_order:
        yield f"{SECTION}: each round's answers are new, and their order is drawn: leave 'in_order' out"
    if settings.lora is not None and settings.lora.dropout:
        yield f"{SECTION}.lora: dropout would change the model between an answer and the step on it: set it to 0"
    if settings.prompts is not None:
        rows = int(settings.prompts * settings.samples * settings.epochs + 1e-9)
        if rows < settings.batch_size:
            yield (
                f"{SECTION}: {rows:,} answers of a round don't fill a batch of {settings.batch_size}: set batch_size "
                f"to {max(1, rows)} at most, or take more prompts or samples"
            )


def _drawing(settings: OnPolicy, source: RecipeSource | None) -> Iterator[str]:
    served = source is not None and source.is_served
    if source is not None and source.engine == "vllm":
        yield "target_source: vLLM in this process can't be given new weights each round: use `serve`, or leave it out"
    if source is not None and source.server is not None and settings.rounds > 1:
        yield (
            "target_source: its `server` would go on with the weights of the first round: let `serve` start one over "
            "the weights of each round, or leave both out"
        )
    if not served:
        for key in ("presence_penalty", "frequency_penalty", "chat_template_kwargs", "extra_body"):
            if getattr(settings.sampling, key) is not None:
                yield f"{SECTION}.sampling: {key!r} is for a server, and the student answers in this process"
