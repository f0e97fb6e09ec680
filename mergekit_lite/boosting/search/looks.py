"""When a candidate is looked at while it is measured: interim analyses, and their share of the error.

A look is an interim analysis: a test on the items measured so far that may drop a candidate before all are measured.
"""

from __future__ import annotations

FIRST_LOOK = 32  # items, at least, before a candidate is judged
LOOKS = 4  # at an eighth, a quarter, half and all of the items
PORTION = 64  # answers, at most, unless a batch is larger


def portion(total: int, batch_size: int) -> int:
    """Return how many answers are generated, one batch after the other, before the next ones are begun.

    Looks, and the end of the search's items, are at whole portions, so that no unwanted answer is generated. Within a
    portion prompts of similar length share a batch; so it has several batches, where there are enough items.
    """
    return batch_size * max(1, min(PORTION, total // (1 << LOOKS - 1)) // batch_size)


def looks(total: int, batch: int = 1) -> list[int]:
    """Return how many items are measured before each look at a candidate; the last number is the total.

    They double from an eighth of the total, are whole batches, and begin at ``FIRST_LOOK``.
    """
    sizes = {total}
    for halvings in range(1, LOOKS):
        size = -(-(total >> halvings) // batch) * batch
        if FIRST_LOOK <= size < total:
            sizes.add(size)
    return sorted(sizes)


def shared_confidence(confidence: float, number: int) -> float:
    """Return the confidence of each of ``number`` intervals with which all together err as rarely as one interval.

    Bonferroni's bound: it holds for dependent intervals too, and costs little for four looks.
    """
    return 1 - (1 - confidence) / number
