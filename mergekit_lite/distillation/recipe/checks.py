"""What no single key of a recipe shows: names that refer to nothing, and keys that contradict each other."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator

from mergekit_lite.answers.aggregating.recipe import wrong_aggregate
from mergekit_lite.answers.asked_model import wrong_model
from mergekit_lite.answers.problems import KeyPath, Problem, clashing_names, not_named, one_origin, wrong_sampling
from mergekit_lite.answers.scoring.registry import kind_of, wrong_settings
from mergekit_lite.distillation.recipe.continuing import continuing_problems
from mergekit_lite.distillation.recipe.fusing import fusing_problems
from mergekit_lite.distillation.recipe.rounds import rounds_problems
from mergekit_lite.distillation.recipe.schema import (
    TARGET,
    TARGET_RULES,
    UNSCORED,
    GivenRows,
    Pairing,
    Recipe,
    RecipeSource,
    Train,
)
from mergekit_lite.distillation.recipe.selecting import (
    pairing_scorers,
    selections,
    wrong_embedded,
    wrong_nearest,
    wrong_origins,
)
from mergekit_lite.distillation.recipe.unscored import wrong_systems, wrong_unscored
from mergekit_lite.distillation.rules import RULES
from mergekit_lite.errors import UsageError, listing, nearest

GIVEN = "given"  # the kind of scorer whose scores the data have
DRAWN = ("answers", "draw", "chosen", "rejected")  # parameters of rules that the stage gives, not the recipe
OF_AGGREGATE = {"name", "aggregate", "drafts", "samples", "samples_for", "domains", "thoughts"}  # keys of such a source


def contradictions(recipe: Recipe) -> Iterator[Problem]:
    """Yield every contradiction in the recipe."""
    if recipe.rows is not None:
        yield from _given_rows(recipe, recipe.rows)
    else:
        yield from _empty_sections(recipe)
        yield from clashing_names("sources", [source.name for source in recipe.sources])
        for number, source in enumerate(recipe.sources):
            yield from _source(("sources", number), source)
        yield from wrong_origins(recipe.prompts)
        for number, prompts in enumerate(recipe.prompts):
            yield from wrong_nearest(("prompts", number, "nearest"), prompts.nearest)
            for key in ("distinct", "nearest"):
                yield from wrong_embedded(("prompts", number, key), getattr(prompts, key))
            yield from wrong_systems(("prompts", number, "systems"), prompts.systems)
        yield from pairing_problems(recipe)
    if not recipe.train.stages:
        yield Problem(("train",), f"'train' has none of {', '.join(Train.model_fields)}: at least one is needed")
    yield from fusing_problems(recipe)
    yield from clashing_names("scorers", [scorer.name for scorer in recipe.scorers])
    for number, scorer in enumerate(recipe.scorers):
        yield from (Problem(("scorers", number, *wrong.at), wrong.text) for wrong in wrong_settings(scorer))
    yield from _given_scores(recipe)
    yield from _target_source(recipe)
    yield from continuing_problems(recipe)
    yield from rounds_problems(recipe)
    yield from _report(recipe)


def pairing_problems(recipe: Recipe, domains: Iterable[str] = ()) -> Iterator[Problem]:
    """Yield what is wrong with the recipe's ``pairs``.

    Args:
        recipe: the recipe.
        domains: of the prompts, where they are known; the domains that the recipe names are always checked.
    """
    yield from _pairing(recipe, recipe.pairs.of(""), ("pairs",))
    for domain in dict.fromkeys([*recipe.pairs.domains, *domains]):
        pairing = recipe.pairs.of(domain)
        at: KeyPath = ("pairs",)
        if domain in recipe.pairs.domains:
            at = ("pairs", "domains", domain)
            yield from _pairing(recipe, pairing, at)
        judged = {scorer.name: scorer.domains for scorer in recipe.scorers}
        for name in pairing.scorers:
            limited_to = judged.get(name)
            if limited_to is not None and domain not in limited_to:
                text = f"the scorer {name!r} doesn't judge the domain {domain!r}: add it to the scorer's domains"
                yield Problem(at, text)


def unknown_domains(recipe: Recipe, domains: Iterable[str]) -> None:
    """Raise UsageError with all domains that the recipe names and no prompt has; ``domains`` are the prompts'."""
    known = dict.fromkeys(domains)
    listed = ", ".join(repr(domain) for domain in known) or "none"
    problems = [
        f"{where}: no prompt is of the domain {name!r}.{nearest(name, known)}"
        for where, name in _named_domains(recipe)
        if name not in known
    ]
    if problems:
        raise UsageError(listing(f"The recipe names domains that no prompt has (there are: {listed})", problems))


def _empty_sections(recipe: Recipe) -> Iterator[Problem]:
    """Yield the sections that are missing. On-policy training alone needs prompts, and nobody's answers to them."""
    needed = ["prompts", "sources", "scorers", "pairs"] if recipe.train.reads_rows else ["prompts"]
    if "sources" in needed and not any(recipe.pairs.of(domain).reads_sources for domain in ("", *recipe.pairs.domains)):
        needed.remove("sources")  # all pairs are of the target's own answers
    scored = any(recipe.pairs.of(domain).scorers for domain in ("", *recipe.pairs.domains))
    for key in needed:
        if key == "scorers" and "pairs" in recipe.model_fields_set and not scored:
            continue  # rows are as the data have them
        given = key == "prompts" and any(source.answers for source in recipe.sources)
        if key not in recipe.model_fields_set and not given:
            yield Problem((), f"the recipe has no {key!r}")
        elif key in ("prompts", "sources") and not getattr(recipe, key) and not given:
            yield Problem((key,), f"{key!r} is an empty list: at least one is needed")


def _report(recipe: Recipe) -> Iterator[Problem]:
    yield from wrong_sampling(("report", "sampling"), recipe.report.sampling)
    for number, prompts in enumerate(recipe.report.prompts):
        yield from one_origin(("report", "prompts", number), prompts)
    rounds = recipe.rounds and [f"round-{number}" for number in range(1, recipe.rounds.number + 1)]
    models = ["untrained", *(rounds or Train.model_fields)]
    for name in recipe.report.servers:
        if name not in models:
            yield Problem(("report", "servers", name), not_named(name, models, "model"))
    kinds = {scorer.name: scorer.kind for scorer in recipe.scorers}
    for number, name in enumerate(recipe.report.scores or ()):
        if name not in kinds:
            hint = nearest(name, kinds) or f" There are: {', '.join(kinds)}."
            yield Problem(("report", "scores", number), f"no scorer is named {name!r}.{hint}")
        elif not kind_of(kinds[name]).judges:
            text = f"{name!r} has scores of the data or of prompts, and can't judge what the trained models answer"
            yield Problem(("report", "scores", number), text)


def _given_rows(recipe: Recipe, rows: GivenRows) -> Iterator[Problem]:
    """With rows that are given nothing is asked, scored or paired."""
    for key in ("prompts", "sources", "pairs"):  # the report has scorers, and asks as target_source says
        if key in recipe.model_fields_set:
            yield Problem((key,), f"{key!r} has no effect here: the 'rows' are given already")
    for stage, readers in (("sft", ("sft", "fuse")), ("preference", ("preference",))):
        origins, trained = getattr(rows, stage), [name for name in readers if name in recipe.train.stages]
        for number, data in enumerate(origins):
            yield from one_origin(("rows", stage, number), data)
        if trained and not origins:
            yield Problem(
                ("rows",), f"'train' has {trained[0]!r}, 'rows' has no {stage!r} for it: give both, or neither"
            )
        if origins and not trained:
            wanted = " or ".join(map(repr, readers))
            yield Problem(("train",), f"'rows' has {stage!r}, 'train' has no {wanted}: give both, or neither")


def _source(at: KeyPath, source: RecipeSource) -> Iterator[Problem]:
    if source.name == TARGET:
        yield Problem((*at, "name"), f"{TARGET!r} is the trained model's own name: choose another one")
    if source.answers:
        for key in sorted(source.model_fields_set - {"name", "answers", "domains", "thoughts"}):
            yield Problem((*at, key), f"{key!r} has no effect here: the answers are given")
        for number, given in enumerate(source.answers):
            yield from one_origin((*at, "answers", number), given)
        return
    if source.aggregate is not None:
        for key in sorted(source.model_fields_set - OF_AGGREGATE):
            yield Problem((*at, key), f"{key!r} has no effect here: say it of a model of the 'aggregate'")
        yield from wrong_aggregate((*at, "aggregate"), source.aggregate, drafts=int(source.drafts is not None))
    else:
        if source.drafts is not None:
            yield Problem((*at, "drafts"), "'drafts' has no effect here: it is for an 'aggregate'")
        if not source.model:
            yield Problem(at, f"{_of(at)} has no 'model', no 'aggregate' and no 'answers'")
        yield from wrong_model(at, source)
    if source.domains is not None:
        for domain in source.samples_for:
            if domain not in source.domains:
                hint = nearest(domain, source.domains)
                text = f"samples for {domain!r}, which is not among the source's 'domains'.{hint}"
                yield Problem((*at, "samples_for", domain), text)


def _of(at: KeyPath) -> str:
    """Return a path as text, counted from 1: ``sources[2]``."""
    return "".join(f"[{step + 1}]" if isinstance(step, int) else step for step in at)


def _given_scores(recipe: Recipe) -> Iterator[Problem]:
    """Yield the scorers of given scores that there are not, and those that nothing gives scores."""
    kinds = {scorer.name: scorer.kind for scorer in recipe.scorers}
    filled = set()
    for number, source in enumerate(recipe.sources):
        for place, given in enumerate(source.answers):
            filled.add(given.scorer)
            if given.scorer is not None and kinds.get(given.scorer) != GIVEN:
                text = f"no scorer of the kind {GIVEN!r} is named {given.scorer!r}.{nearest(given.scorer, kinds)}"
                yield Problem(("sources", number, "answers", place, "scorer"), text)
    for number, scorer in enumerate(recipe.scorers):
        if scorer.kind == GIVEN and scorer.name not in filled:
            text = f"no 'answers' of a source give scores to {scorer.name!r}: name it there as their 'scorer'"
            yield Problem(("scorers", number), text)


def _target_source(recipe: Recipe) -> Iterator[Problem]:
    own = recipe.target_source
    if own is None:
        return
    if own.name != TARGET:
        yield Problem(("target_source", "name"), f"this source is always called {TARGET!r}: leave the name out")
    if own.server is None and own.model != TARGET:
        text = "the model of 'target_source' is the one that SFT makes, or else 'target': leave it out"
        yield Problem(("target_source", "model"), text)
    for key in ("aggregate", "in_context"):
        if getattr(own, key) is not None:
            yield Problem(("target_source", key), f"{key!r} is for sources: the target answers as it was trained")
    if own.server is not None and own.model == TARGET:
        yield Problem(("target_source",), "a 'server' needs the 'model', as it is called there")
    yield from (problem for problem in _source(("target_source",), own) if problem.at[-1] != "name")


def _pairing(recipe: Recipe, pairing: Pairing, at: KeyPath) -> Iterator[Problem]:
    yield from pairing_scorers(pairing, [scorer.name for scorer in recipe.scorers], at)
    yield from selections(recipe, pairing, at)
    if pairing.score is None and pairing.rule not in UNSCORED:
        yield Problem(at, f"{pairing.rule} ranks answers: name the scorer as `score`")
    if pairing.rule != "as_is":
        yield from _rule_options(pairing, at)
    yield from wrong_unscored(recipe, pairing, at)
    if pairing.gap != (None, None) and pairing.gap_quantiles is not None:
        yield Problem((*at, "gap_quantiles"), "gap and gap_quantiles are two ways to say the same: give one")
    for key in ("gap", "gap_quantiles", "gap_own"):
        least, most = getattr(pairing, key) or (None, None)
        if least is not None and most is not None and least > most:
            yield Problem((*at, key), f"the least is {least:g}, more than the most, {most:g}")
    if pairing.needs_target:
        if recipe.target_source is None:
            text = f"{pairing.rule} needs the target's own answers: say in `target_source` how it gives them"
            yield Problem(at, text)
        if pairing.split == "availability":
            text = "the target answers after its SFT, so the split can't wait for its pairs: use share"
            yield Problem((*at, "split"), text)
    if pairing.gap_own is not None and not pairing.needs_target:
        yield Problem((*at, "gap_own"), "'gap_own' has no effect here: the target's own answers are in no pair")
    if pairing.answers != "sources" and pairing.rule in ("fusechat3", "asked", *TARGET_RULES):
        yield Problem((*at, "answers"), f"{pairing.rule} says itself whose answers it pairs: leave it out")


def _rule_options(pairing: Pairing, at: KeyPath) -> Iterator[Problem]:
    known = [name for name in inspect.signature(RULES[pairing.rule]).parameters if name not in DRAWN]
    for name in pairing.options:
        if name not in known:
            takes = f"it takes {', '.join(known)}" if known else "it takes none"
            text = f"{pairing.rule} has no option {name!r}, {takes}.{nearest(name, known)}"
            yield Problem((*at, "options", name), text)


def _named_domains(recipe: Recipe) -> Iterator[tuple[str, str]]:
    """Yield who names a domain, and the domain. Rows that are given are taught; scorers judge the report's prompts."""
    for teacher in recipe.teachers:
        for domain in teacher.domains or ():
            yield f"the teacher {teacher.name}", domain
    if recipe.rows is not None:
        return
    for source in (*recipe.sources, *((recipe.target_source,) if recipe.target_source else ())):
        for domain in dict.fromkeys((*(source.domains or ()), *source.samples_for)):
            yield f"the source {source.name}", domain
    for scorer in recipe.scorers:
        for domain in scorer.domains or ():
            yield f"the scorer {scorer.name}", domain
    for domain in recipe.pairs.domains:
        yield "pairs.domains", domain
