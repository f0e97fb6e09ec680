"""Prompts that an aligned model draws from its chat template's beginning: Magpie (Xu et al. 2024, arXiv 2406.08464).

The draws are a ledger in ``magpie/``, each with a seed of its own, so that a kill loses what is in flight. Those that
are empty, cut at the limit of tokens, end with a colon, or were drawn before are counted and left out.
"""

from __future__ import annotations

from collections import Counter
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from mergekit_lite.answers.asking import Notes, Task, reasons, repeated
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.loading import tokenizer_of
from mergekit_lite.answers.local import SERVE
from mergekit_lite.answers.pre_query import stopped
from mergekit_lite.answers.prompts import LoadedPrompts, digest_of
from mergekit_lite.answers.respondents import respondent
from mergekit_lite.answers.rows import ANSWER, Key, Message, Prompt, seed_of
from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.choosing import Magpie
from mergekit_lite.distillation.remarks import ENOUGH, HINT, NEARLY_ALL
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.settings import as_from, hold_settings
from mergekit_lite.errors import CheckpointError, RunError, counted, one_line

EMPTY, CUT, COLON, REPEATED = "empty", "cut at `max_tokens`", "with a colon at the end", "drawn before"


def drawn_prompts(
    magpie: Magpie, domain: str, folder: Path, seed: int, reporter: Reporter, *, plan: bool
) -> LoadedPrompts:
    """Return the prompts that a model draws, in the order of their seeds. Those that are there aren't drawn again.

    Args:
        magpie: how they are drawn.
        domain: of the prompts.
        folder: the recipe's.
        seed: the recipe's.
        reporter: is told of the progress, and of how many prompts are kept.
        plan: draw nothing; where draws are missing, as many prompts as there can be stand for them.

    Raises:
        UsageError: there are draws that were made in another way.
        CheckpointError: the model or its tokenizer can't be loaded.
        TemplateError: the chat template doesn't show where a user's words stand.
        RunError: prompts are missing at the end, or none is left.
    """
    path = Folder(folder).drawn(magpie.name)
    tasks = _tasks(magpie, seed)
    ledger = Ledger(path, [task.key for task in tasks], lambda row: Key(row["prompt"], row["index"]), ANSWER)
    if plan and ledger.missing:
        model = f"{magpie.model}, {magpie.where}"
        reporter.line(
            f"{magpie.name}: {counted(len(ledger.missing), 'prompt')} of {magpie.number:,} will be drawn from {model}; "
            f"at most {magpie.number:,} are asked, and as many are counted with here"
        )
        loaded = LoadedPrompts()
        for task in tasks:
            loaded.add(_prompt(f"{magpie.name} {task.index}", domain), f"{path}:{task.index + 1}")
        return loaded
    if not plan:
        _hold(magpie, folder, seed)
    if ledger.missing:
        _draw(magpie, tasks, ledger, Folder(folder).drawn_log(magpie.name), reporter)
    if not plan:
        ledger.finish()
    return _kept(magpie, domain, ledger, reporter)


def _tasks(magpie: Magpie, seed: int) -> list[Task]:
    asked = Prompt(magpie.name, (Message(role="user", content=""),))  # nobody has said anything yet
    return [Task(asked, index, seed_of(seed, "magpie", magpie.name, index)) for index in range(magpie.number)]


def _prompt(text: str, domain: str) -> Prompt:
    messages = (Message(role="user", content=text),)
    return Prompt(digest_of(messages), messages, domain, plain=True)


def _draw(magpie: Magpie, tasks: list[Task], ledger: Ledger[Key], log: Path, reporter: Reporter) -> None:
    """Draw what is missing. Raises RunError where something is missing then."""
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
    # The system prompt is in what the model reads.
    sampling = stopped(magpie.sampling, before, magpie.early_stopping)
    asked = magpie.model_copy(update={"sampling": sampling, "system": None})
    wanted = frozenset(ledger.missing)
    with ExitStack() as stack:
        stack.callback(ledger.close)
        who = stack.enter_context(respondent(asked, magpie.model, log, before=before))
        notes = Notes({magpie.name: who}, reporter.warn)
        total = len(tasks)
        advance = stack.enter_context(reporter.progress(magpie.name, total, total - len(wanted)))
        for answer in who.answers(tasks, wanted):
            ledger.append([answer.as_row()])
            advance(1)
            notes.tell()
        notes.tell()
    if (said := repeated(who.failures)) is not None:
        reporter.line(f"{magpie.name}: {said}")
    if missing := len(ledger.missing):
        why = who.failures.stopped or reasons(who.failures.lost)
        raise RunError(
            f"{magpie.name}: {missing:,} of {counted(magpie.number, 'prompt')} can't be drawn; all others are kept. "
            f"{why}\nThe same command goes on and draws what is missing."
        )


def _kept(magpie: Magpie, domain: str, ledger: Ledger[Key], reporter: Reporter) -> LoadedPrompts:
    loaded, left_out, texts = LoadedPrompts(), Counter[str](), set[str]()
    for number, row in enumerate(ledger.rows(), 1):
        text = row["text"].strip()
        if (why := _unfit(row, text, texts)) is not None:
            left_out[why] += 1
            continue
        texts.add(text)
        loaded.add(_prompt(text, domain), f"{ledger.path}:{number}")
    reporter.line(_told(magpie, len(texts), left_out))
    if magpie.number >= ENOUGH and left_out[REPEATED] >= NEARLY_ALL * magpie.number:
        reporter.warn(f"{magpie.name}: nearly all draws are alike{f': {HINT}' if magpie.is_served else ''}")
    if not texts:
        raise RunError(f"{magpie.name}: no drawn prompt is left. Look at {ledger.path}.")
    return loaded


def _unfit(row: dict[str, Any], text: str, texts: set[str]) -> str | None:
    """Return why a prompt is left out; None where it isn't."""
    if not any(character.isprintable() and not character.isspace() for character in text):
        return EMPTY
    if row.get("finish") == "length":
        return CUT
    if text.endswith((":", "：")):  # the authors' filter: what should follow is missing
        return COLON
    return REPEATED if text in texts else None


def _told(magpie: Magpie, kept: int, left_out: Counter[str]) -> str:
    said = f"{magpie.name}: {kept:,} of {counted(magpie.number, 'drawn prompt')} kept"
    reasons = ", ".join(f"{left_out[why]:,} {why}" for why in (EMPTY, CUT, COLON, REPEATED) if left_out[why])
    return f"{said}; left out: {reasons}" if reasons else said


def _hold(magpie: Magpie, folder: Path, seed: int) -> None:
    """Save the settings of the draws. Raises UsageError where there are some that were drawn with others."""
    path = Folder(folder).drawn(magpie.name)
    exists = any(path.with_name(f"{magpie.name}{end}").exists() for end in (".jsonl", ".partial.jsonl"))
    settings = {
        "model": _named(magpie.model, folder),
        "tokenizer": magpie.tokenizer and _named(magpie.tokenizer, folder),
        "served": magpie.is_served,
        "system": magpie.system,
        "early_stopping": magpie.early_stopping,
        "seed": seed,
        **magpie.sampling.model_dump(mode="json"),
    }
    refusal = f"The prompts of {magpie.name} in {path.parent} were drawn in another way"
    advice = f"Set it back; or, to draw again, delete {magpie.name}.* there, and what was made of these prompts."
    hold_settings(path.with_suffix(".json"), settings, "drawn prompts", refusal if exists else None, advice)


def _named(model: str, folder: Path) -> str:
    return as_from(folder, model) if Path(model).is_absolute() else model
