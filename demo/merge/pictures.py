"""Right answers of every way to one model, and what it gains over the plain average of its group."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from demo.distill.comparison import interval
from demo.distill.results import Measured
from demo.report import BLUE, GREEN, GREY, ORANGE, Interval


def ways(groups: Mapping[str, Sequence[Measured]], over: Mapping[str, Interval], picture: Path) -> None:
    """Draw a line for each model: its share with a mark for each seed, and its paired difference with an interval.

    ``over`` has the differences in points, by the models' keys; others have none, and are grey.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    lines = [line for name, group in groups.items() for line in (name, *group)]
    figure, (shares, gains) = plt.subplots(
        1, 2, sharey=True, figsize=(11, 0.8 + 0.22 * len(lines)), width_ratios=(1, 1.3), layout="constrained"
    )
    shares.set(title="Right answers, all and by seed", xlabel="right answers (%)", xlim=(-3, 103))
    gains.set(title="Over the plain average of its group, paired", xlabel="difference (points of right answers)")
    gains.axvline(0, color=GREY, linewidth=1)
    style = {"fmt": "o", "markersize": 4, "capsize": 2, "linewidth": 1.3}
    for place, line in enumerate(lines):
        if isinstance(line, str):
            continue
        gained = over.get(line.key)
        colour = colour_of(gained)
        share = interval(line.right)
        reach = [[100 * (share.value - max(share.low, 0))], [100 * (min(share.high, 1) - share.value)]]
        shares.errorbar([100 * share.value], [place], xerr=reach, color=colour, **style)
        shares.plot([100 * fmean(row) for row in line.right], [place] * len(line.right), "|", color=colour, alpha=0.7)
        if gained is not None:
            reach = [[gained.value - gained.low], [gained.high - gained.value]]
            gains.errorbar([gained.value], [place], xerr=reach, color=colour, **style)
    shares.set_yticks(range(len(lines)), [line if isinstance(line, str) else line.name for line in lines], fontsize=8)
    for line, label in zip(lines, shares.get_yticklabels(), strict=True):
        label.set_fontweight("bold" if isinstance(line, str) else "normal")
    shares.set_ylim(len(lines) - 0.3, -0.7)  # from the top down
    for axes in (shares, gains):
        axes.grid(axis="x", color="0.9")
        axes.tick_params(axis="y", length=0)
        axes.spines[["top", "right", "left"]].set_visible(False)
    figure.savefig(picture, dpi=110)
    plt.close(figure)


def colour_of(gained: Interval | None) -> str:
    """Return green for what is beyond noise better than the average, orange for worse, blue between, grey for none."""
    if gained is None:
        return GREY
    return GREEN if gained.low > 0 else ORANGE if gained.high < 0 else BLUE
