"""Regular expressions in strangers' configs, which must not keep the matching busy."""

from __future__ import annotations

import re

MAX_PATTERN = 200
REPEAT, REPEATED_GROUP = re.compile(r"[*+{]"), re.compile(r"\)[*+{]")


def pattern_problem(pattern: str, repeats: int = 2) -> str | None:
    """Return what is wrong with a pattern, which has at most ``repeats`` repeats; None where nothing is."""
    try:
        re.compile(f"({pattern})")
    except (re.error, OverflowError, RecursionError) as error:
        return f"is not a regular expression ({error})"
    if len(pattern) > MAX_PATTERN or len(REPEAT.findall(pattern)) > repeats or REPEATED_GROUP.search(pattern):
        return "repeats too much to be matched safely. Write the modules' names out"
    return None
