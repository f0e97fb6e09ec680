"""Three pictures: what extrapolation gave, what it cost elsewhere, and what rounding leaves of alpha."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from demo.real.plan import ASKED
from demo.real.results import Candidate, Rounding
from demo.report import BLUE, GREEN, GREY, ORANGE
from mergekit_lite.answers.intervals import Interval

COLOURS = {"bfloat16": ORANGE, "float16": GREEN, "float32": BLUE}


def _figure(panels: int, height: float) -> tuple[Any, Any, Any]:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(panels, 1, figsize=(8, height), layout="constrained", sharex=True, squeeze=False)
    for each in axes[:, 0]:
        each.grid(axis="y", color="0.9")
        each.spines[["top", "right"]].set_visible(False)
    return plt, figure, axes[:, 0]


def _curve(axes: Any, measured: Sequence[Candidate], found: Sequence[Interval], scale: float, colour: str) -> None:
    middle = [scale * each.mean for each in found]
    reach = [[scale * (e.mean - e.low) for e in found], [scale * (e.high - e.mean) for e in found]]
    alphas = [each.alpha for each in measured]
    axes.errorbar(alphas, middle, reach, color=colour, marker="o", capsize=3, linewidth=1.6)


def _alphas(axes: Any, measured: Sequence[Candidate]) -> None:
    names = {-1: "−1\nreleased", 0: "0\nDPO"}
    alphas = [each.alpha for each in measured]
    axes.set_xticks(alphas, [names.get(alpha, f"{alpha:g}".replace("-", "−")) for alpha in alphas])
    axes.set_xlabel("alpha (no unit)")


def curve(measured: Sequence[Candidate], chosen: float | None, picture: Path) -> None:
    """Draw instructions followed over alpha, with lengths and cut answers below."""
    plt, figure, (upper, middle, lower) = _figure(3, 7.5)
    figure.suptitle("SmolLM2-135M-Instruct, DPO on its own answers, and past the end of it")
    _curve(upper, measured, [each.mean("followed") for each in measured], 100, BLUE)
    upper.set(ylabel="instructions followed (%)", ylim=(0, None))
    if chosen is not None and chosen in [each.alpha for each in measured]:
        upper.axvline(chosen, color=GREY, linestyle=":", label=f"chosen on dev: alpha {chosen:g}")
        upper.legend(frameon=False)
    alphas = [each.alpha for each in measured]
    middle.plot(alphas, [each.characters for each in measured], "o-", color=GREY)
    middle.set(ylabel="length (characters)", ylim=(0, None))
    lower.plot(alphas, [100 * each.cut for each in measured], "o-", color=ORANGE)
    lower.set(ylabel="cut at the limit (%)", ylim=(0, None))
    _alphas(lower, measured)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def costs(measured: Sequence[Candidate], released: Candidate, picture: Path) -> None:
    """Draw sums over alpha, and how much less likely than to the released model the text is."""
    plt, figure, (upper, lower) = _figure(2, 5.5)
    figure.suptitle("What it was not trained for")
    _curve(upper, measured, [each.mean("sums") for each in measured], 100, BLUE)
    upper.set(ylabel="right sums (%)", ylim=(0, None))
    _curve(lower, measured, [each.gain(released, "nll") for each in measured], 1, GREEN)
    lower.axhline(0, color="0.8")
    lower.set(ylabel="log-probability of Python's reference:\nchange (nats a token)")
    _alphas(lower, measured)
    figure.savefig(picture, dpi=130)
    plt.close(figure)


def effective(found: Rounding, picture: Path) -> None:
    """Draw the alphas that written models have over those that were asked for."""
    plt, figure, (axes,) = _figure(1, 4.8)
    for dtype, values in found.effective.items():
        axes.plot(ASKED, values, "o-", color=COLOURS[dtype], label=dtype, linewidth=1.6, markersize=4)
    axes.plot(ASKED, ASKED, color=GREY, linestyle=":", label="as asked")
    axes.axhline(-1, color="0.8")
    axes.text(ASKED[-1], -0.96, "the released model", ha="right", va="bottom", color=GREY)
    axes.set(
        title=f"What rounding leaves of alpha: RMS(delta) = {found.rms:.1e}",
        xlabel="alpha asked for (no unit)",
        ylabel="effective alpha of the written model",
    )
    axes.legend(frameon=False)
    figure.savefig(picture, dpi=130)
    plt.close(figure)
