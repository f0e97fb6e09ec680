"""Intervals of differences that were measured with a few seeds on many prompts."""

from collections.abc import Sequence
from math import sqrt
from statistics import fmean, variance

from demo.report import Interval

Table = Sequence[Sequence[float]]  # [seeds, prompts]: what each model of a road got for each prompt

# Student's t at 97.5 %, for 1, 2, … 9 degrees of freedom; for more the expansion below is right to three digits.
QUANTILES = (12.706, 4.303, 3.182, 2.776, 2.571, 2.447, 2.365, 2.306, 2.262)
Z = 1.959964


def interval(table: Table) -> Interval:
    """Return the mean with a 95 % interval over other seeds and other prompts.

    Two things are drawn at random, seeds and prompts, and each is crossed with the other. The variances of the mean
    that either alone would explain are added, which counts what is left over twice: the interval is rather too wide.
    Its t has the degrees of freedom of such a sum (Welch and Satterthwaite): three seeds that disagree count as three
    observations, however many prompts there are. With one seed the interval speaks of prompts only.
    """
    by_prompt = [fmean(column) for column in zip(*table, strict=True)]
    parts = [(variance(by_prompt) / len(by_prompt), len(by_prompt) - 1)]
    if len(table) > 1:
        parts.append((variance([fmean(row) for row in table]) / len(table), len(table) - 1))
    middle, total = fmean(by_prompt), sum(part for part, _ in parts)
    if total == 0:
        return Interval(middle, middle, middle)
    freedom = total**2 / sum(part**2 / degrees for part, degrees in parts)
    reach = t_quantile(freedom) * sqrt(total)
    return Interval(middle, middle - reach, middle + reach)


def gain(table: Table, over: Table) -> Interval:
    """Return the difference of two roads, paired by seed and prompt, so that what is hard for both cancels out.

    A model that was made once, such as the target before training, stands beside every seed.
    """
    seeds = max(len(table), len(over))
    pairs = zip(spread(table, seeds), spread(over, seeds), strict=True)
    return interval([[a - b for a, b in zip(*rows, strict=True)] for rows in pairs])


def spread(table: Table, seeds: int) -> Table:
    return list(table) * seeds if len(table) == 1 else table


def t_quantile(freedom: float) -> float:
    """Student's t at 97.5 %, with the degrees of freedom rounded down (Fisher's expansion in 1 / freedom beyond 9)."""
    whole = int(freedom)
    if whole <= len(QUANTILES):
        return QUANTILES[max(whole, 1) - 1]
    return Z + (Z**3 + Z) / (4 * whole) + (5 * Z**5 + 16 * Z**3 + 3 * Z) / (96 * whole**2)
