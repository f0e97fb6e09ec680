"""Which answers to one prompt teach what: the published rules, as pure functions of scores.

A rule offers pairs in the order in which they are wanted, and ``admitted`` takes the first that passes all filters.
Equal scores go to the answer that comes first: by the order of the sources in the recipe, then by index.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TOO_FEW, NO_WRONG = "fewer than two answers", "no wrong answer"
DIGITS = 10  # of a gap, so that 0.11 − 0.10 is 0.01


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer as rules see it.

    Attributes:
        source: the source's name.
        index: which of its answers to the prompt.
        score: what answers are ranked by.
        correct: a verifier's verdict; None where the domain has no verifier.
        length: of the text, in characters.
        digest: of the text, so that equal ones are known.
        own: the target's own answer, not a source's.
    """

    source: str
    index: int
    score: float
    correct: bool | None = None
    length: int = 0
    digest: int | None = None
    own: bool = False


class Answers(NamedTuple):
    """All answers to one prompt that can be used."""

    sources: Sequence[Candidate] = ()
    target: Sequence[Candidate] = ()


class Pair(NamedTuple):
    """What preference training is given: several chosen answers, in the order the objective weighs them."""

    chosen: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]
    gap: float  # the last chosen score less the rejected one
    why: str


class Dropped(NamedTuple):
    """Why there is nothing to take."""

    why: str  # few different ones, as they are counted
    detail: str = ""


Offers = list[Pair | Dropped]
Filter = Callable[[Pair], str]  # why a pair is not admitted, or nothing


def fusechat3(answers: Answers) -> Offers:
    """FuseChat-3.0 (Yang et al. 2025, arXiv 2503.04222): best and worst answer of the *same* source.

    A style that the reward model likes in one source's answers is then on both sides. Where several sources have an
    admissible pair the one with the highest chosen score is taken; the paper doesn't tell which.
    """
    sources = dict.fromkeys(candidate.source for candidate in answers.sources)
    each = [extremes([one for one in answers.sources if one.source == source]) for source in sources]
    pairs = sorted((pair for pair in each if isinstance(pair, Pair)), key=lambda pair: -pair.chosen[0].score)
    return [*pairs, *(none for none in each if isinstance(none, Dropped))]


def wrpo(answers: Answers) -> Offers:
    """WRPO (Yang et al. 2025, arXiv 2412.03187): chosen y_ws and y_wt, rejected y_l.

    y_ws is the best answer of all sources, y_wt and y_l are the best and the worst of the target's own.
    """
    strong, own = best(answers.sources), extremes(answers.target)
    if isinstance(strong, Dropped):
        return [strong]
    if isinstance(own, Dropped):
        return [Dropped(f"the target's own answers: {own.why}", own.detail)]
    why = "best of all sources; best and worst of the target's own"
    return [Pair((strong, *own.chosen), own.rejected, own.gap, why)]


def best_worst(answers: Answers) -> Offers:
    """Best against worst of all answers, whoever gave them: plain DPO's data."""
    return [extremes([*answers.sources, *answers.target])]


def sweet_spot(answers: Answers, *, sigmas: float = 2.0) -> Offers:
    """Best against the answer whose score is nearest to μ − 2σ (Xiao et al. 2025, arXiv 2502.16825).

    μ and σ are mean and standard deviation (of the population, divided by n) of the prompt's scores. The worst of many
    answers is often junk that teaches little; this one is bad in an ordinary way.

    Args:
        answers: to one prompt.
        sigmas: how far below the mean.
    """
    pool = [*answers.sources, *answers.target]
    top = best(pool)
    if isinstance(top, Dropped):
        return [top]
    scores = [one.score for one in pool]
    spot = statistics.fmean(scores) - sigmas * statistics.pstdev(scores)
    below = [one for one in pool if one is not top and not one.correct]
    if not below:
        return [Dropped(NO_WRONG if top.correct else TOO_FEW)]
    nearest = min(below, key=lambda one: abs(one.score - spot))
    return [_pair(top, nearest, f"best, and the one nearest to μ − {sigmas:g}σ = {spot:.4g}")]


def simplemix(answers: Answers, *, draw: float, sources: float = 0.5) -> Offers:
    """SimpleMix (Li and Khashabi 2025, arXiv 2505.02363): by a coin, the sources' best and worst or the target's own.

    Where the coin falls on the side that has no admissible pair, the other side's is taken.

    Args:
        answers: to one prompt.
        draw: the coin, in [0, 1).
        sources: the share of pairs from the sources.
    """
    sides = [best_worst(Answers(sources=answers.sources)), best_worst(Answers(target=answers.target))]
    first, second = sides if draw < sources else reversed(sides)
    return [*first, *second]


RULES: dict[str, Callable[..., Offers]] = {
    rule.__name__: rule for rule in (fusechat3, wrpo, best_worst, sweet_spot, simplemix)
}


def best(answers: Sequence[Candidate]) -> Candidate | Dropped:
    """The highest score; of the right answers where a verifier tells."""
    if not answers:
        return Dropped("no answer with a score")
    right = [one for one in answers if one.correct is not False]
    return max(right, key=lambda one: one.score) if right else Dropped("no right answer")


def extremes(answers: Sequence[Candidate]) -> Pair | Dropped:
    """Highest score against lowest; of the right against the wrong answers where a verifier tells."""
    top = best(answers)
    if isinstance(top, Dropped):
        return top
    if len(answers) < 2:
        return Dropped(TOO_FEW)
    wrong = [one for one in answers if not one.correct]
    if not wrong:
        return Dropped(NO_WRONG)
    source = f" of {top.source}" if len({one.source for one in answers}) == 1 else ""
    right = "highest right and lowest wrong score" if top.correct else "best and worst"
    return _pair(top, min(wrong, key=lambda one: one.score), right + source)


def win(answer: Candidate, pool: Sequence[Candidate]) -> float:
    """How probably an answer beats another of the pool: the mean of σ(its score − theirs), its own ½ included.

    As SPPO (arXiv 2405.00675) estimates it, from scores that are logits of preference.
    """
    return statistics.fmean(1 / (1 + math.exp(min(one.score - answer.score, 700.0))) for one in pool)


def _pair(chosen: Candidate, rejected: Candidate, why: str) -> Pair | Dropped:
    if chosen.correct is None and chosen.score == rejected.score:
        return Dropped("all answers have the same score")
    if chosen.digest is not None and chosen.digest == rejected.digest:
        return Dropped("chosen and rejected are the same text")
    return Pair((chosen,), (rejected,), round(chosen.score - rejected.score, DIGITS), why)


def admitted(offers: Offers, filters: Iterable[Filter]) -> Pair | Dropped:
    """The first pair that passes all filters, or the reasons of all of them."""
    filters = list(filters)
    refused: list[Dropped] = []
    for offer in offers:
        if isinstance(offer, Dropped):
            refused.append(offer)
            continue
        reasons = [why for each in filters if (why := each(offer))]
        if not reasons:
            return offer
        refused.append(Dropped(reasons[0], f"{offer.why}: gap {offer.gap:.6g}"))
    if len(refused) == 1:
        return refused[0]
    why = "; ".join(sorted({one.why for one in refused}))
    return Dropped(why, "; ".join(one.detail for one in refused if one.detail))


def gap_between(least: float | None, most: float | None) -> Filter:
    """Pairs whose scores differ by at least and at most so much, both included."""

    def filtered(pair: Pair) -> str:
        if least is not None and pair.gap < least:
            return f"gap below {least:g}"
        return f"gap above {most:g}" if most is not None and pair.gap > most else ""

    return filtered


def rip(
    *, rejected_score: float | None = None, rejected_length: float | None = None, gap: float | None = None
) -> Filter:
    """RIP (Yu et al. 2025, arXiv 2501.18578): prompts whose worst answer is good, long and not far from the best.

    Published for ArmoRM: 0.126, 1878, 0.042. What is None doesn't filter.

    Args:
        rejected_score: the least score of the rejected answer.
        rejected_length: its least length, in characters.
        gap: the most that the scores may differ by.
    """

    def filtered(pair: Pair) -> str:
        rejected = pair.rejected[0]
        if rejected_score is not None and rejected.score < rejected_score:
            return f"RIP: rejected score below {rejected_score:g}"
        if rejected_length is not None and rejected.length < rejected_length:
            return f"RIP: rejected answer shorter than {rejected_length:g} characters"
        return f"RIP: gap above {gap:g}" if gap is not None and pair.gap > gap else ""

    return filtered
