"""What is wrong with how a recipe selects prompts and SFT rows, and with the scorers that rank answers."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from mergekit_lite.answers.asked_model import wrong_model
from mergekit_lite.answers.problems import KeyPath, Problem, clashing_names, not_named, one_origin
from mergekit_lite.answers.scoring.rivals import meets_rivals
from mergekit_lite.distillation.recipe.choosing import ChosenPrompts, Combined, Magpie, Nearest
from mergekit_lite.distillation.recipe.schema import UNSCORED, Pairing, PairingRules, Recipe

COMPARING = ("correct", "options", "gap", "gap_quantiles", "gap_own", "chosen_score")  # keys that as_is doesn't read


def wrong_origins(entries: Sequence[ChosenPrompts]) -> Iterator[Problem]:
    """Yield what is wrong with where the recipe's prompts come from."""
    drawn = {number: entry.magpie for number, entry in enumerate(entries) if entry.magpie is not None}
    for number, entry in enumerate(entries):
        if number in drawn:
            yield from _wrong_magpie(("prompts", number), entry, drawn[number])
        else:
            yield from one_origin(("prompts", number), entry)
    places = list(drawn)
    for problem in clashing_names("prompts", [magpie.name for magpie in drawn.values()]):
        number = places[int(problem.at[1])]
        named = "name" in drawn[number].model_fields_set
        yield Problem(("prompts", number, "magpie", *(["name"] if named else [])), problem.text)


def _wrong_magpie(at: KeyPath, entry: ChosenPrompts, magpie: Magpie) -> Iterator[Problem]:
    for key in sorted(entry.model_fields_set - {"magpie", "domain", "systems"}):
        yield Problem((*at, key), f"{key!r} has no effect here: the prompts are drawn from a model")
    if entry.systems is not None and entry.systems.column is not None:
        yield Problem((*at, "systems", "column"), "prompts that are drawn have no columns: give `texts`")
    at = (*at, "magpie")
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


def wrong_nearest(at: KeyPath, nearest: Nearest | None) -> Iterator[Problem]:
    """Yield what is wrong with ``nearest`` of a source of prompts."""
    if nearest is None:
        return
    if not nearest.to:
        yield Problem((*at, "to"), "'to' is an empty list: name the target prompts")
    for number, targets in enumerate(nearest.to):
        yield from one_origin((*at, "to", number), targets)
    if (nearest.model is None) == (nearest.column is None):
        yield Problem(at, "embeddings are given by exactly one of 'model' and 'column'")
    elif nearest.column is not None:
        for key in ("max_length", "batch_size", "device", "dtype"):
            if key in nearest.model_fields_set:
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
    if pairing.needs_target and pairing.answers == "all" and recipe.train.before_preference is not None:
        for name in (each.name for each in recipe.scorers if each.name in pairing.ranking and meets_rivals(each)):
            text = (
                f"{name!r} scores an answer among its rivals, sources' among sources' and the target's among its own: "
                "such scores don't rank together. Take `answers: target`, or leave out the training before"
            )
            yield Problem((*at, "answers") if "answers" in own.model_fields_set else at, text)


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
