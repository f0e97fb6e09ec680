"""What nothing was trained for, so that costs show: small sums, and a text to read.

The text is Python's own reference, which lies on every machine that runs this.
"""

import random
import re
from typing import Any


def sums(count: int) -> list[dict[str, Any]]:
    """Return ``count`` different sums of two numbers from 2 to 20, with their results."""
    pairs = [(a, b) for a in range(2, 21) for b in range(2, 21)]
    return [
        {"id": f"{a}+{b}", "prompt": f"What is {a} + {b}? Answer with the number.", "reference": str(a + b)}
        for a, b in random.Random("sums").sample(pairs, count)
    ]


def right(prompts: list[str], completions: list[str], reference: list[str], **columns: Any) -> list[float]:
    """Score answers to sums: 1 where the first number that the question doesn't have is the result, else 0.

    So an answer may repeat the question, and what follows the result, which the limit may cut, doesn't count.
    """
    numbers = [re.findall(r"\d+", text) for text in completions]
    terms = [re.findall(r"\d+", asked) for asked in prompts]
    new = [next((n for n in found if n not in known), "") for found, known in zip(numbers, terms, strict=True)]
    return [float(first == result) for first, result in zip(new, reference, strict=True)]


def texts(count: int) -> list[dict[str, Any]]:
    """Return ``count`` paragraphs of 200 to 600 characters from Python's reference."""
    from pydoc_data.topics import topics

    paragraphs = [
        " ".join(paragraph.split())
        for _, text in sorted(topics.items())
        for paragraph in text.split("\n\n")
        if paragraph[:1].isupper() and paragraph.rstrip().endswith(".")
    ]
    fit = sorted({paragraph for paragraph in paragraphs if 200 <= len(paragraph) <= 600})
    return [{"text": text} for text in random.Random("texts").sample(fit, count)]
