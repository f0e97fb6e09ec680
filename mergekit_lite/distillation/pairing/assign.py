"""What each prompt of a domain is used for: an SFT row, a preference row, or nothing and why."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping, Sequence
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np

from mergekit_lite.answers.rows import seed_of
from mergekit_lite.distillation.recipe.schema import Pairing
from mergekit_lite.distillation.rules import (
    RULES,
    Answers,
    Candidate,
    Filter,
    Offers,
    PreferencePair,
    Refusal,
    admitted,
    best,
    by_chosen,
    chosen_from,
    gap_between,
    rip,
)


class SftExample(NamedTuple):
    """An answer to imitate."""

    answer: Candidate
    why: str
    figure: float | None = None  # that ``sft_rows`` selects it by


class Dropped(NamedTuple):
    """A prompt that becomes no row."""

    stage: str  # the training that loses it: sft or preference; selection, where both do
    reason: Refusal


class Waiting(NamedTuple):
    """A prompt for preference training that the target still has to answer."""


Assignment = SftExample | PreferencePair | Dropped | Waiting


def assignments(
    pairing: Pairing, prompts: Mapping[str, Answers], seed: int, answered: bool = True
) -> dict[str, Assignment]:
    """Return what each prompt of one domain is used for.

    ``prompts`` has the usable answers by id; the seed is that of the split and of random rules. ``answered`` says
    whether the target's own answers are known, where the pairing needs them.
    """
    if pairing.rule == "as_is":
        return {prompt: _as_is(teaching(pairing, answers)) for prompt, answers in prompts.items()}
    if pairing.split == "availability":
        pairs = _pairs(pairing, prompts, seed)
        return {prompt: _available(pairs[prompt], teaching(pairing, answers)) for prompt, answers in prompts.items()}
    return _split(pairing, prompts, seed, answered)


def teaching(pairing: Pairing, answers: Answers) -> list[Candidate]:
    """Return the answers to imitate: those of the sources, or of the one that is asked for good answers.

    The student whose answers tell the difficulty is never imitated.
    """
    taught = [answer for answer in answers.sources if answer.source != pairing.sft_rows.student]
    return [answer for answer in taught if pairing.chosen in (None, answer.source)]


def _as_is(answers: Sequence[Candidate]) -> Assignment:
    whole = [answer for answer in answers if answer.whole]
    first = next((answer for answer in whole if not answer.vetoed), None)
    if first is None:
        why = "no answer without a veto" if whole else "no answer that is whole" if answers else "no answer"
        return Dropped("sft", Refusal(why))
    return SftExample(first, "the first answer, as it is")


def _available(pair: PreferencePair | Refusal, answers: Sequence[Candidate]) -> Assignment:
    if isinstance(pair, PreferencePair):
        return pair
    example = best(answers)
    if isinstance(example, Refusal):
        return Dropped("sft", example)
    return SftExample(example, f"{_why(answers)}; no pair: {pair.why}")


def _split(pairing: Pairing, prompts: Mapping[str, Answers], seed: int, answered: bool) -> dict[str, Assignment]:
    """Draw the share of SFT from the prompts that fit both stages.

    FuseChat-3.0's counts show this: 40 % of these, not of all prompts. Where the target answers after its SFT, pairs
    are not known yet, and only a prompt without an answer to imitate doesn't fit.
    """
    taught = {prompt: teaching(pairing, answers) for prompt, answers in prompts.items()}
    examples = {prompt: best(answers) for prompt, answers in taught.items()}
    pairs = {} if pairing.needs_target else _pairs(pairing, prompts, seed)
    needs_sources = not pairing.needs_target or pairing.sft_share > 0 or pairing.rule == "wrpo"
    assigned: dict[str, Assignment] = {}
    for prompt, example in examples.items():
        pair = pairs.get(prompt)
        if isinstance(example, Refusal) and needs_sources:
            assigned[prompt] = Dropped("sft" if pairing.sft_share > 0 else "preference", example)
        elif isinstance(pair, Refusal) and pairing.sft_share < 1:
            assigned[prompt] = Dropped("preference", pair)
    fit = [prompt for prompt in prompts if prompt not in assigned]
    for_sft = drawn(fit, pairing.sft_share, seed)
    if pairing.needs_target and answered:
        pairs = _pairs(pairing, {prompt: prompts[prompt] for prompt in fit if prompt not in for_sft}, seed)
    for prompt in fit:
        example, pair = examples[prompt], pairs.get(prompt)
        if prompt in for_sft and isinstance(example, Candidate):
            assigned[prompt] = SftExample(example, _why(taught[prompt]))
        elif pair is None:
            assigned[prompt] = Waiting()
        else:
            assigned[prompt] = Dropped("preference", pair) if isinstance(pair, Refusal) else pair
    return assigned


def drawn(prompts: Collection[str], share: float, seed: int) -> frozenset[str]:
    """Draw ``floor_share(share, n)`` of n prompts by a digest of seed and id.

    Neither the order of the prompts matters nor what else is drawn from the seed.
    """
    count = floor_share(share, len(prompts))
    return frozenset(sorted(prompts, key=lambda prompt: (seed_of(seed, "split", prompt), prompt))[:count])


def floor_share(share: float, number: int) -> int:
    """Return ⌊share · number⌋, as FuseChat-3.0's counts are: 0.4 · 20,374 = 8,149.6 became 8,149.

    The share stands for the nearest fraction with a denominator of at most 10,000, so 0.33333333 is a third.
    """
    return math.floor(Fraction(share).limit_denominator(10_000) * number)


def _pairs(pairing: Pairing, prompts: Mapping[str, Answers], seed: int) -> dict[str, PreferencePair | Refusal]:
    offers = {prompt: _offers(pairing, prompt, answers, seed) for prompt, answers in prompts.items()}
    gap = _gap_filter(pairing, offers.values())
    if pairing.gap_own is not None:
        gap = by_chosen(gap, gap_between(*pairing.gap_own))
    filters = [gap, chosen_from(pairing.chosen_score)]
    if pairing.rip.of == "pairs":
        filters.append(rip(**pairing.rip.thresholds))
    return {prompt: admitted(offered, filters) for prompt, offered in offers.items()}


def _offers(pairing: Pairing, prompt: str, answers: Answers, seed: int) -> Offers:
    rule = partial(RULES[pairing.rule], **pairing.options)
    if pairing.rule == "simplemix":
        return rule(answers, draw=seed_of(seed, "simplemix", prompt) / 2**31)
    if pairing.rule == "asked":
        return rule(answers, chosen=pairing.chosen, rejected=pairing.rejected)
    if pairing.rule not in ("best_worst", "sweet_spot", "crossed"):
        return rule(answers)
    sources = answers.sources if pairing.answers != "target" else ()
    target = answers.target if pairing.answers != "sources" else ()
    if pairing.rule == "crossed":
        return rule(Answers(sources, target, answers.others), draw=seed_of(seed, "crossed", prompt) / 2**31)
    return rule(Answers(sources, target))


def _gap_filter(pairing: Pairing, offers: Iterable[Offers]) -> Filter:
    if pairing.gap_quantiles is None:
        return gap_between(*pairing.gap)
    gaps = [offer.gap for offered in offers for offer in offered if isinstance(offer, PreferencePair)]
    if not gaps:
        return gap_between(None, None)
    least, most = (float(bound) for bound in np.quantile(gaps, pairing.gap_quantiles))
    return gap_between(least, most)


def _why(answers: Sequence[Candidate]) -> str:
    right = "right ones of " if any(answer.correct is not None for answer in answers) else ""
    return f"highest score of {right}{len(answers)}"
