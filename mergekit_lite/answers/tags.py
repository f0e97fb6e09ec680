"""Words with fields for texts of others, and tags around these, which none of the texts can end or imitate."""

from __future__ import annotations

import re
from collections.abc import Collection
from string import Formatter

TAG = re.compile(r"<(/?)([A-Za-z][\w-]*)>")


def end_of_tags(tags: Collection[str], texts: Collection[str]) -> str:
    """Return what to put behind the names of tags, so that no text has such a tag: nothing, or a number."""
    names = "|".join(map(re.escape, tags))
    ends = ("", *(f"-{number}" for number in range(2, 2 + sum(text.count("<") for text in texts))))
    return next(
        end
        for end in ends
        if not any(re.search(rf"<\s*/?\s*(?:{names}){end}(?![\w-])", text, re.IGNORECASE) for text in texts)
    )


def fields_of(words: str) -> list[str]:
    """Return the fields in braces that some words have. Raises ValueError where braces are more than a field's name."""
    try:
        found = [part for part in Formatter().parse(words) if part[1] is not None]
    except ValueError as error:
        raise ValueError(f"{error}: braces that are meant as such are written twice") from error
    for _, name, form, conversion in found:
        if form or conversion:
            raise ValueError(f"the field {name!r} has {conversion or form!r} behind it: a field is a name in braces")
    return [str(name) for _, name, _, _ in found]


def filled(words: str, **texts: str) -> str:
    """Fill texts into the fields of some words. The words' tags get a number where a text has such a tag itself."""
    tags = dict.fromkeys(name for _, name in TAG.findall(words))
    end = end_of_tags(tags, texts.values()) if tags else ""
    return TAG.sub(rf"<\1\2{end}>", words).format(**texts)
