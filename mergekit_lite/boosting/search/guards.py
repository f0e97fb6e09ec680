"""Guards: figures that show what goes wrong in answers while a score still rises, and limits to them.

Too large an alpha makes models talk without end, repeat themselves and forget to stop, and reward models and judges
notice late or never. So each candidate's answers are also compared with the baseline's answers to the same items. A
candidate beyond a limit is out, however high its score.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from statistics import fmean, stdev
from typing import Any

from mergekit_lite.boosting.candidates.candidate import ItemRow, cluster_of
from mergekit_lite.errors import UsageError, nearest

GRAM = 4
# Runs of letters and digits; every other sign, and each sign of scripts that write without spaces, by itself.
WORD = re.compile(r"[^\W\u0e00-\u0eff\u2e80-\u9fff\uac00-\ud7af\uf900-\ufaff]+|\S")


@dataclass(frozen=True)
class Guards:
    """Figures of one candidate's answers. None where the rows don't have what a figure needs."""

    answers: int = 0  # their number
    length: float | None = None  # mean characters
    growth: float | None = None  # mean length over that of the baseline's answers to the same items
    truncated: float | None = None  # share cut by the token limit
    ended: float | None = None  # share that the model ended by itself
    repetition: float | None = None  # mean share of an answer's 4-grams of words that it has said before
    identical: float | None = None  # share of answers that another item got, too, letter by letter
    unchanged: float | None = None  # share of answers that are the baseline's, letter by letter
    unscored: float | None = None  # share of items without a score of the deciding scorer
    kl: float | None = None  # estimate of KL(candidate ‖ baseline), nats an answer, see ``_kl``; None for the baseline
    kl_per_token: float | None = None  # the same, nats a token
    kl_error: float | None = None  # the standard error of ``kl``
    kl_answers: int = 0  # the number of answers that ``kl`` is from


@dataclass(frozen=True)
class Limits:
    """The limits of a candidate; None is no limit.

    ``growth`` and ``kl``, ``kl_per_token`` are limits by themselves; shares are limits to what is *added* to the
    baseline's share, as a baseline may be cut often where few tokens are allowed. The growth is above what the paper's
    own choices show: 2.3 for alpha 8 of the model trained for a tenth of its steps.

    Attributes:
        loss: by scorer, how much of its mean may be lost against the baseline, such as of a maths test.
    """

    growth: float | None = 2.5
    truncated: float | None = 0.05
    repetition: float | None = 0.1
    identical: float | None = 0.1
    unscored: float | None = 0.05
    kl: float | None = None
    kl_per_token: float | None = None
    loss: Mapping[str, float] = field(default_factory=dict)


ADDED = ("truncated", "repetition", "identical", "unscored")
NAMES = tuple(one.name for one in dataclasses.fields(Limits) if one.name != "loss")


def limits(texts: Sequence[str]) -> Limits:
    """Read limits such as ``growth=1.5``, ``truncated=none``, ``loss:SCORER=0.02``; the others keep their defaults.

    Raises:
        UsageError: some texts can't be read; the message has all of them.
    """
    own: dict[str, float | None] = {}
    losses: dict[str, float] = {}
    problems = []
    for text in texts:
        name, _, value = text.rpartition("=")
        number = None if value.lower() == "none" else _number(value)
        if name.startswith("loss:") and name != "loss:" and number is not None:
            losses[name.removeprefix("loss:")] = number
        elif name in NAMES and (number is not None or value.lower() == "none"):
            own[name] = number
        elif name in NAMES or name.startswith("loss:"):
            problems.append(f"{text!r}: expected a number after '='")
        else:
            problems.append(f"{text!r}: no such limit.{nearest(name, NAMES)}")
    if problems:
        raise UsageError(
            f"Limits that can't be used: {'; '.join(problems)}. There are: {', '.join(NAMES)}, loss:SCORER."
        )
    return Limits(loss=losses, **own)


def guards(rows: Mapping[str, ItemRow], baseline: Mapping[str, ItemRow], score: str) -> Guards:
    """Compute the guards of a candidate.

    Args:
        rows: the candidate's, by item.
        baseline: the baseline's; items that only it has are ignored.
        score: the deciding scorer.
    """
    scored = [row["values"][score] for row in rows.values() if score in row.get("values", {})]
    answers = {item: row for item, row in rows.items() if "text" in row}
    unscored = sum(value is None for value in scored) / len(scored) if scored else None
    if not answers:
        return Guards(unscored=unscored)
    texts = [row["text"] for row in answers.values()]
    theirs = {item: baseline[item]["text"] for item in answers if "text" in baseline.get(item, {})}
    ours = {item: answers[item]["text"] for item in theirs}
    finishes = Counter(row["finish"] for row in answers.values() if "finish" in row)
    known = finishes.total()
    often = Counter(texts)
    before = sum(map(len, theirs.values()))
    return Guards(
        answers=len(texts),
        length=sum(map(len, texts)) / len(texts),
        growth=sum(map(len, ours.values())) / before if before else None,
        truncated=finishes["length"] / known if known else None,
        ended=finishes["stop"] / known if known else None,
        repetition=sum(map(repetition, texts)) / len(texts),
        identical=sum(often[text] > 1 for text in texts) / len(texts),
        unchanged=sum(ours[item] == theirs[item] for item in theirs) / len(theirs) if theirs else None,
        unscored=unscored,
        **_kl(answers.values()),
    )


def beyond(candidate: Guards, baseline: Guards, limits: Limits) -> list[str]:
    """Return a sentence for each limit that is passed, except those of ``losses``."""
    said = []
    for name in NAMES:
        value, limit = getattr(candidate, name), getattr(limits, name)
        if name in ADDED and limit is not None:
            limit += getattr(baseline, name) or 0.0
        if value is not None and limit is not None and value > limit:
            said.append(f"{name} {value:.3g} is above {limit:.3g}")
    return said


def losses(changes: Mapping[str, float], limits: Limits) -> list[str]:
    """Return a sentence for each scorer that lost too much; ``changes`` are mean differences to the baseline."""
    return [
        f"{name} loses {-changes[name]:.3g}, more than {limit:.3g}"
        for name, limit in limits.loss.items()
        if name in changes and changes[name] < -limit
    ]


@lru_cache(maxsize=1 << 16)  # each look at a candidate computes it for the same answers again
def repetition(text: str) -> float:
    """Return the share of a text's 4-grams that occur earlier in it: 0 without repetition, near 1 for a loop."""
    words = WORD.findall(text)
    grams = [tuple(words[start : start + GRAM]) for start in range(len(words) - GRAM + 1)]
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def _kl(rows: Iterable[ItemRow]) -> dict[str, Any]:
    """Return the mean log-ratio of the answers that both models have read, and the other figures of KL.

    It is unbiased where whole answers are drawn at temperature 1, as they are to the first items of a random order. A
    cut answer counts for its beginning only. At other temperatures it is the mean log-ratio of the drawn answers.
    """
    known = [row for row in rows if "log_prob" in row and "aligned_log_prob" in row]
    if not known:
        return {}
    ratios: dict[str, list[float]] = {}
    for row in known:
        ratios.setdefault(cluster_of(row["item"]), []).append(row["log_prob"] - row["aligned_log_prob"])
    total, tokens = sum(map(sum, ratios.values())), sum(row.get("tokens") or 0 for row in known)
    means = [fmean(each) for each in ratios.values()]
    return {
        "kl": total / len(known),
        "kl_per_token": total / tokens if tokens else None,
        "kl_error": stdev(means) / math.sqrt(len(means)) if len(means) > 1 else None,
        "kl_answers": len(known),
    }


def _number(text: str) -> float | None:
    try:
        number = float(text)
    except ValueError:
        return None
    return number if 0 <= number < float("inf") else None
