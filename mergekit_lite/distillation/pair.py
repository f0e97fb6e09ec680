"""The pair stage: from answers and scores to the rows that training reads."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from mergekit_lite.answers.rows import Key, Prompt, write_rows
from mergekit_lite.distillation import protocols
from mergekit_lite.distillation.assign import Fate, Lost, Sft, Waiting, fates
from mergekit_lite.distillation.candidates import Reading, all_scores, candidates, texts
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.prompts import stored
from mergekit_lite.distillation.recipe import TARGET, Pairs, Recipe, Source
from mergekit_lite.distillation.reporter import Tell
from mergekit_lite.distillation.rules import Answers, Candidate, Pair, win
from mergekit_lite.distillation.table import Table, table_of
from mergekit_lite.errors import UsageError, counted, listing

ByPrompt = Mapping[str, Sequence[Candidate]]


def pair(recipe: Recipe, tell: Tell, *, skip_missing: bool = False) -> Table:
    """Write ``pairs/``: SFT and preference rows, what was dropped and why, and the table of their counts.

    Where pairs are made of the target's own answers it is run twice: once the sources are scored it writes the SFT
    rows, and in ``pairs/target.jsonl`` the prompts that the target has to answer; the preference rows once those
    answers are scored. The rows depend on recipe and scores alone, and are in the order of the prompts.

    Args:
        recipe: the recipe.
        tell: who watches.
        skip_missing: do without answers and scores that files lack, and count them as losses.

    Raises:
        UsageError: answers or scores of the sources are missing, or the recipe's pairs are wrong.
    """
    folder, reading = Folder(recipe.folder), Reading()
    _check(protocols.problems(recipe))
    prompts = {prompt.id: prompt for prompt in stored(folder)}
    domains = {prompt.domain: recipe.pairs.of(prompt.domain) for prompt in prompts.values()}
    _check(protocols.problems(recipe, domains))
    found = [candidates(folder, source, prompts, domains, reading) for source in recipe.sources]
    if missing := _missing(reading, skip_missing):
        hint = "run the stages sample and score first: each goes on where it was"
        raise UsageError(listing("The pair stage needs what is not there yet", [*missing, hint]))
    answers = _answers(prompts, found, {})
    became = _fates(recipe, prompts, domains, answers, answered=False)
    waiting = [prompt for prompt, fate in became.items() if isinstance(fate, Waiting)]
    if waiting:
        asked = {one: prompts[one] for one in waiting}
        own = candidates(folder, _target(recipe), asked, domains, reading, own=True)
        missing = _missing(reading, skip_missing)
        if not missing:
            answers = _answers(prompts, found, own)
            became = _fates(recipe, prompts, domains, answers, answered=True)
    for problem in reading.problems:
        tell.warn(problem)
    _write(recipe, folder, prompts, answers, became, waiting)
    table = table_of(became, prompts, reading.counts)
    table.write(folder.root / "pairs" / "table.json")
    table.show(tell)
    if missing:
        tell.line(listing("The preference rows wait for the target's own answers and their scores", missing))
    return table


def _missing(reading: Reading, skip_missing: bool) -> list[str]:
    if skip_missing or not reading.absent:
        return reading.missing
    return [*reading.missing, *reading.absent, "with --skip-missing the stage does without such rows"]


def _check(problems: Iterable[tuple[protocols.TensorMerge, str]]) -> None:
    wrong = [f"{'.'.join(map(str, way))}: {text}" for way, text in problems]
    if wrong:
        raise UsageError(listing(f"{counted(len(wrong), 'problem')} in how the recipe makes pairs", wrong))


def _target(recipe: Recipe) -> Source:
    assert recipe.target_source is not None  # the recipe was checked
    return recipe.target_source.model_copy(update={"name": TARGET})


def _answers(prompts: Iterable[str], found: Sequence[ByPrompt], own: ByPrompt) -> dict[str, Answers]:
    """All that can be used, by prompt; the sources' in the order of the recipe."""
    return {
        prompt: Answers([one for source in found for one in source.get(prompt, ())], own.get(prompt, ()))
        for prompt in prompts
    }


def _fates(
    recipe: Recipe,
    prompts: Mapping[str, Prompt],
    domains: Mapping[str, Pairs],
    answers: Mapping[str, Answers],
    answered: bool,
) -> dict[str, Fate]:
    """What becomes of every prompt, in the order of the prompts."""
    became: dict[str, Fate] = {}
    for domain, protocol in domains.items():
        of_domain = {name: answers[name] for name, prompt in prompts.items() if prompt.domain == domain}
        became |= fates(protocol, of_domain, recipe.seed, answered)
    return {prompt: became[prompt] for prompt in prompts}


def _write(
    recipe: Recipe,
    folder: Folder,
    prompts: Mapping[str, Prompt],
    answers: Mapping[str, Answers],
    became: Mapping[str, Fate],
    waiting: Sequence[str],
) -> None:
    responses = _responses(recipe, folder, became)
    protocol = {domain: recipe.pairs.of(domain) for domain in {prompt.domain for prompt in prompts.values()}}
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "preference": [], "dropped": []}
    for prompt, fate in ((prompts[one], fate) for one, fate in became.items()):
        if isinstance(fate, Sft):
            rows["sft"].append(_sft_row(prompt, fate, protocol[prompt.domain], responses))
        elif isinstance(fate, Pair):
            rule = protocol[prompt.domain].rule
            rows["preference"].append(_preference_row(prompt, fate, rule, answers[prompt.id], responses))
        elif isinstance(fate, Lost):
            rows["dropped"].append(_dropped_row(prompt, fate))
    rows[TARGET] = [{"prompt": one, "domain": prompts[one].domain} for one in waiting]
    if any(isinstance(fate, Waiting) for fate in became.values()):
        del rows["preference"]  # it isn't known yet
    if not waiting:
        del rows[TARGET]
    for name in ("sft", "preference", "dropped", TARGET):
        if name in rows:
            write_rows(folder.pairs(name), rows[name])
        else:
            folder.pairs(name).unlink(missing_ok=True)  # of another recipe


Responses = Mapping[tuple[str, Key], dict[str, Any]]  # by source and key


def _responses(recipe: Recipe, folder: Folder, became: Mapping[str, Fate]) -> Responses:
    """What the files say of all answers that become part of a row."""
    wanted: dict[str, set[Key]] = {}
    for prompt, fate in became.items():
        for candidate in _taken(fate):
            wanted.setdefault(candidate.source, set()).add(Key(prompt, candidate.index))
    found: dict[tuple[str, Key], dict[str, Any]] = {}
    for source, keys in wanted.items():
        said = texts(folder, source, keys)
        scores = all_scores(folder, recipe.scorers, source, keys)
        found |= {(source, key): {"text": said[key], "scores": scores[key]} for key in keys}
    return found


def _taken(fate: Fate) -> Iterable[Candidate]:
    if isinstance(fate, Sft):
        return (fate.answer,)
    return (*fate.chosen, *fate.rejected) if isinstance(fate, Pair) else ()


def _sft_row(prompt: Prompt, fate: Sft, protocol: Pairs, responses: Responses) -> dict[str, Any]:
    answer = fate.answer
    found = responses[answer.source, Key(prompt.id, answer.index)]
    return {
        "prompt": prompt.id,
        "domain": prompt.domain,
        "messages": prompt.messages,
        "response": found["text"],
        "source": answer.source,
        "index": answer.index,
        "score": found["scores"].get(protocol.score),
        "scores": found["scores"],
        "rule": protocol.rule,
        "why": fate.why,
    }


def _preference_row(prompt: Prompt, fate: Pair, rule: str, answers: Answers, responses: Responses) -> dict[str, Any]:
    def written(answer: Candidate) -> dict[str, Any]:
        found = responses[answer.source, Key(prompt.id, answer.index)]
        return {
            "text": found["text"],
            "source": answer.source,
            "index": answer.index,
            "score": answer.score,
            "role": "target" if answer.own else "source",
            "win": round(win(answer, answers.target if answer.own else answers.sources), 6),
            "scores": found["scores"],
        }

    return {
        "prompt": prompt.id,
        "domain": prompt.domain,
        "messages": prompt.messages,
        "chosen": [written(answer) for answer in fate.chosen],
        "rejected": [written(answer) for answer in fate.rejected],
        "gap": fate.gap,
        "rule": rule,
        "why": fate.why,
    }


def _dropped_row(prompt: Prompt, fate: Lost) -> dict[str, Any]:
    row = {"prompt": prompt.id, "domain": prompt.domain, "stage": fate.stage, "why": fate.reason.why}
    return {**row, "detail": fate.reason.detail} if fate.reason.detail else row
