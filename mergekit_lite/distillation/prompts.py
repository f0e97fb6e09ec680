"""The prompts of a distillation: read from the data or drawn by the sample stage, and the same from then on."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

from mergekit_lite.answers import prompts as data
from mergekit_lite.answers.rows import Prompt, read_rows, write_rows
from mergekit_lite.distillation import magpie, written
from mergekit_lite.distillation.data.given import add_prompts
from mergekit_lite.distillation.distinct import distinct_prompts
from mergekit_lite.distillation.drawing import Draws, drawn
from mergekit_lite.distillation.embeddings import with_embeddings, without_embeddings
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.nearest import nearest_prompts
from mergekit_lite.distillation.recipe.checks import unknown_domains
from mergekit_lite.distillation.recipe.choosing import ChosenPrompts
from mergekit_lite.distillation.recipe.schema import Recipe, RoundRecipe
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rounds import hold_parts, prompts_of
from mergekit_lite.distillation.systems import asked_under, with_column
from mergekit_lite.errors import UsageError, counted, listing, shortened

SHOWN = 5  # malformed rows in a warning


def read(recipe: Recipe, reporter: Reporter, *, plan: bool = False) -> list[Prompt]:
    """Return the distinct prompts that the recipe's data have now; what is left out is reported.

    ``plan`` says that no prompts are drawn or embedded, so that others may stand for those that a model draws, or that
    are near target prompts. A round has its part of those that the whole recipe has settled.

    Raises:
        UsageError: the data can't be read, are empty, or have no prompt of a domain that the recipe names.
        CheckpointError: a model that draws or embeds prompts can't be loaded.
        TemplateError: the chat template of a model that draws prompts has no place for a user's words.
        RunError: prompts can't be drawn or embedded.
    """
    if isinstance(recipe, RoundRecipe):
        hold_parts(recipe.whole)
        whole = read(recipe.whole, reporter, plan=True) if plan else settled(recipe.whole, reporter)
        return prompts_of(recipe, whole)
    loaded, domains = data.LoadedPrompts(), set[str]()
    for entry in recipe.prompts:
        if not entry.chooses:
            loaded.read(entry)
            continue
        if entry.drawing is not None:
            pool = drawn(_draws(recipe, entry, reporter), reporter, plan=plan)
        else:
            pool = with_embeddings([with_column(entry)], entry.embedding_columns)
        if entry.distinct is not None or entry.nearest is not None:
            domains |= {prompt.domain for prompt in pool.prompts}
        chosen = _chosen(entry, pool.prompts, Folder(recipe.folder).embeddings, reporter, plan)
        asked = list(asked_under(entry, chosen, recipe.seed, pool.problems, pool.places))
        loaded.problems += pool.problems
        loaded.repeated += pool.repeated
        for prompt, place in asked:
            loaded.add(prompt, place)
    if not recipe.prompts:
        add_prompts(recipe.sources, loaded)
    if loaded.problems:
        left_out = f"{counted(len(loaded.problems), 'row')} of the prompts left out"
        reporter.warn(listing(left_out, loaded.problems, SHOWN))
    if loaded.repeated:
        reporter.line(f"{counted(loaded.repeated, 'prompt')} asked before in the data, taken once")
    if not loaded.prompts:
        raise UsageError(listing("There is no prompt to ask", loaded.problems or ["the data have no rows"]))
    unknown_domains(recipe, [*(prompt.domain for prompt in loaded.prompts), *sorted(domains)])
    return loaded.prompts


def _draws(recipe: Recipe, entry: ChosenPrompts, reporter: Reporter) -> Draws:
    if entry.magpie is not None:
        return magpie.draws_of(entry.magpie, entry.domain, recipe.folder, recipe.seed, reporter)
    assert entry.written is not None
    return written.draws_of(entry.written, entry.domain, recipe.folder, recipe.seed, reporter)


def _chosen(entry: ChosenPrompts, pool: list[Prompt], folder: Path, reporter: Reporter, plan: bool) -> Iterator[Prompt]:
    """Yield those of a source's prompts that its keys choose, without their embeddings."""
    within: list[Prompt] = []
    if entry.distinct is not None:
        if entry.nearest is not None and entry.nearest.is_as(entry.distinct):
            within = pool  # embedded once
        pool = distinct_prompts(entry.distinct, pool, entry.called, folder, reporter, plan=plan)
    if entry.nearest is not None:
        pool = nearest_prompts(entry.nearest, pool, entry.called, folder, reporter, plan=plan, within=within)
    yield from (without_embeddings(prompt, entry) for prompt in pool)


def settled(recipe: Recipe, reporter: Reporter) -> list[Prompt]:
    """Return the prompts as ``read`` does, and hold them to those in the recipe's folder.

    The first call writes them there. Later ones may change them only while there are no answers, but for what no
    source sees: columns that functions get, and whether the data have a text.

    Raises:
        UsageError: as ``read``, or the data have other prompts than the folder's answers.
    """
    folder = Folder(recipe.folder)
    now = read(recipe, reporter)
    if not folder.prompts.exists():
        write_rows(folder.prompts, map(data.as_row, now))
    elif (then := stored(folder)) != now:
        before, after = _as_asked(then), _as_asked(now)
        if before != after and folder.has_answers:
            raise UsageError(_changed(folder, before, after))
        write_rows(folder.prompts, map(data.as_row, now))
    return now


def stored(folder: Folder) -> list[Prompt]:
    """Return the prompts that the sample stage wrote.

    Raises:
        UsageError: there is no such file, or it was damaged.
    """
    if not folder.prompts.exists():
        raise UsageError(f"{folder.prompts} isn't there: run the stage `sample` first.")
    problems: list[str] = []
    prompts = []
    for line in read_rows(folder.prompts, problems):
        try:
            prompts.append(data.from_row(line.row))
        except (KeyError, TypeError) as error:
            problems.append(f"{folder.prompts}:{line.number}: no prompt: {error!r}")
    if problems:
        raise UsageError(listing(f"{folder.prompts} was changed since it was written", problems))
    return prompts


def _as_asked(prompts: Sequence[Prompt]) -> list[Prompt]:
    return [replace(prompt, plain=False, columns={}) for prompt in prompts]


def _changed(folder: Folder, then: Sequence[Prompt], now: Sequence[Prompt]) -> str:
    before, after = {prompt.id: prompt for prompt in then}, {prompt.id: prompt for prompt in now}
    new = [name for name in after if name not in before]
    gone = [name for name in before if name not in after]
    other = [name for name, prompt in after.items() if name in before and before[name] != prompt]
    changes = [
        f"{what}: {counted(len(names), 'prompt')}, for instance {shortened(names[0], 60)!r}"
        for what, names in (("new", new), ("gone", gone), ("not the same", other))
        if names
    ]
    return listing(
        f"The prompts are no longer those that {folder.root} has answers to", changes or ["their order is another one"]
    ) + (
        f"\nPut the data back as they were ({folder.prompts} has them), or let the recipe name another `folder`, "
        "or delete this one to start over."
    )
