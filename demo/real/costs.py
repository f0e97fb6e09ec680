"""What nothing was trained for, so that costs show: small sums, and a text to read.

The text is Python's own reference, which lies on every machine that runs this.
"""

import random
from typing import Any


def sums(count: int) -> list[dict[str, Any]]:
    """Return ``count`` different sums of two numbers below 100, with their results."""
    rng = random.Random("sums")
    pairs = [(a, b) for a in range(2, 100) for b in range(2, 100)]
    return [
        {"id": f"{a}+{b}", "prompt": f"What is {a} + {b}? Answer with the number.", "reference": str(a + b)}
        for a, b in rng.sample(pairs, count)
    ]


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
