"""The opponent of candidates: models that answer each prompt together, once, before anything is measured.

An opponent is a recipe of ``mergekit-lite answer``. Its answers are in ``opponent/answers.jsonl`` of the study's
folder, the replies of all of its steps in ``opponent/answers.steps.jsonl``: nothing is asked twice.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from mergekit_lite.answers.aggregating.answering import (
    ToAnswer,
    absent_models,
    ask,
    cut_in,
    tasks_of,
    write_answers,
)
from mergekit_lite.answers.aggregating.recipe import load
from mergekit_lite.answers.aggregating.running import Reports
from mergekit_lite.answers.aggregating.steps import said_in
from mergekit_lite.answers.rows import Prompt
from mergekit_lite.answers.scoring.registry import kind_of
from mergekit_lite.answers.scoring.rivals import meets_rivals
from mergekit_lite.answers.scoring.scorer import ScorerSettings
from mergekit_lite.boosting.measure.scores import ScoreSpec
from mergekit_lite.boosting.search.study import OPPONENT, check_folder
from mergekit_lite.errors import RunError, UsageError, counted, listing

RESPONSE = "response"  # the column by which functions get its answer


def opponent_of(
    path: Path | None, scores: Sequence[ScoreSpec], prompts: Sequence[Prompt], folder: Path, ray: str | None
) -> ToAnswer | None:
    """Return what an opponent is asked; None for none.

    Args:
        path: its recipe.
        scores: of the candidates.
        prompts: of the search.
        folder: of the study.
        ray: the cluster on whose machines its models answer that would in this process.

    Raises:
        UsageError: it can't be asked, or no score compares with it; the message has every reason.
    """
    if path is None:
        return None
    recipe = load(path)
    problems = [f"--opponent {path}: {why}" for why in absent_models(recipe)]
    if recipe.samples > 1:
        problems.append(f"--opponent {path}: samples: {recipe.samples}, but an opponent answers each prompt once")
    if not any(score.scorer is not None and _compares(score.scorer) for score in scores):
        problems.append(
            "--opponent is for scores that compare with its answers: give --score pairwise:…, function:…, or "
            "pair_rm:…,against=reference"
        )
    if problems:
        raise UsageError("\n".join(problems))
    return ToAnswer(recipe, folder / OPPONENT / "answers.jsonl", tasks_of(recipe, prompts), ray=ray)


def _compares(scorer: ScorerSettings) -> bool:
    return kind_of(scorer.kind).opponent_as is not None and not meets_rivals(scorer)


def answers_of(opponent: ToAnswer, reports: Reports) -> dict[str, str]:
    """Return the opponent's answer to each prompt, by the prompt's id; only what isn't there is asked for.

    Raises:
        UsageError: the folder holds other files, or a search against other answers: nobody is asked.
        RunError: answers are missing. All replies are kept, and the same command goes on.
        CheckpointError: a model can't be loaded.
    """
    folder = opponent.output.parents[1]
    check_folder(folder)
    begun = (folder / "study.json").exists()
    if begun and any(each.done < each.calls for each in opponent.calls()):
        raise UsageError(
            f"{folder} holds a search against other answers: the opponent or the prompts are not those that they were. "
            "Give another -o, or remove it."
        )
    found = ask(opponent, reports)
    if found.missing:
        title = "Answers of the opponent are missing; all replies that came are kept"
        raise RunError(f"{listing(title, found.missing)}\nThe same command goes on and asks for what is missing.")
    if not begun:  # a search that is there has its own, and fewer prompts may be those of another one
        write_answers(opponent, found)
    asked = counted(found.asked.total(), "call")
    reports.line(f"opponent {opponent.recipe.name}: {counted(len(found.items), 'answer')}, by {asked} in this run")
    if cut := cut_in(found):
        reports.warn(f"opponent {opponent.recipe.name}: {counted(cut, 'answer')} cut at max_tokens")
    return {item.task.prompt.id: said_in(item.drafts[0].reply) for item in found.answered}


def facing(prompts: Sequence[Prompt], answers: Mapping[str, str]) -> tuple[Prompt, ...]:
    """Return the prompts with an opponent's answers, by the prompts' ids."""
    return tuple(
        replace(prompt, opponent=answers[prompt.id], columns={**prompt.columns, RESPONSE: answers[prompt.id]})
        for prompt in prompts
    )


def described(opponent: ToAnswer) -> str:
    """Say what the opponent is asked, and the most that this costs."""
    calls = "; ".join(
        f"{each.name} ({each.where}) {each.calls - each.done:,} of {counted(each.calls, 'call')} to come, "
        f"which read ≤ {each.reads:,} and write ≤ {each.writes:,} tokens"
        for each in opponent.calls()
    )
    return f"{opponent.recipe.name}, {counted(len(opponent.recipe.layers), 'layer')}: {calls}"
