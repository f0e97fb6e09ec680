"""What models say of drafts, read from their replies; None where a reply has nothing that can be used."""

from __future__ import annotations

import re
from collections.abc import Sequence

NUMBERED = r"(?:\[\s*\d+\s*\]|\d+)"
TIE = rf"\s*[=≈~]\s*{NUMBERED}"  # a ranking is read up to it: who comes next isn't said
SEVERAL = rf"{NUMBERED}(?:\s*>\s*{NUMBERED})+(?!\d|{TIE})"
ONE = rf":\W*?{NUMBERED}(?=[ \t.*_]*$)"  # alone on its line: neither "ranking 3 responses" nor "Ranking:\n1. [2]"
RANKING = re.compile(rf"\branking\W*?({SEVERAL}|{ONE})", re.IGNORECASE | re.MULTILINE)
EITHER = r"\s*(?:/|\||,?\s*or\b)"  # behind a verdict: the form is repeated, and nothing said
VERDICT = re.compile(rf"(?<!\bor\s)\bverdict[^\w.]*(correct|incorrect)\b(?!{EITHER})", re.IGNORECASE)  # in one sentence


def ranking_in(reply: str, drafts: int, least: int) -> list[int] | None:
    """Return the places of drafts from the best one on, counted from 0, as the last ranking in a reply has them.

    It may leave out the worst: what it names has to be at least ``least`` of the ``drafts``, each once.
    """
    found = RANKING.findall(reply)
    if not found:
        return None
    places = [int(number) - 1 for number in re.findall(r"\d+", found[-1])]
    sound = len({*places}) == len(places) >= min(least, drafts) and all(0 <= place < drafts for place in places)
    return places if sound else None


def critiques_in(reply: str, drafts: int) -> list[str] | None:
    """Return the critique of each draft: what follows the line ``[1]``, up to ``[2]``, and so on.

    Numbers alone on their lines are headings: each once and in order, or nobody knows which one begins a critique.
    Where they don't name all drafts, a number at the start of a line is a heading if it is the next one: critiques name
    other drafts, too.
    """
    alone = list(re.finditer(r"^\W*\[(\d+)\][*_:]*\s*$", reply, re.MULTILINE))
    numbers = [int(heading[1]) for heading in alone]
    if numbers == list(range(1, drafts + 1)):
        return _critiques(reply, [(heading.start(), heading.end()) for heading in alone])
    if {*range(1, drafts + 1)} <= {*numbers}:
        return None
    places: list[tuple[int, int]] = []
    for number in range(1, drafts + 1):
        heading = re.compile(rf"^\W*\[{number}\][*_:]*", re.MULTILINE).search(reply, places[-1][1] if places else 0)
        if heading is None:
            return None
        places.append((heading.start(), heading.end()))
    return _critiques(reply, places)


def _critiques(reply: str, headings: Sequence[tuple[int, int]]) -> list[str] | None:
    """Return the texts behind headings, each with its start and end; None where one is empty."""
    ends = [*(start for start, _ in headings[1:]), len(reply)]
    critiques = [reply[begin:end].strip() for (_, begin), end in zip(headings, ends, strict=True)]
    return critiques if all(critiques) else None


def verdict_in(reply: str) -> bool | None:
    """Return whether the last verdict in a reply is ``correct``."""
    found = VERDICT.findall(reply)
    return found[-1].lower() == "correct" if found else None
