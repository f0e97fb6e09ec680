"""Examples: prompts, with the responses that the data have, as a model reads them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lite.answers.prompts import LoadedPrompts, Prompts, load
from mergekit_lite.answers.rows import Prompt
from mergekit_lite.answers.template import ChatTemplate, LengthLimits, TemplateError, Tokens, fitted
from mergekit_lite.errors import UsageError, listing

RESPONSE = "reference"  # the column of right answers, as everywhere


@dataclass(frozen=True)
class Examples:
    """What a model reads."""

    rows: tuple[Tokens, ...]  # a response may be empty
    cut: int  # how many were cut at the longest text that the model takes
    notes: tuple[str, ...]

    @property
    def tokens(self) -> int:
        """How many there are in all."""
        return sum(len(row.prompt) + len(row.response) for row in self.rows)

    @property
    def digest(self) -> str:
        """A digest of all tokens."""
        return xxhash.xxh3_128_hexdigest(repr([tuple(row) for row in self.rows]).encode())


def prompts_in(files: Iterable[Path], response: str = RESPONSE) -> LoadedPrompts:
    """Read the prompts of files; ``response`` is the column of the responses to them.

    Raises:
        UsageError: a file can't be read, or has no column with prompts; or no row has the column that was named.
    """
    loaded = load(Prompts(path=path, columns={"reference": response}) for path in files)
    if response != RESPONSE and not any(prompt.reference for prompt in loaded.prompts):
        raise UsageError(f"No row has a response in the column {response!r}, which --response names.")
    return loaded


def examples_of(prompts: Sequence[Prompt], tokenizer: Any, context: int | None, needs_response: bool) -> Examples:
    """Return prompts as a model reads them: through its chat template, each with its response where it has one.

    Args:
        prompts: conversations.
        tokenizer: of the model.
        context: the longest text that it takes, in tokens; longer prompts keep their ends.
        needs_response: whether each has to have a response.

    Raises:
        UsageError: there are no prompts, responses are missing, or the template refuses some.
    """
    if not prompts:
        raise UsageError(
            "No prompts: statistics are gathered on texts, so name files of them: --prompts prompts.jsonl."
        )
    if needs_response and (without := [prompt.id for prompt in prompts if not prompt.reference]):
        raise UsageError(
            listing(
                f"{len(without):,} of {len(prompts):,} prompts have no response, which Fisher information is of: the "
                f"column {RESPONSE!r}, or the one that --response names. Their ids",
                without,
                shown=5,
            )
        )
    template = ChatTemplate(tokenizer)
    rows, wrong, cut = [], [], 0
    for prompt in prompts:
        try:
            row = (
                template.tokens(prompt.messages, prompt.reference)
                if prompt.reference
                else Tokens(template.prompt(prompt.messages), ())
            )
        except TemplateError as error:
            wrong.append(f"{prompt.id}: {error}")
            continue
        fits = fitted([row], LengthLimits(context, too_long="cut")) if context is not None else None
        if fits is not None:
            [row], was_cut = fits
            cut += was_cut
        if needs_response and not (row.response and row.prompt):
            wrong.append(f"{prompt.id}: no token of its response follows another token")
        elif row.prompt or row.response:
            rows.append(row)
    if wrong:
        raise UsageError(listing("Prompts can't be read as the model would read them", wrong))
    if not rows:
        raise UsageError("No prompt has a token.")
    return Examples(tuple(rows), cut, tuple(template.notes))
