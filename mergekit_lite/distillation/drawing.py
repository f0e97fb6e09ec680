"""Prompts that a model says one by one: the draws, which survive a kill, and what of them is left out.

The draws are a ledger, each with a seed of its own, so that a kill loses what is in flight. Those that are empty, cut
at the limit of tokens, end with a colon, or were drawn before are counted and left out.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers.asked_model import AskedModel
from mergekit_lite.answers.asking import Notes, Task, reasons, repeated
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.prompts import LoadedPrompts, digest_of
from mergekit_lite.answers.rows import ANSWER, Key, Message, Prompt
from mergekit_lite.answers.server import Served
from mergekit_lite.distillation.remarks import ENOUGH, HINT, NEARLY_ALL
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.settings import as_from, hold_settings
from mergekit_lite.errors import RunError, counted

EMPTY, CUT, COLON, REPEATED = "empty", "cut at `max_tokens`", "with a colon at the end", "drawn before"


@dataclass(frozen=True)
class Draws:
    """What a model is to say, and how."""

    model: AskedModel
    folder: Path  # the recipe's
    path: Path  # the ledger's
    domain: str  # of the prompts
    tasks: Sequence[Task]  # one for each draw
    settings: Mapping[str, Any]  # what the draws depend on, beside the model and its sampling
    opened: Callable[[Path], AbstractContextManager[Served | Local]]  # the model, whose server prints to a file
    said: Callable[[Mapping[str, Any]], str]  # the prompt in the row of a draw

    @property
    def name(self) -> str:
        """What it is called."""
        return self.model.name


def drawn(draws: Draws, reporter: Reporter, *, plan: bool) -> LoadedPrompts:
    """Return the prompts that a model draws, in the order of the draws. Those that are there aren't drawn again.

    Args:
        draws: what is drawn.
        reporter: is told of the progress, and of how many prompts are kept.
        plan: draw nothing; where draws are missing, as many prompts as there can be stand for them.

    Raises:
        UsageError: there are draws that were made in another way.
        CheckpointError: the model or its tokenizer can't be loaded.
        TemplateError: the chat template doesn't show where a user's words stand.
        RunError: prompts are missing at the end, or none is left.
    """
    ledger = Ledger(
        draws.path, [task.key for task in draws.tasks], lambda row: Key(row["prompt"], row["index"]), ANSWER
    )
    if plan and ledger.missing:
        most = len(draws.tasks)
        reporter.line(
            f"{draws.name}: {counted(len(ledger.missing), 'prompt')} of {most:,} will be drawn from "
            f"{draws.model.model}, {draws.model.where}; at most {most:,} are asked, and as many are counted with here"
        )
        loaded = LoadedPrompts()
        for number in range(most):
            loaded.add(
                _prompt(f"{draws.path.parent.name} {draws.name} {number}", draws.domain), f"{draws.path}:{number + 1}"
            )
        return loaded
    if not plan:
        _hold(draws)
    if ledger.missing:
        _draw(draws, ledger, reporter)
    if not plan:
        ledger.finish()
    return _kept(draws, ledger, reporter)


def _prompt(text: str, domain: str) -> Prompt:
    messages = (Message(role="user", content=text),)
    return Prompt(digest_of(messages), messages, domain, plain=True)


def _draw(draws: Draws, ledger: Ledger[Key], reporter: Reporter) -> None:
    """Draw what is missing. Raises RunError where something is missing then."""
    wanted, total = frozenset(ledger.missing), len(draws.tasks)
    with ExitStack() as stack:
        stack.callback(ledger.close)
        who = stack.enter_context(draws.opened(draws.path.with_name(f"{draws.name}.server.log")))
        notes = Notes({draws.name: who}, reporter.warn)
        advance = stack.enter_context(reporter.progress(draws.name, total, total - len(wanted)))
        for answer in who.answers(draws.tasks, wanted):
            ledger.append([answer.as_row()])
            advance(1)
            notes.tell()
        notes.tell()
    if (said := repeated(who.failures)) is not None:
        reporter.line(f"{draws.name}: {said}")
    if missing := len(ledger.missing):
        why = who.failures.stopped or reasons(who.failures.lost)
        raise RunError(
            f"{draws.name}: {missing:,} of {counted(total, 'prompt')} can't be drawn; all others are kept. "
            f"{why}\nThe same command goes on and draws what is missing."
        )


def _kept(draws: Draws, ledger: Ledger[Key], reporter: Reporter) -> LoadedPrompts:
    loaded, left_out, texts = LoadedPrompts(), Counter[str](), set[str]()
    for number, row in enumerate(ledger.rows(), 1):
        text = draws.said(row).strip()
        if (why := _unfit(row, text, texts)) is not None:
            left_out[why] += 1
            continue
        texts.add(text)
        loaded.add(_prompt(text, draws.domain), f"{ledger.path}:{number}")
    total = len(draws.tasks)
    reporter.line(_told(draws.name, total, len(texts), left_out))
    if total >= ENOUGH and left_out[REPEATED] >= NEARLY_ALL * total:
        reporter.warn(f"{draws.name}: nearly all draws are alike{f': {HINT}' if draws.model.is_served else ''}")
    if not texts:
        raise RunError(f"{draws.name}: no drawn prompt is left. Look at {ledger.path}.")
    return loaded


def _unfit(row: Mapping[str, Any], text: str, texts: set[str]) -> str | None:
    """Return why a prompt is left out; None where it isn't."""
    if row.get("finish") == "length":
        return CUT
    if not any(character.isprintable() and not character.isspace() for character in text):
        return EMPTY
    if text.endswith((":", "：")):  # the filter of Magpie's authors: what should follow is missing
        return COLON
    return REPEATED if text in texts else None


def _told(name: str, total: int, kept: int, left_out: Counter[str]) -> str:
    said = f"{name}: {kept:,} of {counted(total, 'drawn prompt')} kept"
    reasons = ", ".join(f"{left_out[why]:,} {why}" for why in (EMPTY, CUT, COLON, REPEATED) if left_out[why])
    return f"{said}; left out: {reasons}" if reasons else said


def _hold(draws: Draws) -> None:
    """Save the settings of the draws. Raises UsageError where there are some that were drawn with others."""
    path, name = draws.path, draws.name
    exists = any(path.with_name(f"{name}{end}").exists() for end in (".jsonl", ".partial.jsonl"))
    examples = draws.model.examples()
    settings = {
        "model": named(draws.model.model, draws.folder),
        "served": draws.model.is_served,
        "engine": None if draws.model.engine == "transformers" else draws.model.engine,
        "engine_options": draws.model.engine_options or None,
        "system": draws.model.system,
        "in_context": examples and xxh3_64_hexdigest(examples.encode()),
        **draws.settings,
        **draws.model.sampling.model_dump(mode="json"),
    }
    refusal = f"The prompts of {name} in {path.parent} were drawn in another way"
    advice = f"Set it back; or, to draw again, delete {name}.* there, and what was made of these prompts."
    hold_settings(path.with_suffix(".json"), settings, "drawn prompts", refusal if exists else None, advice)


def named(model: str, folder: Path) -> str:
    """Return a model's name, or its path as from a recipe's folder, so that both may be moved."""
    return as_from(folder, model) if Path(model).is_absolute() else model
