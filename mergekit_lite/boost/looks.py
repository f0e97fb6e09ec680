"""When a candidate is looked at while it is measured, and how often looking may err."""

from __future__ import annotations

FIRST_LOOK = 32  # items, at least, before anything is said
LOOKS = 4  # at an eighth, a quarter, half and all of the items


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
