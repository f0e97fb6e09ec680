"""What becomes of each prompt of a domain: an SFT row, a preference row, or nothing and why."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Mapping
from fractions import Fraction
from functools import partial
from typing import NamedTuple

import numpy as np

from mergekit_lite.answers.rows import seed_of
from mergekit_lite.distillation.recipe import Pairs
from mergekit_lite.distillation.rules import (
    RULES,
    Answers,
    Candidate,
    Dropped,
    Filter,
    Offers,
    Pair,
    admitted,
    best,
    gap_between,
    rip,
)

TARGET_RULES = ("wrpo", "simplemix")  # pairs with the target's own answers, by definition


class Sft(NamedTuple):
    """An answer to imitate."""

    answer: Candidate
    why: str


class Lost(NamedTuple):
    """A prompt that becomes no row."""

    stage: str  # which it is lost to: sft or preference
    reason: Dropped


class Waiting(NamedTuple):
    """A prompt of the preference stage that the target still has to answer."""


Fate = Sft | Pair | Lost | Waiting


def needs_target(protocol: Pairs) -> bool:
    """Whether pairs are made of answers that the target gives once it had its SFT."""
    if protocol.rule == "as_is" or (protocol.split == "share" and protocol.sft_share == 1):
        return False
    return protocol.rule in TARGET_RULES or (protocol.rule != "fusechat3" and protocol.answers != "sources")


def fates(protocol: Pairs, prompts: Mapping[str, Answers], seed: int, answered: bool = True) -> dict[str, Fate]:
    """What becomes of each prompt of one domain.

    Args:
        protocol: of the domain.
        prompts: by id, the answers that can be used.
        seed: of the split and of what rules draw.
        answered: the target's own answers are there, where the protocol needs them.
    """
    if protocol.rule == "as_is":
        return {prompt: _as_is(answers) for prompt, answers in prompts.items()}
    examples = {prompt: best(answers.sources) for prompt, answers in prompts.items()}
    if needs_target(protocol):
        return _share_then_pair(protocol, prompts, examples, seed, answered)
    pairs = _pairs(protocol, prompts, seed)
    if protocol.split == "availability":
        return {prompt: _available(pairs[prompt], examples[prompt], prompts[prompt]) for prompt in prompts}
    return _pair_then_share(protocol, prompts, examples, pairs, seed)


def _as_is(answers: Answers) -> Fate:
    if not answers.sources:
        return Lost("sft", Dropped("no answer"))
    return Sft(answers.sources[0], "the first answer, as it is")


def _available(pair: Pair | Dropped, example: Candidate | Dropped, answers: Answers) -> Fate:
    if isinstance(pair, Pair):
        return pair
    if isinstance(example, Dropped):
        return Lost("sft", example)
    return Sft(example, f"{_why(answers)}; no pair: {pair.why}")


def _pair_then_share(
    protocol: Pairs,
    prompts: Mapping[str, Answers],
    examples: Mapping[str, Candidate | Dropped],
    pairs: Mapping[str, Pair | Dropped],
    seed: int,
) -> dict[str, Fate]:
    """Only what fits both stages is split, as FuseChat-3.0's counts show: 40 % of what is left, not of all."""
    fates: dict[str, Fate] = {}
    fit = []
    for prompt in prompts:
        example, pair = examples[prompt], pairs[prompt]
        if isinstance(example, Dropped):
            fates[prompt] = Lost("sft" if protocol.sft_share > 0 else "preference", example)
        elif isinstance(pair, Dropped) and protocol.sft_share < 1:
            fates[prompt] = Lost("preference", pair)
        else:
            fit.append(prompt)
    first = drawn(fit, protocol.sft_share, seed)
    for prompt in fit:
        example, pair = examples[prompt], pairs[prompt]
        if prompt in first and isinstance(example, Candidate):
            fates[prompt] = Sft(example, _why(prompts[prompt]))
        elif isinstance(pair, Pair):
            fates[prompt] = pair
    return fates


def _share_then_pair(
    protocol: Pairs,
    prompts: Mapping[str, Answers],
    examples: Mapping[str, Candidate | Dropped],
    seed: int,
    answered: bool,
) -> dict[str, Fate]:
    """The split comes first, as the target answers only after its SFT."""
    fates: dict[str, Fate] = {}
    needs_sources = protocol.sft_share > 0 or protocol.rule == "wrpo"
    for prompt, example in examples.items():
        if isinstance(example, Dropped) and needs_sources:
            fates[prompt] = Lost("sft" if protocol.sft_share > 0 else "preference", example)
    fit = [prompt for prompt in prompts if prompt not in fates]
    first = drawn(fit, protocol.sft_share, seed)
    rest = {prompt: prompts[prompt] for prompt in fit if prompt not in first}
    pairs = _pairs(protocol, rest, seed) if answered else {}
    for prompt in fit:
        example = examples[prompt]
        if prompt in first and isinstance(example, Candidate):
            fates[prompt] = Sft(example, _why(prompts[prompt]))
        elif not answered:
            fates[prompt] = Waiting()
        else:
            pair = pairs[prompt]
            fates[prompt] = Lost("preference", pair) if isinstance(pair, Dropped) else pair
    return fates


def drawn(prompts: Collection[str], share: float, seed: int) -> frozenset[str]:
    """⌊share · n⌋ of n prompts, by a digest of seed and id: neither order nor what else is drawn matters.

    See ``whole``.
    """
    count = whole(share, len(prompts))
    return frozenset(sorted(prompts, key=lambda prompt: (seed_of(seed, "split", prompt), prompt))[:count])


def whole(share: float, number: int) -> int:
    """⌊share · number⌋, as FuseChat-3.0's counts are: 0.4 · 20,374 = 8,149.6 became 8,149.

    The share is taken for the nearest fraction with a denominator of at most 10,000, so 0.33333333 is a third.
    """
    return math.floor(Fraction(share).limit_denominator(10_000) * number)


def _pairs(protocol: Pairs, prompts: Mapping[str, Answers], seed: int) -> dict[str, Pair | Dropped]:
    offers = {prompt: _offers(protocol, prompt, answers, seed) for prompt, answers in prompts.items()}
    filters = [_gap_filter(protocol, offers.values()), rip(**protocol.rip)]
    return {prompt: admitted(offered, filters) for prompt, offered in offers.items()}


def _offers(protocol: Pairs, prompt: str, answers: Answers, seed: int) -> Offers:
    rule = partial(RULES[protocol.rule], **protocol.options)
    if protocol.rule == "simplemix":
        return rule(answers, draw=seed_of(seed, "simplemix", prompt) / 2**31)
    if protocol.rule in ("best_worst", "sweet_spot"):
        sources = answers.sources if protocol.answers != "target" else ()
        target = answers.target if protocol.answers != "sources" else ()
        return rule(Answers(sources, target))
    return rule(answers)


def _gap_filter(protocol: Pairs, offers: Iterable[Offers]) -> Filter:
    """Bounds as they are given, or as quantiles of the gaps of all that is offered."""
    if protocol.gap_quantiles is None:
        return gap_between(*protocol.gap)
    gaps = [offer.gap for offered in offers for offer in offered if isinstance(offer, Pair)]
    if not gaps:
        return gap_between(None, None)
    least, most = (float(bound) for bound in np.quantile(gaps, protocol.gap_quantiles))
    return gap_between(least, most)


def _why(answers: Answers) -> str:
    right = "right ones of " if any(one.correct is not None for one in answers.sources) else ""
    return f"highest score of {right}{len(answers.sources)}"
