"""Tags around texts of others, which none of these texts can end or imitate."""

from __future__ import annotations

import re
from collections.abc import Collection

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


def filled(words: str, **texts: str) -> str:
    """Fill texts into the fields of some words. The words' tags get a number where a text has such a tag itself."""
    tags = dict.fromkeys(name for _, name in TAG.findall(words))
    end = end_of_tags(tags, texts.values()) if tags else ""
    return TAG.sub(rf"<\1\2{end}>", words).format(**texts)
