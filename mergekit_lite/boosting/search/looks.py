"""When a candidate is looked at while it is measured, and how often looking may err."""

from __future__ import annotations

FIRST_LOOK = 32  # items, at least, before anything is said
LOOKS = 4  # at an eighth, a quarter, half and all of the items
PORTION = 64  # answers, at most, unless a batch is larger


def portion(total: int, batch_size: int) -> int:
    """How many answers are made one batch after the other before the next ones are begun.

    Looks, and the end of the search's items, are at whole portions, so that no answer is made that isn't wanted. Within
    a portion prompts of like length lie side by side; so it has several batches, where there are items enough.
    """
    return batch_size * max(1, min(PORTION, total // (1 << LOOKS - 1)) // batch_size)


def looks(total: int, batch: int = 1) -> list[int]:
    """How many items are measured before each look at a candidate; the last is all.

    Doubling from an eighth of the total, in whole batches, and not before ``FIRST_LOOK``.
    """
    sizes = {total}
    for halvings in range(1, LOOKS):
        size = -(-(total >> halvings) // batch) * batch
        if FIRST_LOOK <= size < total:
            sizes.add(size)
    return sorted(sizes)


def shared_confidence(confidence: float, number: int) -> float:
    """What each of ``number`` intervals is held to so that all together err as seldom as one at ``confidence``.

    Bonferroni's bound: it holds whatever depends on what, and costs little for four looks.
    """
    return 1 - (1 - confidence) / number
