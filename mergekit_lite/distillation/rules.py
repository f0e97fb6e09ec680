"""The published rules that make a preference pair of the scored answers to one prompt, as pure functions.

A rule offers pairs in order of preference, and ``admitted`` takes the first that passes all filters. Of equal scores
the first answer wins: by the order of the sources in the recipe, then by index.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

TOO_FEW, NO_WRONG = "fewer than two answers", "no wrong answer"
DIGITS = 10  # gaps are rounded to these decimals, so that 0.11 − 0.10 is 0.01


@dataclass(frozen=True, slots=True)
class Candidate:
    """An answer as rules see it."""

    source: str
    index: int  # among the source's answers to the prompt, from 0
    score: float  # that answers are ranked by
    correct: bool | None = None  # a verifier's verdict; None where the domain has no verifier
    length: int = 0  # of the text, in characters
    digest: int | None = None  # of the text; equal texts have equal digests
    own: bool = False  # whether it is the target's own answer, not a source's
    whole: bool = True  # False for one that was cut: it may be rejected, but never chosen
    vetoed: bool = False  # by a scorer: it may be rejected, but never chosen
    prompt: str = ""  # the id of the prompt that it answers, where that is not the pair's own


class Answers(NamedTuple):
    """The usable answers to one prompt."""

    sources: Sequence[Candidate] = ()
    target: Sequence[Candidate] = ()
    others: Sequence[Candidate] = ()  # of all of them, to the same question under other system messages


class PreferencePair(NamedTuple):
    """Chosen answers, sources' before the target's own, and rejected answers."""

    chosen: tuple[Candidate, ...]
    rejected: tuple[Candidate, ...]
    gap: float  # score of the last chosen answer minus score of the rejected one
    why: str


class Refusal(NamedTuple):
    """The reason why a prompt gives no pair, or no answer to imitate."""

    why: str  # one of few different texts: prompts are counted by it
    detail: str = ""


Offers = list[PreferencePair | Refusal]
Filter = Callable[[PreferencePair], str]  # the reason why a pair is not admitted, or ""


def fusechat3(answers: Answers) -> Offers:
    """Offer best and worst answer of the *same* source: FuseChat-3.0 (Yang et al. 2025, arXiv 2503.04222).

    A style of one source that the reward model likes is then on both sides. Of several sources the pair with the
    highest chosen score comes first; the paper leaves open which one does.
    """
    sources = dict.fromkeys(answer.source for answer in answers.sources)
    offers = [extremes([answer for answer in answers.sources if answer.source == source]) for source in sources]
    pairs = [offer for offer in offers if isinstance(offer, PreferencePair)]
    refusals = [offer for offer in offers if isinstance(offer, Refusal)]
    return [*sorted(pairs, key=lambda pair: -pair.chosen[0].score), *refusals]


def wrpo(answers: Answers) -> Offers:
    """Offer y_ws and y_wt as chosen, y_l as rejected: WRPO (Yang et al. 2025, arXiv 2412.03187).

    y_ws is the best answer of all sources, y_wt and y_l are the best and the worst of the target's own.
    """
    best_of_sources, own = best(answers.sources), extremes(answers.target)
    if isinstance(best_of_sources, Refusal):
        return [best_of_sources]
    if isinstance(own, Refusal):
        return [Refusal(f"the target's own answers: {own.why}", own.detail)]
    why = "best of all sources; best and worst of the target's own"
    return [PreferencePair((best_of_sources, *own.chosen), own.rejected, own.gap, why)]


def best_worst(answers: Answers) -> Offers:
    """Offer the best and the worst of all answers, whoever gave them: the data of plain DPO."""
    return [extremes([*answers.sources, *answers.target])]


def sweet_spot(answers: Answers, *, sigmas: float = 2.0) -> Offers:
    """Offer the best answer and the one whose score is nearest to μ − 2σ (Xiao et al. 2025, arXiv 2502.16825).

    μ and σ are mean and standard deviation (of the population, divided by n) of the prompt's scores. The worst of many
    answers is often junk that teaches little; this one is bad in an ordinary way.

    Args:
        answers: to one prompt.
        sigmas: the distance below the mean, in standard deviations.
    """
    pool = [*answers.sources, *answers.target]
    top = best(pool)
    if isinstance(top, Refusal):
        return [top]
    scores = [answer.score for answer in pool]
    spot = statistics.fmean(scores) - sigmas * statistics.pstdev(scores)
    others = [answer for answer in pool if answer is not top and not answer.correct]
    if not others:
        return [Refusal(NO_WRONG if top.correct else TOO_FEW)]
    if top.correct is None:  # a cut one may have a higher score
        others = [answer for answer in others if answer.score <= top.score] or [top]
    nearest = min(others, key=lambda answer: abs(answer.score - spot))
    return [_pair(top, nearest, f"best, and the one nearest to μ − {sigmas:g}σ = {spot:.4g}")]


def simplemix(answers: Answers, *, draw: float, sources: float = 0.5) -> Offers:
    """Offer by a coin the sources' best and worst or the target's own: SimpleMix (Li, Khashabi 2025, arXiv 2505.02363).

    The other side's pair comes second, for prompts where the first isn't admissible.

    Args:
        answers: to one prompt.
        draw: the coin, uniform in [0, 1).
        sources: the probability of the sources' pair.
    """
    sides = [best_worst(Answers(sources=answers.sources)), best_worst(Answers(target=answers.target))]
    first, second = sides if draw < sources else reversed(sides)
    return [*first, *second]


def crossed(answers: Answers, *, draw: float) -> Offers:
    """Offer the best answer, and what the same source answered under another system message.

    Janus (Lee et al. 2024, arXiv 2405.17977): the chosen answer follows the system message of its prompt, the rejected
    one another. Without scores the first answers are taken.

    Args:
        answers: to one prompt, with those to its question under other system messages.
        draw: a coin for the other system message, uniform in [0, 1).
    """
    chosen = best([*answers.sources, *answers.target])
    if isinstance(chosen, Refusal):
        return [chosen]
    same = [answer for answer in answers.others if answer.source == chosen.source]
    others = [answer for answer in same if answer.digest is None or answer.digest != chosen.digest]
    prompts = list(dict.fromkeys(answer.prompt for answer in others))
    if not prompts:
        return [Refusal("no other answer of the source under another system message")]
    drawn = prompts[int(draw * len(prompts))]
    rejected = next(answer for answer in others if answer.prompt == drawn)
    gap = round(chosen.score - rejected.score, DIGITS)
    return [PreferencePair((chosen,), (rejected,), gap, "the answer, and one under another system message")]


def asked(answers: Answers, *, chosen: str, rejected: str) -> Offers:
    """Offer an answer of one source against another source's, which was asked for a worse one, or is the one before.

    Without scores the chosen one is the first; the rejected one has its number, or is the first, too.

    Args:
        answers: to one prompt.
        chosen: the source whose answers are chosen.
        rejected: the source whose answers are rejected.
    """
    top = best([answer for answer in answers.sources if answer.source == chosen])
    if isinstance(top, Refusal):
        return [Refusal(f"{chosen}: {top.why}")]
    others = [answer for answer in answers.sources if answer.source == rejected]
    if not others:
        return [Refusal(f"{rejected}: no answer")]
    worse = next((answer for answer in others if answer.index == top.index), others[0])
    if top.digest is not None and top.digest == worse.digest:
        return [Refusal("chosen and rejected are the same text")]
    gap = round(top.score - worse.score, DIGITS)
    return [PreferencePair((top,), (worse,), gap, f"as they were asked: {chosen} against {rejected}")]


RULES: dict[str, Callable[..., Offers]] = {
    rule.__name__: rule for rule in (fusechat3, wrpo, best_worst, sweet_spot, simplemix, crossed, asked)
}


def best(answers: Sequence[Candidate]) -> Candidate | Refusal:
    """Return the answer with the highest score of those that may be chosen; with a verifier, only of the right ones."""
    if not answers:
        return Refusal("no answer with a score")
    right = [answer for answer in answers if answer.correct is not False]
    whole = [answer for answer in right if answer.whole]
    if not whole:
        return Refusal("no right answer that is whole" if right else "no right answer")
    chosen = [answer for answer in whole if not answer.vetoed]
    if not chosen:
        return Refusal("no answer without a veto")
    return max(chosen, key=lambda answer: answer.score)


def extremes(answers: Sequence[Candidate]) -> PreferencePair | Refusal:
    """Pair the highest score with the lowest; with a verifier, the highest right with the lowest wrong answer."""
    top = best(answers)
    if isinstance(top, Refusal):
        return top
    if len(answers) < 2:
        return Refusal(TOO_FEW)
    wrong = [answer for answer in answers if not answer.correct]
    if not wrong:
        return Refusal(NO_WRONG)
    source = f" of {top.source}" if len({answer.source for answer in answers}) == 1 else ""
    right = "highest right and lowest wrong score" if top.correct else "best and worst"
    return _pair(top, min(wrong, key=lambda answer: answer.score), right + source)


def win(answer: Candidate, pool: Sequence[Candidate]) -> float:
    """Return the probability that an answer beats a random one of the pool, as SPPO (arXiv 2405.00675) estimates it.

    It is the mean of σ(its score − theirs) over the pool, the answer itself included (½). Scores are taken for logits
    of preference.
    """
    # exp overflows above 709.
    return statistics.fmean(1 / (1 + math.exp(min(other.score - answer.score, 700.0))) for other in pool)


def _pair(chosen: Candidate, rejected: Candidate, why: str) -> PreferencePair | Refusal:
    if chosen.correct is None and chosen.score == rejected.score:
        return Refusal("no answer has a lower score")
    if chosen.digest is not None and chosen.digest == rejected.digest:
        return Refusal("chosen and rejected are the same text")
    return PreferencePair((chosen,), (rejected,), round(chosen.score - rejected.score, DIGITS), why)


def admitted(offers: Offers, filters: Iterable[Filter]) -> PreferencePair | Refusal:
    """Return the first pair that passes all filters, or the reasons why none does."""
    filters = list(filters)
    refusals: list[Refusal] = []
    for offer in offers:
        if isinstance(offer, Refusal):
            refusals.append(offer)
            continue
        reasons = [why for reason_of in filters if (why := reason_of(offer))]
        if not reasons:
            return offer
        refusals.append(Refusal(reasons[0], f"{offer.why}: gap {offer.gap:.6g}"))
    if len(refusals) == 1:
        return refusals[0]
    why = "; ".join(sorted({refusal.why for refusal in refusals}))
    return Refusal(why, "; ".join(refusal.detail for refusal in refusals if refusal.detail))


def gap_between(least: float | None, most: float | None) -> Filter:
    """Return a filter that admits gaps from ``least`` to ``most``, both included; None is no bound."""

    def reason(pair: PreferencePair) -> str:
        if least is not None and pair.gap < least:
            return f"gap below {least:g}"
        return f"gap above {most:g}" if most is not None and pair.gap > most else ""

    return reason


def by_chosen(sources: Filter, own: Filter) -> Filter:
    """Return a filter that is another one where the chosen answer, of several the last, is the target's own."""
    return lambda pair: (own if pair.chosen[-1].own else sources)(pair)


def chosen_from(least: float | None) -> Filter:
    """Return a filter that admits pairs whose chosen answers all have this score at least; None is no bound."""

    def reason(pair: PreferencePair) -> str:
        below = least is not None and min(answer.score for answer in pair.chosen) < least
        return f"chosen score below {least:g}" if below else ""

    return reason


def rip(
    *, rejected_score: float | None = None, rejected_length: float | None = None, gap: float | None = None
) -> Filter:
    """Return RIP's filter (Yu et al. 2025, arXiv 2501.18578).

    It admits pairs whose rejected answer is good, long and near the chosen one. Published thresholds for ArmoRM are
    0.126, 1878 and 0.042; None doesn't filter.

    Args:
        rejected_score: the least score of the rejected answer.
        rejected_length: its least length, in characters.
        gap: the largest difference of the scores.
    """

    def reason(pair: PreferencePair) -> str:
        rejected = pair.rejected[0]
        if rejected_score is not None and rejected.score < rejected_score:
            return f"RIP: rejected score below {rejected_score:g}"
        if rejected_length is not None and rejected.length < rejected_length:
            return f"RIP: rejected answer shorter than {rejected_length:g} characters"
        return f"RIP: gap above {gap:g}" if gap is not None and pair.gap > gap else ""

    return reason
