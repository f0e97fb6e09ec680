"""The result of a search in sentences."""

from __future__ import annotations

from collections.abc import Iterator

from mergekit_lite.answers.intervals import Interval
from mergekit_lite.boosting.search.choice import Result
from mergekit_lite.boosting.search.flips import DRAWS
from mergekit_lite.boosting.search.point import Point
from mergekit_lite.errors import counted

CAN_NOT_TELL = (
    "Other tasks. The score holds for items like these; what alignment cost elsewhere, more of it costs more. A test "
    "of that can be another scorer, with a limit to what may be lost.",
    "What the scorer doesn't see. A reward model likes some answers for their form; read the samples.",
    "Other draws. All candidates answered with the same seeds; the intervals are about other items, not other answers.",
    "Several peaks. The bracket climbs one hill; a grid sees more of them, at its price.",
)


def verdict(result: Result) -> list[str]:
    """Return the verdict in sentences: the answer first, then remarks on it."""
    broken = result.broken.get(result.settings.score)
    answer = [f"No candidate was chosen. {broken}"] if broken else list(_answer(result))
    others = [said for name, said in result.broken.items() if name != result.settings.score]
    firm = [f"{stability(result)}."] if result.stays else []
    return [*answer, *others, *_direction(result), *firm, *_length(result), *_hints(result)]


def stability(result: Result) -> str:
    """Say how often the choice stays where labels flip."""
    said = [
        f"{100 * share:.0f} % of the labels flipped the same is chosen in {100 * kept.same:.0f} % of {DRAWS} draws, "
        f"the same or one as good in {100 * kept.as_good:.0f} %"
        for share, kept in result.stays.items()
    ]
    return f"With {'; with '.join(said)}"


def figures(of: Interval) -> str:
    """Return an interval as text: ``+0.12 (+0.05 to +0.2) on 300 items``."""
    return f"{of.mean:+.3g} ({of.low:+.3g} to {of.high:+.3g}) on {counted(of.items, 'item')}"


def _answer(result: Result) -> Iterator[str]:
    base, picked, held_out = result.called(result.baseline), result.picked, result.held_out
    sure = f"{100 * result.settings.confidence:g} %"
    best = highest(result)
    if picked is None:
        yield f"No candidate helps: none beats {base} beyond its {sure} interval."
        if best is not None:
            yield f"The highest is {result.called(best)}: {figures(best.gain)}."
        return
    name = result.called(picked)
    if result.chosen is None and held_out is not None:
        why = f"is beyond a limit: {held_out.beyond[0]}" if held_out.beyond else f"gains {figures(held_out.gain)}"
        yield f"No candidate is sure to help: {name} was preferred, but {why}, held out from the search."
        yield f"In the search it gained {figures(picked.gain)}. More items may tell."
        return
    if held_out is not None:
        yield f"{_begun(name)} beats {base}: {figures(held_out.gain)} held out from the search."
    else:
        tried = counted(len(result.points), "candidate")
        yield f"{_begun(name)} beats {base}: {figures(picked.gain)}, also when corrected for {tried}."
        yield "There are too few items to hold some out, so the gain itself leans upwards."
    if best is not None and best is not picked:
        yield (
            f"{_begun(result.called(best))} scored highest ({figures(best.gain)}), by less than one standard error; "
            f"{name} is nearer to {base}."
        )
    if name != picked.name:
        yield f"{_begun(name)} is {picked.name.replace(',', ', ')}."


def _begun(name: str) -> str:
    """Return what a sentence begins with; the names of numbers stay as they are."""
    return name.replace("candidate ", "Candidate ") if name.startswith("candidate ") else name


def _direction(result: Result) -> Iterator[str]:
    name = result.settings.score
    if name in result.settings.minimised:
        points = [result.baseline, *([result.picked] if result.picked else [])]
        means = [f"{result.settings.shown(name, one.score).mean:.4g} at {result.called(one)}" for one in points]
        yield f"Lower {name} is better, and a gain is how much lower: {' and '.join(means)}."


def _length(result: Result) -> Iterator[str]:
    shown = result.held_out or result.picked
    if shown is None:
        return
    if shown.length is not None and shown.length.only_length:
        yield (
            f"This win may be only length: answers are {shown.length.longer:.0f} characters longer on average, and at "
            f"equal length the gain is {figures(shown.length.at_equal_length)}."
        )
    if (rates := shown.win_rates) is not None:
        extreme = " That is far apart: look at the lengths." if rates.extreme else ""
        both = f"{rates.raw:.1f} %, at equal length {rates.at_equal_length:.1f} %"
        yield f"Win rate against {result.called(result.baseline)}: {both}.{extreme}"


def _hints(result: Result) -> Iterator[str]:
    best = highest(result)
    if best is not None and len(result.points) > 1:
        for name, value in best.params.items():
            tried = {point.params[name] for point in (result.baseline, *result.points)}
            allowed = {point.params[name] for point in result.points if point.allowed}
            if value == max(tried) and len(allowed) > 1:
                yield f"The highest score is at the largest {name} that was tried: a wider search may find better."
    idle = [result.called(point) for point in result.points if point.guards.unchanged == 1]
    if idle:
        base = result.called(result.baseline)
        yield f"All answers of {', '.join(idle)} are those of {base}: rounding may hide the change."
    out = [point for point in result.points if point.beyond]
    if out:
        yield f"Beyond limits: {'; '.join(f'{result.called(point)} ({point.beyond[0]})' for point in out)}."


def highest(result: Result) -> Point | None:
    """Return the candidate with the highest mean gain among those that are allowed and measured on all items."""
    allowed = [point for point in result.points if point.allowed]
    return max(allowed, key=lambda point: point.gain.mean, default=None)
