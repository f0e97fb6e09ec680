"""What is wrong with how a recipe selects prompts and SFT rows, and with the scorers that rank answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergekit_lite.answers.asked_model import wrong_model
from mergekit_lite.answers.problems import KeyPath, Problem, clashing_names, not_named, one_origin
from mergekit_lite.answers.scoring.rivals import meets_rivals
from mergekit_lite.distillation.recipe.choosing import ChosenPrompts, Combined, Embedded, Magpie, Nearest, Written
from mergekit_lite.distillation.recipe.schema import UNSCORED, Pairing, PairingRules, Recipe

COMPARING = ("correct", "options", "gap", "gap_quantiles", "gap_own", "chosen_score")  # keys that as_is doesn't read


GIVEN_FIELDS = frozenset({"prompt", "reference"})  # of a request that is made of given prompts


def wrong_origins(entries: Sequence[ChosenPrompts]) -> Iterator[Problem]:
    """Yield what is wrong with where the recipe's prompts come from."""
    for key in ("magpie", "written"):
        drawn = {number: each for number, entry in enumerate(entries) if (each := getattr(entry, key)) is not None}
        places = list(drawn)
        for problem in clashing_names("prompts", [each.name for each in drawn.values()]):
            number = places[int(problem.at[1])]
            named = "name" in drawn[number].model_fields_set
            yield Problem(("prompts", number, key, *(["name"] if named else [])), problem.text)
    for number, entry in enumerate(entries):
        at: KeyPath = ("prompts", number)
        if entry.drawing is None:
            yield from one_origin(at, entry)
            continue
        yield from _wrong_drawing(at, entry)
        if entry.magpie is not None:
            yield from _wrong_magpie((*at, "magpie"), entry.magpie)
        if entry.written is not None:
            yield from _wrong_written((*at, "written"), entry.written)


def _wrong_drawing(at: KeyPath, entry: ChosenPrompts) -> Iterator[Problem]:
    if entry.magpie is not None and entry.written is not None:
        yield Problem((*at, "written"), "prompts are drawn by exactly one of 'magpie' and 'written'")
    for key in sorted(entry.model_fields_set - {"magpie", "written", "domain", "distinct", "nearest", "systems"}):
        yield Problem((*at, key), f"{key!r} has no effect here: the prompts are drawn from a model")
    if entry.systems is not None and entry.systems.column is not None:
        yield Problem((*at, "systems", "column"), "prompts that are drawn have no columns: give `texts`")
    for key in ("distinct", "nearest"):
        if (keys := getattr(entry, key)) is not None and keys.column is not None:
            yield Problem((*at, key, "column"), "prompts that are drawn have no columns: give a `model`")


def _wrong_magpie(at: KeyPath, magpie: Magpie) -> Iterator[Problem]:
    if not magpie.model:
        yield Problem(at, "'magpie' has no 'model'")
    if magpie.engine != "transformers":
        text = f"prompts aren't drawn by {magpie.engine} in this process: leave it out, or serve the model"
        yield Problem((*at, "engine"), text)
    if magpie.in_context is not None:
        yield Problem((*at, "in_context"), "'in_context' has no effect here: the chat template is read")
    if magpie.is_served and magpie.sampling.chat_template_kwargs is not None:
        text = "it has no effect here: the chat template is read up to the user's words, without keys"
        yield Problem((*at, "sampling", "chat_template_kwargs"), text)
    if magpie.tokenizer is not None and not magpie.is_served:
        yield Problem((*at, "tokenizer"), "'tokenizer' has no effect here: the model's own is used")
    yield from wrong_model(at, magpie)


def _wrong_written(at: KeyPath, written: Written) -> Iterator[Problem]:
    if not written.model:
        yield Problem(at, "'written' has no 'model'")
    yield from wrong_model(at, written)
    for number, given in enumerate(written.of):
        yield from one_origin((*at, "of", number), given)
    for name in written.lists:
        if name in GIVEN_FIELDS:
            text = f"{{{name}}} is of the prompts that 'of' gives: name the list otherwise"
            yield Problem((*at, "lists", name), text)
        elif not name.isidentifier():
            yield Problem((*at, "lists", name), "a field's name is of letters, digits and '_', with no digit first")
    try:
        fields = written.fields
    except ValueError as error:
        yield Problem((*at, "request"), str(error))
        return
    known = [*written.lists, *(sorted(GIVEN_FIELDS) if written.of else ())]
    for name in sorted(fields - {*known}):
        has = f"there are {', '.join(known)}" if known else "'lists' and 'of' give some"
        yield Problem((*at, "request"), f"no field {name!r}: {has}; other braces are written twice")
    for name in written.lists:
        if name not in fields:
            yield Problem((*at, "lists", name), f"the request has no field {{{name}}}, so this list has no effect")
    if written.shots > 1 and not written.of:
        yield Problem((*at, "shots"), "'shots' has no effect here: it is of the prompts that 'of' gives")
    elif written.shots > 1 and "reference" in fields:
        yield Problem((*at, "request"), "{reference} is of one given prompt, and a request has several 'shots'")
    if written.of and not fields & GIVEN_FIELDS:
        yield Problem((*at, "of"), "the request has neither {prompt} nor {reference}, so these have no effect")


def wrong_nearest(at: KeyPath, nearest: Nearest | None) -> Iterator[Problem]:
    """Yield what is wrong with ``nearest`` of a source of prompts."""
    if nearest is None:
        return
    if not nearest.to:
        yield Problem((*at, "to"), "'to' is an empty list: name the target prompts")
    for number, targets in enumerate(nearest.to):
        yield from one_origin((*at, "to", number), targets)


def wrong_embedded(at: KeyPath, keys: Embedded | None) -> Iterator[Problem]:
    """Yield what is wrong with the embeddings by which ``distinct`` or ``nearest`` of a source of prompts chooses."""
    if keys is None:
        return
    if (keys.model is None) == (keys.column is None):
        yield Problem(at, "embeddings are given by exactly one of 'model' and 'column'")
    elif keys.column is not None:
        for key in ("max_length", "batch_size", "device", "dtype"):
            if key in keys.model_fields_set:
                yield Problem((*at, key), f"{key!r} has no effect here: it is for a 'model'")


def pairing_scorers(pairing: Pairing, scorers: Sequence[str], at: KeyPath) -> Iterator[Problem]:
    """Yield what is wrong with the scorers that a pairing names; ``scorers`` are the recipe's."""
    named: list[tuple[KeyPath, str]] = [(("veto", name), name) for name in pairing.veto]
    if isinstance(pairing.score, Combined):
        yield from _combined(pairing.score, (*at, "score"))
        for how in ("mean", "minimum"):
            named += [(("score", how, place), name) for place, name in enumerate(getattr(pairing.score, how))]
    elif pairing.score is not None:
        named.append((("score",), pairing.score))
    if pairing.correct is not None:
        named.append((("correct",), pairing.correct))
    for where, name in named:
        if name not in scorers:
            yield Problem((*at, *where), not_named(name, scorers, "scorer"))


def _combined(score: Combined, at: KeyPath) -> Iterator[Problem]:
    if bool(score.mean) == bool(score.minimum):
        yield Problem(at, "several scorers rank by exactly one of 'mean' and 'minimum'")
    elif len(score.names) < 2:
        yield Problem(at, f"one scorer alone is named without {'mean' if score.mean else 'minimum'}: `score: NAME`")
    for name in dict.fromkeys(name for name in score.names if score.names.count(name) > 1):
        yield Problem(at, f"{name!r} is listed twice")


def selections(recipe: Recipe, pairing: Pairing, at: KeyPath) -> Iterator[Problem]:
    """Yield what is wrong with how a pairing selects answers and rows, and what it says without an effect anywhere."""
    base = at == ("pairs",)
    own: PairingRules = recipe.pairs if base else recipe.pairs.domains[str(at[-1])]
    heirs = [recipe.pairs.of(domain) for domain in ("", *recipe.pairs.domains)] if base else [pairing]
    for key in COMPARING:
        if key in own.model_fields_set and all(heir.rule == "as_is" for heir in heirs):
            yield Problem((*at, key), f"{key!r} has no effect here: as_is takes each prompt's first answer")
    if own.rip.model_fields_set and not own.rip.thresholds:
        yield Problem((*at, "rip"), "it selects nothing: give `rejected_score`, `rejected_length` or `gap`")
    if "rip" in own.model_fields_set and own.rip.thresholds and all(idle := [_idle_rip(heir) for heir in heirs]):
        yield Problem((*at, "rip"), f"'rip' has no effect here: {idle[0]}")
    if "sft_rows" in own.model_fields_set:
        if own.sft_rows.selects and not any(map(_has_sft, heirs)):
            yield Problem((*at, "sft_rows"), "'sft_rows' has no effect here: with sft_share 0 there are none")
        yield from _sft_rows(recipe, pairing, (*at, "sft_rows"))
    if base or own.model_fields_set & {"rule", "score", "sft_rows"}:
        yield from _ranked_by_prompts(recipe, pairing, (*at, "score") if "score" in own.model_fields_set else at)
    if pairing.needs_target and pairing.answers == "all" and recipe.train.before_preference is not None:
        for name in (each.name for each in recipe.scorers if each.name in pairing.ranking and meets_rivals(each)):
            text = (
                f"{name!r} scores an answer among its rivals, sources' among sources' and the target's among its own: "
                "such scores don't rank together. Take `answers: target`, or leave out the training before"
            )
            yield Problem((*at, "answers") if "answers" in own.model_fields_set else at, text)


def _ranked_by_prompts(recipe: Recipe, pairing: Pairing, at: KeyPath) -> Iterator[Problem]:
    """Yield that a pairing compares the answers to a prompt by what is the same for all of them."""
    kinds = {each.name: each.kind for each in recipe.scorers}
    if pairing.ranking and all(kinds.get(name) == "prompt_judge" for name in pairing.ranking):
        text = f"{pairing.ranking[0]!r} grades prompts: all answers to one have the same score"
        if pairing.rule not in UNSCORED:
            yield Problem(at, f"{text}, so none is better. Rank by another scorer, with this one as a `veto`")
        elif pairing.sft_rows.selects and pairing.sft_rows.by == "difficulty":
            yield Problem(at, f"{text}, so none is better than the student's")


def _idle_rip(pairing: Pairing) -> str:
    """Return why RIP selects nothing, or an empty text."""
    if pairing.rule == "as_is":
        return "as_is compares no answers"
    if pairing.rip.of == "pairs" and pairing.split == "share" and pairing.sft_share == 1:
        return "with sft_share 1 there are no pairs. Select prompts by `of: prompts`"
    return ""


def _has_sft(pairing: Pairing) -> bool:
    return pairing.rule == "as_is" or pairing.split == "availability" or pairing.sft_share > 0


def _sft_rows(recipe: Recipe, pairing: Pairing, at: KeyPath) -> Iterator[Problem]:
    rows, sources = pairing.sft_rows, [source.name for source in recipe.sources]
    if rows.model_fields_set and not rows.selects:
        yield Problem(at, "it selects nothing: give `least`, `top`, or `rising: true`")
    if rows.needs_score and pairing.score is None and pairing.rule in UNSCORED:
        yield Problem(at, f"rows are selected by {rows.by}: name the scorer as `score` of the pairs")
    if (rows.by == "difficulty") != (rows.student is not None):
        text = "`by: difficulty` and `student: SOURCE` need each other: the source whose answers are compared"
        yield Problem(at, text)
    if rows.student is not None and rows.student not in sources:
        yield Problem((*at, "student"), not_named(rows.student, sources, "source"))
    elif rows.student is not None and len(sources) < 2:
        yield Problem((*at, "student"), "the student is the only source: nobody is left to teach it")
    base = recipe.pairs.sft_rows
    if (base.rising or rows.rising) and (base.rising, base.by) != (rows.rising, rows.by):
        text = "`rising` orders the rows of all domains together: say it in `pairs.sft_rows`, with one `by` for all"
        yield Problem(at, text)
    readers = [each for name, each in recipe.train.stages.items() if name in ("sft", "fuse")]
    if rows.rising and readers and not any(reader.in_order for reader in readers):
        text = "no training reads rows in their order: give `train.sft` or `train.fuse` `in_order: true`"
        yield Problem((*at, "rising"), text)
