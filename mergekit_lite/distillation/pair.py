"""The pair stage: from answers and scores to the rows that training reads."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from mergekit_lite.answers.problems import Problem
from mergekit_lite.answers.rows import Key, Prompt, write_rows
from mergekit_lite.distillation.data.importing import import_rows
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pairing.assign import Assignment, Dropped, SftExample, Waiting
from mergekit_lite.distillation.pairing.candidates import Inventory, all_scores, candidates, texts, unlike_scales
from mergekit_lite.distillation.pairing.replay import replayed
from mergekit_lite.distillation.pairing.selection import selected
from mergekit_lite.distillation.pairing.table import Counts, PairingTable, table_of
from mergekit_lite.distillation.prompts import stored
from mergekit_lite.distillation.recipe.checks import pairing_problems, unknown_domains
from mergekit_lite.distillation.recipe.schema import TARGET, Pairing, Recipe, RoundRecipe
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rules import Answers, Candidate, PreferencePair, win
from mergekit_lite.errors import RunError, UsageError, counted, listing

ByPrompt = Mapping[str, Sequence[Candidate]]
Responses = Mapping[tuple[str, Key], dict[str, Any]]  # text, scores, and whether it was cut; by source and key


def pair(recipe: Recipe, reporter: Reporter, *, skip_missing: bool = False) -> PairingTable:
    """Write ``pairs/``: SFT and preference rows, dropped prompts with reasons, and the table of counts.

    Where pairs need the target's own answers the stage runs twice. Once the sources are scored it writes the SFT rows,
    and to ``pairs/target.jsonl`` the prompts that the target has to answer. Once those answers are scored it writes
    the preference rows. The rows depend on recipe and scores alone and are in the order of the prompts.

    Args:
        recipe: the recipe.
        reporter: takes warnings and the table.
        skip_missing: ignore answers and scores that the files don't have, and count them as losses.

    Raises:
        UsageError: answers or scores of the sources are missing, or the recipe's pairs or the given rows are wrong.
        RunError: no prompt became a row.
    """
    folder, inventory = Folder(recipe.folder), Inventory()
    if recipe.rows is not None:
        table = PairingTable({}, roles=import_rows(folder, recipe.rows, reporter, _reads_own(recipe)))
        unknown_domains(recipe, (prompt.domain for prompt in stored(folder)))
        table.write(folder.root / "pairs" / "table.json")
        table.show(reporter)
        return table
    if not recipe.train.reads_rows:
        reporter.line("no training reads rows: on-policy training has prompts alone")
        return PairingTable({})
    _check(pairing_problems(recipe))
    prompts = {prompt.id: prompt for prompt in stored(folder)}
    pairings = {prompt.domain: recipe.pairs.of(prompt.domain) for prompt in prompts.values()}
    _check(pairing_problems(recipe, pairings))
    by_source = [candidates(folder, source, prompts, pairings, inventory) for source in recipe.sources]
    if missing := _missing(inventory, skip_missing):
        hint = "run the stages sample and score first: each goes on where it was"
        raise UsageError(listing("The pair stage needs what is not there yet", [*missing, hint]))
    answers = _answers(prompts, by_source, {})
    assigned = _assigned(recipe, prompts, pairings, answers, answered=False)
    waiting = [prompt for prompt, assignment in assigned.items() if isinstance(assignment, Waiting)]
    if waiting:
        asked = {prompt: prompts[prompt] for prompt in waiting}
        assert recipe.target_source is not None  # the recipe was checked
        own = candidates(folder, recipe.target_source, asked, pairings, inventory, own=True)
        missing = _missing(inventory, skip_missing)
        if not missing:
            answers = _answers(prompts, by_source, own)
            assigned = _assigned(recipe, prompts, pairings, answers, answered=True)
    for problem in [*inventory.problems, *unlike_scales(inventory)]:
        reporter.warn(problem)
    rows = _write(recipe, prompts, pairings, answers, assigned)
    _write_waiting(folder, [prompts[prompt] for prompt in waiting])
    table = table_of(assigned, prompts, inventory, rows)
    table.write(folder.root / "pairs" / "table.json")
    table.show(reporter)
    for name, lines in rows.items():
        for number, again in Counter(row["round"] for row in lines if "round" in row).items():
            reporter.line(f"{name}: {counted(again, 'row')} of round {number} again")
    if missing:
        reporter.line(listing("The preference rows wait for the target's own answers and their scores", missing))
    _hold_rows(table.overall)
    return table


def _hold_rows(counts: Counts) -> None:
    """Refuse to go on without a row for any training.

    Raises:
        RunError: with what became of the prompts and their answers.
    """
    if counts.total:
        return
    reasons = [f"{what}: {number:,}×" for what, number in sorted(counts.dropped.items(), key=lambda each: -each[1])]
    given = counts.answers.get("answers", 0)
    unusable = [f"{what}: {number:,} of {given:,}" for what, number in counts.answers.items() if what != "answers"]
    raise RunError(
        listing(f"None of {counted(counts.prompts, 'prompt')} became a row, so there is nothing to train on", [
            *reasons, *unusable,
        ])
    )  # fmt: skip


def _missing(inventory: Inventory, skip_missing: bool) -> list[str]:
    if skip_missing or not inventory.absent:
        return inventory.missing
    return [*inventory.missing, *inventory.absent, "with --skip-missing the stage does without such rows"]


def _check(problems: Iterable[Problem]) -> None:
    listed = [f"{'.'.join(map(str, problem.at))}: {problem.text}" for problem in problems]
    if listed:
        raise UsageError(listing(f"{counted(len(listed), 'problem')} in how the recipe makes pairs", listed))


def _answers(prompts: Mapping[str, Prompt], by_source: Sequence[ByPrompt], own: ByPrompt) -> dict[str, Answers]:
    answers = {
        prompt: Answers([answer for each in by_source for answer in each.get(prompt, ())], own.get(prompt, ()))
        for prompt in prompts
    }
    asking: dict[str, list[str]] = {}  # prompts, by their question
    for prompt in prompts.values():
        if prompt.question:
            asking.setdefault(prompt.question, []).append(prompt.id)
    return {
        prompt: found._replace(
            others=[
                replace(answer, prompt=other)
                for other in asking.get(prompts[prompt].question, ())
                if other != prompt
                for answer in (*answers[other].sources, *answers[other].target)
            ]
        )
        for prompt, found in answers.items()
    }


def _assigned(
    recipe: Recipe,
    prompts: Mapping[str, Prompt],
    pairings: Mapping[str, Pairing],
    answers: Mapping[str, Answers],
    answered: bool,
) -> dict[str, Assignment]:
    assigned: dict[str, Assignment] = {}
    for domain, pairing in pairings.items():
        of_domain = {name: answers[name] for name, prompt in prompts.items() if prompt.domain == domain}
        assigned |= selected(pairing, of_domain, recipe.seed, answered)
    return {prompt: assigned[prompt] for prompt in prompts}  # in the order of the prompts


def _write(
    recipe: Recipe,
    prompts: Mapping[str, Prompt],
    pairings: Mapping[str, Pairing],
    answers: Mapping[str, Answers],
    assigned: Mapping[str, Assignment],
) -> dict[str, list[dict[str, Any]]]:
    """Write the rows and return them, by the names of their files.

    While prompts wait for the target there are no preference rows, not even an older file.
    """
    folder = Folder(recipe.folder)
    own = _own_answers(recipe, answers, assigned)
    responses = _responses(recipe, folder, assigned, own)
    rows: dict[str, list[dict[str, Any]]] = {"sft": [], "preference": [], "dropped": []}
    for prompt, assignment in ((prompts[name], assignment) for name, assignment in assigned.items()):
        pairing = pairings[prompt.domain]
        if isinstance(assignment, SftExample):
            rows["sft"].append(_sft_row(prompt, assignment, pairing, responses))
        elif isinstance(assignment, PreferencePair):
            row = _preference_row(prompt, assignment, pairing.rule, answers[prompt.id], responses)
            if prompt.id in own:
                row["own"] = _own_row(prompt, own[prompt.id], responses)
            rows["preference"].append(row)
        elif isinstance(assignment, Dropped):
            rows["dropped"].append(_dropped_row(prompt, assignment))
    if any(isinstance(assignment, Waiting) for assignment in assigned.values()):
        del rows["preference"]
        folder.pairs("preference").unlink(missing_ok=True)
    rows["sft"] = _in_order(recipe, rows["sft"], assigned)
    if isinstance(recipe, RoundRecipe):
        for name in ("sft", "preference"):
            if name in rows:
                rows[name] += replayed(recipe, name)
    for name, lines in rows.items():
        write_rows(folder.pairs(name), lines)
    return rows


def _in_order(recipe: Recipe, rows: list[dict[str, Any]], assigned: Mapping[str, Assignment]) -> list[dict[str, Any]]:
    """Return the SFT rows in the order of the prompts, or of rising figures where ``sft_rows`` says so."""
    if not recipe.pairs.sft_rows.rising:
        return rows

    def figure(row: Mapping[str, Any]) -> float:
        example = assigned[row["prompt"]]
        assert isinstance(example, SftExample) and example.figure is not None  # the recipe was checked
        return example.figure

    return sorted(rows, key=figure)


def _write_waiting(folder: Folder, waiting: Sequence[Prompt]) -> None:
    path = folder.pairs(TARGET)
    if waiting:
        write_rows(path, ({"prompt": prompt.id, "domain": prompt.domain} for prompt in waiting))
    else:
        path.unlink(missing_ok=True)  # left by another recipe


def _reads_own(recipe: Recipe) -> bool:
    """Whether the recipe's objective reads the target's own answer to each prompt."""
    if recipe.train.preference is None:
        return False
    from mergekit_lite.distillation.objectives.preference import OBJECTIVES  # loads torch

    objective = OBJECTIVES.get(recipe.train.preference.objective)
    return objective is not None and objective.own


def _own_answers(
    recipe: Recipe, answers: Mapping[str, Answers], assigned: Mapping[str, Assignment]
) -> dict[str, Candidate]:
    """Return the target's first whole answer to each prompt with a pair, where the objective reads it."""
    if not _reads_own(recipe):
        return {}
    paired = [prompt for prompt, assignment in assigned.items() if isinstance(assignment, PreferencePair)]
    first = {prompt: next((each for each in answers[prompt].target if each.whole), None) for prompt in paired}
    return {prompt: answer for prompt, answer in first.items() if answer is not None}


def _responses(
    recipe: Recipe, folder: Folder, assigned: Mapping[str, Assignment], beside: Mapping[str, Candidate]
) -> Responses:
    wanted: dict[str, set[Key]] = {}
    for prompt, assignment in assigned.items():
        for answer in (*_used(assignment), *([beside[prompt]] if prompt in beside else [])):
            wanted.setdefault(answer.source, set()).add(_key(prompt, answer))
    responses: dict[tuple[str, Key], dict[str, Any]] = {}
    own = [recipe.target_source] if recipe.target_source is not None else []
    sources = {source.name: source for source in (*recipe.sources, *own)}
    for source, keys in wanted.items():
        text = texts(folder, sources[source], keys)
        scores = all_scores(folder, recipe.scorers, source, keys)
        responses |= {(source, key): {**text[key]._asdict(), "scores": scores[key]} for key in keys}
    return responses


def _key(prompt: str, answer: Candidate) -> Key:
    return Key(answer.prompt or prompt, answer.index)


def _used(assignment: Assignment) -> Iterable[Candidate]:
    if isinstance(assignment, SftExample):
        return (assignment.answer,)
    return (*assignment.chosen, *assignment.rejected) if isinstance(assignment, PreferencePair) else ()


def _cut(response: Mapping[str, Any]) -> dict[str, bool]:
    return {"cut": True} if response["cut"] else {}


def _question(prompt: Prompt) -> dict[str, Any]:
    return {"prompt": prompt.id, "domain": prompt.domain, "messages": prompt.messages}


def _sft_row(prompt: Prompt, example: SftExample, pairing: Pairing, responses: Responses) -> dict[str, Any]:
    answer = example.answer
    response = responses[answer.source, Key(prompt.id, answer.index)]
    return {
        **_question(prompt),
        "response": response["text"],
        **_cut(response),
        "source": answer.source,
        "index": answer.index,
        "score": pairing.score_of(response["scores"]),
        "scores": response["scores"],
        "rule": pairing.rule,
        "why": example.why,
    }


def _preference_row(
    prompt: Prompt, pair: PreferencePair, rule: str, answers: Answers, responses: Responses
) -> dict[str, Any]:
    def written(answer: Candidate) -> dict[str, Any]:
        response = responses[answer.source, _key(prompt.id, answer)]
        return {
            "text": response["text"],
            **_cut(response),
            "source": answer.source,
            "index": answer.index,
            **({"prompt": answer.prompt} if answer.prompt else {}),
            "score": answer.score,
            "role": "target" if answer.own else "source",
            "win": round(win(answer, answers.target if answer.own else answers.sources), 6),
            "scores": response["scores"],
        }

    return {
        **_question(prompt),
        "chosen": [written(answer) for answer in pair.chosen],
        "rejected": [written(answer) for answer in pair.rejected],
        "gap": pair.gap,
        "rule": rule,
        "why": pair.why,
    }


def _own_row(prompt: Prompt, answer: Candidate, responses: Responses) -> dict[str, Any]:
    response = responses[answer.source, Key(prompt.id, answer.index)]
    return {"text": response["text"], **_cut(response), "index": answer.index}


def _dropped_row(prompt: Prompt, dropped: Dropped) -> dict[str, Any]:
    row = {"prompt": prompt.id, "domain": prompt.domain, "stage": dropped.stage, "why": dropped.reason.why}
    return {**row, "detail": dropped.reason.detail} if dropped.reason.detail else row
