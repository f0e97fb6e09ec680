"""Prompts that an aligned model draws from its chat template's beginning: Magpie (Xu et al. 2024, arXiv 2406.08464)."""

from __future__ import annotations

from contextlib import AbstractContextManager
from pathlib import Path

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.loading import tokenizer_of
from mergekit_lite.answers.local import SERVE, Local
from mergekit_lite.answers.pre_query import stopped
from mergekit_lite.answers.respondents import respondent
from mergekit_lite.answers.rows import Message, Prompt, seed_of
from mergekit_lite.answers.server import Served
from mergekit_lite.answers.template import ChatTemplate, PreQuery
from mergekit_lite.distillation.drawing import Draws, named
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.choosing import Magpie
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.errors import CheckpointError, one_line


def draws_of(magpie: Magpie, domain: str, folder: Path, seed: int, reporter: Reporter) -> Draws:
    """Return the draws of an aligned model.

    Args:
        magpie: how they are drawn.
        domain: of the prompts.
        folder: the recipe's.
        seed: the recipe's.
        reporter: is told what is odd about the chat template, once it is read.
    """
    asked = Prompt(magpie.name, (Message(role="user", content=""),))  # nobody has said anything yet

    def opened(log: Path) -> AbstractContextManager[Served | Local]:
        before = _beginning(magpie, reporter)
        # The system prompt is in what the model reads.
        update = {"sampling": stopped(magpie.sampling, before, magpie.early_stopping), "system": None}
        return respondent(magpie.model_copy(update=update), magpie.model, log, before=before)

    return Draws(
        magpie,
        folder,
        Folder(folder).drawn(magpie.name),
        domain,
        [Task(asked, index, seed_of(seed, "magpie", magpie.name, index)) for index in range(magpie.number)],
        {
            "tokenizer": magpie.tokenizer and named(magpie.tokenizer, folder),
            "early_stopping": magpie.early_stopping,
            "seed": seed,
        },
        opened,
        lambda row: str(row["text"]),
    )


def _beginning(magpie: Magpie, reporter: Reporter) -> PreQuery:
    """Return what the model reads, and tell what is odd about it."""
    try:
        template = ChatTemplate(tokenizer_of(magpie.tokenizer or magpie.model, SERVE))
    except CheckpointError as error:
        if not magpie.is_served or magpie.tokenizer is not None:
            raise
        raise CheckpointError(f"{error} Name the folder or org/name with the chat template as `tokenizer`.") from error
    before = template.pre_query(magpie.system)
    for note in template.notes:
        reporter.line(f"{magpie.name}: {note}")
    told = (magpie.sampling.extra_body or {}).get("add_special_tokens", True)
    for token, where in zip(before.lacks, ("before", "behind"), strict=True):
        if token and magpie.is_served and told:
            reporter.warn(
                f"{magpie.name}: the tokenizer puts {one_line(token)} {where} texts, where the chat template has none. "
                "Give `sampling: {extra_body: {add_special_tokens: false}}`, if the server takes it."
            )
    return before
