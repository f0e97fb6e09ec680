"""What is selected of a domain's prompts: by RIP before anything is made of them, and of the SFT rows."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean

from mergekit_lite.distillation.pairing.assign import Assignment, Dropped, SftExample, assignments
from mergekit_lite.distillation.recipe.choosing import SftRows
from mergekit_lite.distillation.recipe.schema import Pairing
from mergekit_lite.distillation.rules import DIGITS, Answers, Refusal, admitted, extremes, rip

HIGHEST = {"score": "with the highest scores", "length": "longest", "difficulty": "most difficult"}


def selected(
    pairing: Pairing, prompts: Mapping[str, Answers], seed: int, answered: bool = True
) -> dict[str, Assignment]:
    """Return what each prompt of one domain is used for, as ``assignments``, after what the pairing selects.

    Of equal figures the earlier prompt is kept.
    """
    unfit = _unfit(pairing, prompts)
    fit = {prompt: answers for prompt, answers in prompts.items() if prompt not in unfit}
    assigned: dict[str, Assignment] = {**unfit, **assignments(pairing, fit, seed, answered)}
    if pairing.sft_rows.selects:
        assigned |= _sft_rows(pairing.sft_rows, prompts, assigned)
    return {prompt: assigned[prompt] for prompt in prompts}


def _unfit(pairing: Pairing, prompts: Mapping[str, Answers]) -> dict[str, Dropped]:
    """Return the prompts that RIP leaves out, by the best and the worst answer of all sources together."""
    if pairing.rip.of != "prompts" or pairing.rule == "as_is" or not pairing.rip.thresholds:
        return {}
    filters = [rip(**pairing.rip.thresholds)]
    found = {prompt: admitted([extremes(answers.sources)], filters) for prompt, answers in prompts.items()}
    return {prompt: Dropped("selection", why) for prompt, why in found.items() if isinstance(why, Refusal)}


def _sft_rows(
    rows: SftRows, prompts: Mapping[str, Answers], assigned: Mapping[str, Assignment]
) -> dict[str, SftExample | Dropped]:
    """Return what becomes of the examples among the assignments."""
    selection: dict[str, SftExample | Dropped] = {}
    figures: dict[str, float] = {}  # of those that are kept
    for prompt, example in assigned.items():
        if not isinstance(example, SftExample):
            continue
        figure = _figure(rows, example, prompts[prompt])
        if figure is None:
            selection[prompt] = _dropped(f"no answer of {rows.student} with a score")
        elif rows.least is not None and figure < rows.least:
            selection[prompt] = _dropped(f"{rows.by} below {rows.least:g}", f"{figure:.6g}")
        else:
            figures[prompt] = figure
            selection[prompt] = example._replace(why=f"{example.why}; {rows.by} {figure:.6g}", figure=figure)
    if rows.top is not None:
        places = {prompt: place for place, prompt in enumerate(prompts)}
        ranked = sorted(figures, key=lambda prompt: (-figures[prompt], places[prompt]))
        why = f"not among the {rows.top:,} {HIGHEST[rows.by]}"
        selection |= {prompt: _dropped(why, f"{figures[prompt]:.6g}") for prompt in ranked[rows.top :]}
    return selection


def _figure(rows: SftRows, example: SftExample, answers: Answers) -> float | None:
    """Return what an example is selected by; None for a difficulty without an answer of the student.

    The difficulty is TAPIR's (Yue et al. 2024, arXiv 2405.13448) as its abstract tells it: how much better than the
    student the teacher is. Of several answers of the student the mean score counts.
    """
    if rows.by == "length":
        return example.answer.length
    if rows.by == "score":
        return round(example.answer.score, DIGITS)
    scores = [answer.score for answer in answers.sources if answer.source == rows.student]
    return round(example.answer.score - fmean(scores), DIGITS) if scores else None


def _dropped(why: str, detail: str = "") -> Dropped:
    return Dropped("sft", Refusal(f"sft_rows: {why}", detail))
