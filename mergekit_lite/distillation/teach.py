"""The teach stage: what every teacher says of the SFT rows' responses, token by token.

    pairs/sft.jsonl ─▶ teach/NAME/ ─▶ train/fuse

Teachers say it one after the other: a model in this process, or a server that returns the log-probabilities of given
tokens. A row is found again by its conversation and response, wherever they lie, so rows that change are asked about
anew and others are not. ``teach/NAME/teacher.json`` holds what the distributions depend on: those of another model,
tokenizer, template, system prompt or number of likeliest tokens are never in one folder.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from xxhash import xxh3_128_hexdigest

from mergekit_lite.answers.loading import CAUSAL, config_of, free_memory, tokenizer_of
from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.schema import Recipe, RecipeTeacher
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.settings import as_from
from mergekit_lite.distillation.teaching.asked import Asked, Reader, TextRow, text_rows
from mergekit_lite.distillation.teaching.files import TaughtFile
from mergekit_lite.distillation.teaching.scoring import LocalScorer, Scorer
from mergekit_lite.distillation.teaching.served import ServedScorer
from mergekit_lite.distillation.training.workspace import WEIGHTS, identity
from mergekit_lite.errors import CheckpointError, RunError, UsageError, counted, listing

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SHOWN = 3  # reasons in a message


def teach(recipe: Recipe, reporter: Reporter, *, skip_missing: bool = False) -> None:
    """Ask every teacher about the SFT rows that it hasn't said anything of yet.

    Args:
        recipe: the recipe.
        reporter: takes progress and results.
        skip_missing: finish without the rows that a server fails to score.

    Raises:
        UsageError: there are no rows, or what a teacher has said was said with other settings.
        CheckpointError: a model can't be loaded, or a file of distributions is damaged.
        RunError: rows are missing at the end, or a teacher can say nothing of any row.
    """
    if not recipe.teachers:
        raise UsageError("The recipe has no 'teachers', so nobody teaches.")
    check(recipe)
    rows = Folder(recipe.folder).pairs("sft")
    if not rows.exists():
        raise UsageError(f"There are no rows to teach: run the stage `pair` first, which writes {rows}.")
    missing: list[str] = []
    table: list[tuple[str, ...]] = []
    for teacher in recipe.teachers:
        tokenizer = tokenizer_of(teacher.model)
        with _file(recipe, teacher, tokenizer) as file:
            for note in file.notes:
                reporter.warn(f"{teacher.name}: {note}")
            missing += _teach(teacher, tokenizer, rows, file, reporter)
            table.append(_told(teacher, file))
        if teacher.server is None:
            free_memory()  # for the next one's model
    reporter.table(("teacher", ">rows", ">tokens", ">likeliest", ">bytes a token", ">cross-entropy"), table)
    if missing and not skip_missing:
        raise RunError(
            listing("Rows are missing; all others are kept", missing) + "\nThe same command goes on and asks for what "
            "is missing. With --skip-missing the stage ends without it."
        )


def check(recipe: Recipe) -> None:
    """Raise UsageError with all that is missing of the teachers: folders, tokenizers, models that can be read."""
    problems = [f"{teacher.name}: {why}" for teacher in recipe.teachers for why in _problems(teacher)]
    if problems:
        raise UsageError(listing("Teachers can't teach", problems))


def _problems(teacher: RecipeTeacher) -> Iterator[str]:
    if Path(teacher.model).is_absolute() and not Path(teacher.model).is_dir():
        yield f"{teacher.model} is no folder"
        return
    try:
        tokenizer_of(teacher.model)
        if teacher.server is None:
            config_of(teacher.model, CAUSAL)
            if Path(teacher.model).is_absolute() and not any(_weights(Path(teacher.model))):
                yield f"{teacher.model} has no weights ({' or '.join(WEIGHTS)}): name its `server`, or put them there"
    except CheckpointError as error:
        yield str(error)


def scorer_of(teacher: RecipeTeacher, tokenizer: PreTrainedTokenizerBase) -> Scorer:
    """Return what scores for a teacher: the model here, or its server."""
    return LocalScorer(teacher) if teacher.server is None else ServedScorer(teacher, tokenizer)


def _teach(
    teacher: RecipeTeacher, tokenizer: PreTrainedTokenizerBase, rows: Path, file: TaughtFile, reporter: Reporter
) -> list[str]:
    """Ask one teacher for what it hasn't said. Returns a message where rows are missing at the end."""
    problems: list[str] = []
    given = {row.key: row for row in text_rows(rows, teacher, problems)}
    missing = [row for row in given.values() if row.key not in file]
    total, done = len(given), len(given) - len(missing)
    del given
    if problems:
        reporter.warn(listing(f"Rows of {rows} left out", problems))
    reader = Reader(ChatTemplate(tokenizer), teacher.system)
    scorer = scorer_of(teacher, tokenizer)
    added = lost = 0
    with reporter.progress(teacher.name, total, done) as advance:
        for start in range(0, len(missing), scorer.at_once):
            window = missing[start : start + scorer.at_once]
            asked = [each for row in window if (each := _read(reader, scorer, row)) is not None]
            advance(len(window) - len(asked))
            left = len(asked)
            for place, said in scorer.score([each.tokens for each in asked]):
                taught = asked[place].taught(said, file.settings["vocabulary"])
                if isinstance(taught, str):
                    reader.left[taught] += 1
                else:
                    file.append([taught])
                    added += 1
                left -= 1
                advance(1)
            lost += left
    for note in reader.template.notes:
        reporter.line(f"{teacher.name}: {note}")
    for note in scorer.notes:
        reporter.line(f"{teacher.name}: {note}")
    if reader.left:
        reporter.warn(f"{teacher.name}: {counted(reader.left.total(), 'row')} left out: {_reasons(reader.left)}")
    if lost:
        return [f"{teacher.name}: {lost:,} of {total:,}. {scorer.why_missing}"]
    if not done + added:
        why = _reasons(reader.left) if reader.left else "no row is of its domains"
        raise RunError(f"{teacher.name} has nothing to say of {counted(total, 'row')} of {rows}: {why}.")
    return []


def _read(reader: Reader, scorer: Scorer, row: TextRow) -> Asked | None:
    asked = reader.read(row)
    if asked is None:
        return None
    if (why := scorer.why_not(asked.tokens)) is not None:
        reader.left[why] += 1
        return None
    return asked


def _reasons(counts: Counter[str]) -> str:
    shown = ", ".join(f"{why} ({count:,}×)" for why, count in counts.most_common(SHOWN))
    return shown + (f", and {len(counts) - SHOWN:,} other reasons" if len(counts) > SHOWN else "")


def _told(teacher: RecipeTeacher, file: TaughtFile) -> tuple[str, ...]:
    tokens = file.tokens
    each = f"{file.nbytes / tokens:.1f}" if tokens else "–"
    return (
        teacher.name, f"{len(file):,}", f"{tokens:,}", f"{file.settings['top']:,}", each, f"{file.cross_entropy:.4f}",
    )  # fmt: skip


def _file(recipe: Recipe, teacher: RecipeTeacher, tokenizer: PreTrainedTokenizerBase) -> TaughtFile:
    vocabulary = 1 + max(tokenizer.get_vocab().values(), default=-1)  # some ids may be no token's
    with suppress(CheckpointError):  # for a server, a folder with a tokenizer is enough
        sized = getattr(config_of(teacher.model, CAUSAL).get_text_config(), "vocab_size", 0)
        vocabulary = max(vocabulary, sized)
    local = Path(teacher.model).is_absolute()
    served = None if teacher.server is None else teacher.served_model or teacher.model
    if served is not None and Path(served).is_absolute():
        served = as_from(recipe.folder, served)
    settings = {
        "teacher": as_from(recipe.folder, teacher.model) if local else teacher.model,
        "model": identity(teacher.model, (*WEIGHTS, "config.json")) if local and teacher.server is None else None,
        "served": served,
        "tokenizer": _tokenizer_digest(tokenizer),
        "vocabulary": vocabulary,
        "top": min(teacher.top, vocabulary),
        "system": teacher.system,
        "dtype": teacher.dtype,
    }
    return TaughtFile.with_settings(Folder(recipe.folder).taught(teacher.name), settings)


def _weights(model: Path) -> Iterator[Path]:
    return (path for pattern in WEIGHTS for path in model.glob(pattern))


def _tokenizer_digest(tokenizer: Any) -> str:
    """Return a digest of what a tokenizer makes of conversations: its vocabulary, rules and template."""
    core = getattr(tokenizer, "backend_tokenizer", None)
    rules = core.to_str() if core is not None else json.dumps(sorted(tokenizer.get_vocab().items()))
    return xxh3_128_hexdigest(json.dumps([rules, tokenizer.chat_template, tokenizer.eos_token]).encode())
