"""What models say of drafts, read from their replies; None where a reply has nothing that can be used."""

from __future__ import annotations

import re

NUMBERED = r"(?:\[\s*\d+\s*\]|\d+)"
SEVERAL = rf"{NUMBERED}(?:\s*>\s*{NUMBERED})+"
ONE = rf":\W*?{NUMBERED}(?=[ \t.*_]*$)"  # alone on its line: neither "ranking 3 responses" nor "Ranking:\n1. [2]"
RANKING = re.compile(rf"\branking\W*?({SEVERAL}|{ONE})", re.IGNORECASE | re.MULTILINE)
VERDICT = re.compile(r"\bverdict[^\w.]*(correct|incorrect)\b", re.IGNORECASE)  # in one sentence


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

    A number at the start of a line is a heading only where it is the next one: critiques name other drafts, too. So
    numbers alone on their lines come first.
    """
    return _critiques(reply, drafts, r"[*_:]*\s*$") or _critiques(reply, drafts, "[*_:]*")


def _critiques(reply: str, drafts: int, end: str) -> list[str] | None:
    """Return the critiques under headings whose numbers have such an end behind them."""
    critiques: list[str] = []
    rest = reply
    for number in range(1, drafts + 1):
        heading = re.search(rf"^\W*\[{number}\]{end}", rest, re.MULTILINE)
        if heading is None:
            return None
        if number > 1:
            critiques.append(rest[: heading.start()].strip())
        rest = rest[heading.end() :]
    critiques.append(rest.strip())
    return critiques if all(critiques) else None


def verdict_in(reply: str) -> bool | None:
    """Return whether the last verdict in a reply is ``correct``."""
    found = VERDICT.findall(reply)
    return found[-1].lower() == "correct" if found else None
