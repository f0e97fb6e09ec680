"""Right answers of all models, by skill; and over alpha, past the end of each road."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import fmean

from demo.distill.comparison import interval
from demo.distill.plan import ALPHAS, ROADS
from demo.distill.results import TITLES, Measured, Results
from demo.distill.skills import SKILLS
from demo.report import BLUE, GREEN, GREY, ORANGE

COLOURS = {"dpo": BLUE, "wrpo": ORANGE, "fusechat3": GREEN}
LINES = {"dpo": "-", "wrpo": (0, (4, 4)), "fusechat3": "-"}  # DPO and WRPO may lie on each other


def models(
    measured: Sequence[Measured], domains: Sequence[str], picture: Path, colours: Mapping[str, str] = COLOURS
) -> None:
    """Draw a panel for all questions and one for each skill: a line for each model, with its interval and its seeds.

    ``colours`` are of roads; what belongs to none of them is grey.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    skills = ["all", *SKILLS]
    figure, panels = plt.subplots(
        1, len(skills), sharey=True, figsize=(12, 0.6 + 0.36 * len(measured)), width_ratios=(2, 1, 1, 1),
        layout="constrained",
    )  # fmt: skip
    places = list(range(len(measured)))[::-1]
    for axes, skill in zip(panels, skills, strict=True):
        chosen = [number for number, domain in enumerate(domains) if skill in ("all", domain)]
        for place, model in zip(places, measured, strict=True):
            table = model.on(chosen)
            found = interval(table)
            colour = next((colours[road] for road in colours if road in model.key), GREY)
            reach = [[100 * (found.value - max(found.low, 0))], [100 * (min(found.high, 1) - found.value)]]
            axes.errorbar(
                [100 * found.value], [place], xerr=reach, fmt="o", color=colour, markersize=6, capsize=3, linewidth=1.6
            )
            if len(table) > 1:
                seeds = [100 * fmean(row) for row in table]
                axes.plot(seeds, [place] * len(seeds), "|", color=colour, markersize=11, alpha=0.6)
        axes.set(title=skill, xlim=(-3, 103), xlabel="right answers (%)")
        axes.grid(axis="x", color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_yticks(places, [model.name for model in measured])
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def alphas(choosing: Results, chosen: dict[str, float], picture: Path) -> None:
    """Draw a curve for each road, from SFT at −1 through the end of training at 0."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 4.5), layout="constrained")
    for road in ROADS:
        curve = [choosing.stage(road, "sft"), choosing.stage(road, "preference")]
        curve += [choosing.expo(road, alpha) for alpha in ALPHAS]
        found = [interval(model.right) for model in curve]
        values = [100 * each.value for each in found]
        reach = [[100 * (e.value - e.low) for e in found], [100 * (e.high - e.value) for e in found]]
        at = [-1, 0, *ALPHAS]
        axes.errorbar(
            at,
            values,
            reach,
            color=COLOURS[road],
            marker="o",
            capsize=3,
            linewidth=1.6,
            linestyle=LINES[road],
            label=TITLES[road],
        )
        axes.plot(
            chosen[road], values[at.index(chosen[road])], "o", markersize=13, fillstyle="none", color=COLOURS[road]
        )
    axes.axvspan(-1, 0, color="0.94", zorder=0)
    axes.set_xscale("symlog", base=2, linthresh=1)
    ticks = [-1, 0, *ALPHAS]
    axes.set_xticks(ticks, ["SFT", "end", *(f"{alpha:g}" for alpha in ALPHAS)], minor=False)
    axes.set_xticks([], minor=True)
    axes.set(ylabel="right answers (%)", ylim=(0, None), xlabel="alpha; shaded: trained; circles: chosen")
    axes.grid(axis="y", color="0.9")
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
