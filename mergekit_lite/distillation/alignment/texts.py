"""The texts that two tokenizers are compared on: the user's, or some of every kind."""

from __future__ import annotations

import re
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from mergekit_lite.answers.data_files import Data, rows_of
from mergekit_lite.answers.rows import Message
from mergekit_lite.answers.template import QUESTION
from mergekit_lite.distillation.data.examples import example_of
from mergekit_lite.errors import UnreadableError, UsageError, listing
from mergekit_lite.input_files import read_text

PLAIN = (".txt", ".md")
MOST_TEXT = 1_000_000_000  # bytes
PARAGRAPH = re.compile(r"(?<=\n\n)(?=\S)")


class Response(NamedTuple):
    """A text as an answer."""

    messages: tuple[Message, ...]
    text: str
    cut: bool = False


def responses_of(path: Path | None) -> Iterator[Response]:
    """Yield the answers of a file of training data, the rows' ``text``, or the paragraphs of plain text.

    Raises:
        UsageError: the file can't be read, or has rows that are none; all are named.
    """
    if path is None:
        yield from (Response(QUESTION, text) for text in SAMPLES)
    elif path.suffix in PLAIN:
        try:
            whole = read_text(path, MOST_TEXT)
        except UnreadableError as error:
            raise UsageError(f"Can't read {path}: {error.reason}.") from error
        yield from (Response(QUESTION, text) for text in PARAGRAPH.split(whole) if text.strip())
    else:
        yield from _of_rows(path)


def _of_rows(path: Path) -> Iterator[Response]:
    problems: list[str] = []
    for row, place in rows_of(Data(path=path), problems):
        text = row.get("text")
        if isinstance(text, str):
            yield Response(QUESTION, text)
            continue
        try:
            example = example_of(row)
        except ValueError as error:
            problems.append(f"{place}: {error}")
            continue
        yield from (Response(example.prompt.messages, given.text, given.cut) for given in example.all)
    if problems:
        raise UsageError(listing(f"{path} has rows that are no texts", problems))


SAMPLES = (
    "The old lighthouse keeper counted the ships again: twenty-three, and none of them was hers.",
    "Of course! Here's what I'd do:\n\n1. **Measure** first.\n2. Change *one* thing.\n\nIt's dull, but it works.",
    "In 2024 the town had 1,234,567 inhabitants, 12.5 % more than in 1999; that is about 0.0486 per year, or 3e-2.",
    "So 48 / 2 = 24 clips in May, and 48 + 24 = 72 altogether.\n\n#### 72",
    "Let $f(x) = \\frac{1}{2}x^2 - 3x$. Then $f'(x) = x - 3$, which vanishes at $x = 3$, so \\boxed{3}.",
    "```python\ndef mean(values: list[float]) -> float:\n    if not values:\n        raise ValueError('empty')\n"
    "    return sum(values) / len(values)\n```",
    '{"name": "get_weather", "arguments": {"city": "Zürich", "unit": "celsius", "days": [1, 2, 3]}}',
    "#include <stdio.h>\n\nint main(void) {\n\tfor (int i = 0; i < 10; ++i) {\n\t\tputchar('0' + i);\n\t}\n}\n",
    "SELECT name, COUNT(*) AS n FROM orders WHERE price >= 9.99 GROUP BY name ORDER BY n DESC LIMIT 10;",
    "Die Größe der Überraschung ließ sich nicht messen; wir haben's trotzdem versucht.",
    "L'été dernier, nous avons vu la mer à Saint-Malo : c'était très beau, n'est-ce pas ?",
    "Мы вышли из дома рано утром, когда на улице ещё никого не было.",
    "今天的天气很好，我们去公园散步，然后喝一杯绿茶。",
    "昨日は友だちと一緒に新しいカフェでコーヒーを飲みました。",
    "وصلنا إلى المدينة عند غروب الشمس وكان السوق ما يزال مفتوحا.",
    "आज सुबह बारिश हुई, इसलिए हम घर पर ही रहे।",
    "Congratulations!! 🎉🎉 See you at 7 p.m. 👩‍🍳🍕 (bring a friend 🇨🇭)",
)
