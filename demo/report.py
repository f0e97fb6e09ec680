"""The results of the demo: shares with intervals, a table, a sentence, and the curve over alpha."""

from collections.abc import Sequence
from dataclasses import dataclass
from math import sqrt
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, NamedTuple

from rich.table import Table

Z = 1.96  # the normal quantile that makes every interval here a 95 % one
BLUE, ORANGE, GREEN, GREY = "#0072b2", "#d55e00", "#009e73", "#777777"


class Interval(NamedTuple):
    value: float
    low: float
    high: float


@dataclass(frozen=True)
class Score:
    """One model's answers question by question, so that two models can be compared on the same questions."""

    name: str
    alpha: float  # the SFT model is alpha -1, the aligned one alpha 0
    right: tuple[bool, ...]
    worked: tuple[bool, ...]  # worked out step by step, not blurted
    ended: tuple[bool, ...]  # by the model, not by the limit on its length
    length: tuple[int, ...]  # characters

    def part(self, which: slice) -> "Score":
        """Return the score on some of the questions."""
        columns = (self.right, self.worked, self.ended, self.length)
        return Score(self.name, self.alpha, *(column[which] for column in columns))


def share(flags: Sequence[bool]) -> Interval:
    """Return a share with Wilson's interval, which stays sensible at 0 % and 100 %."""
    n, p = len(flags), fmean(flags)
    middle = (p + Z * Z / (2 * n)) / (1 + Z * Z / n)
    reach = Z * sqrt(p * (1 - p) / n + Z * Z / (4 * n * n)) / (1 + Z * Z / n)
    return Interval(p, min(p, middle - reach), max(p, middle + reach))  # the bounds of 0 % and 100 % are exact


def mean(values: Sequence[float]) -> Interval:
    middle, reach = fmean(values), Z * stdev(values) / sqrt(len(values))
    return Interval(middle, middle - reach, middle + reach)


def gain(score: Score, over: Score) -> Interval:
    """Return the difference in right answers, paired by question, so that what is hard for both models cancels out."""
    return mean([a - b for a, b in zip(score.right, over.right, strict=True)])


def verdict(chosen: Score, aligned: Score) -> str:
    """Return the result in one sentence. ``chosen`` must have been picked on other questions than these."""
    points = Interval(*(100 * bound for bound in gain(chosen, aligned)))
    numbers = (
        f"{share(chosen.right).value:.1%} right against {share(aligned.right).value:.1%} at alpha 0, "
        f"{points.value:+.1f} points [{points.low:.1f}, {points.high:.1f}]"
    )
    if points.low > 0:
        return f"Extrapolation helps: with alpha {chosen.alpha:g}, {numbers}."
    if points.high < 0:
        return f"Extrapolation hurts: even with the best alpha, {chosen.alpha:g}, {numbers}."
    return f"No alpha beats the DPO model beyond its interval: with {chosen.alpha:g}, the best, {numbers}."


def table(scores: Sequence[Score], aligned: Score, chosen: Score) -> Table:
    names = {-1: "SFT ", 0: "DPO "}
    grid = Table(box=None, header_style="bold", padding=(0, 1, 0, 0))
    for heading in ("alpha", "right %", "", "gain", "", "worked %", "ended %", "length"):
        grid.add_column(heading, justify="right" if heading else "left", no_wrap=True)
    for score in scores:
        right, over = share(score.right), gain(score, aligned)
        grid.add_row(
            f"{names.get(score.alpha, '')}{score.alpha:g}",
            f"{100 * right.value:.1f}",
            f"({100 * right.low:.1f}, {100 * right.high:.1f})",
            "" if score is aligned else f"{100 * over.value:+.1f}",
            "" if score is aligned else f"({100 * over.low:+.1f}, {100 * over.high:+.1f})",
            f"{100 * fmean(score.worked):.1f}",
            f"{100 * fmean(score.ended):.1f}",
            f"{fmean(score.length):.1f}",
            style="bold green" if score is chosen else None,
        )
    return grid


def as_data(score: Score, aligned: Score) -> dict[str, Any]:
    """Return the row of the table with all its digits."""
    return {
        "model": score.name,
        "alpha": score.alpha,
        "questions": len(score.right),
        "right": share(score.right)._asdict(),
        "gain_over_alpha_0": gain(score, aligned)._asdict(),
        "worked": share(score.worked)._asdict(),
        "ended": share(score.ended)._asdict(),
        "characters": mean(score.length)._asdict(),
    }


def draw(scores: Sequence[Score], chosen: Score, picture: Path) -> None:
    """Right answers over alpha, and below them how the answers change: their habits and their length."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    alphas = [score.alpha for score in scores]
    aligned = next(score for score in scores if score.alpha == 0)
    style = {"capsize": 3, "marker": "o", "markersize": 5, "linewidth": 1.6}

    def curve(axes: Any, points: list[Interval], color: str, **kind: Any) -> None:
        reach = [[p.value - p.low for p in points], [p.high - p.value for p in points]]
        axes.errorbar(alphas, [p.value for p in points], reach, color=color, **style, **kind)

    def percent(flags: Sequence[bool]) -> Interval:
        return Interval(*(100 * bound for bound in share(flags)))

    figure, (quality, habits, length) = plt.subplots(
        3, sharex=True, figsize=(8, 8.5), height_ratios=(2.2, 1, 1), layout="constrained"
    )
    figure.suptitle("Past the end of an early-stopped DPO: right answers over alpha", fontsize=14)

    curve(quality, [percent(score.right) for score in scores], BLUE)
    level = percent(aligned.right).value
    quality.axhline(level, color=GREY, linestyle=":", linewidth=1.2)
    quality.set(ylabel="right answers (%)", ylim=(0, None))
    for score, label, offset in (
        (scores[0], "SFT", (8, -16)),
        (aligned, "DPO", (8, -16)),
        (chosen, f"ExPO, alpha {chosen.alpha:g}", (0, 14)),
    ):
        value = percent(score.right).value
        quality.annotate(
            f"{label}\n{value:.1f} %" if score is chosen else f"{label} {value:.1f} %",
            (score.alpha, value),
            xytext=offset,
            textcoords="offset points",
            ha="center" if score is chosen else "left",
        )

    curve(habits, [percent(score.worked) for score in scores], ORANGE, label="worked out step by step")
    curve(habits, [percent(score.ended) for score in scores], GREEN, label="ended by the model itself")
    top = quality.get_ylim()[1]
    quality.set_ylim(0, 1.12 * top)  # the label of the highest point is above it
    quality.text(-0.5, 0.04 * top, "trained", color=GREY, ha="center", va="bottom")
    quality.text(0.1, 0.04 * top, "extrapolated: no training", color=GREY, ha="left", va="bottom")
    habits.set(ylabel="answers (%)", ylim=(0, 108))
    habits.legend(loc="lower right", frameon=False)

    curve(length, [mean(score.length) for score in scores], GREY)
    length.set(
        ylabel="length (characters)",
        ylim=(0, None),
        xlabel="alpha (multiples of DPO − SFT beyond DPO; linear up to 1, then logarithmic)",
    )

    for axes in (quality, habits, length):
        axes.axvspan(-1, 0, color="0.94", zorder=0)
        axes.grid(axis="y", color="0.88")
        axes.spines[["top", "right"]].set_visible(False)
    length.set_xscale("symlog", base=2, linthresh=1)
    length.set_xticks(alphas, [f"{alpha:g}" for alpha in alphas], minor=False)
    length.set_xticks([], minor=True)
    figure.align_ylabels()
    figure.savefig(picture, dpi=150)
    plt.close(figure)
