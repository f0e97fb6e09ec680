"""Suggestions: what the figures of a comparison suggest in words, and what they can't tell."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import combinations
from statistics import median

from mergekit_lite.comparison.comparison import BANDS, Comparison, letter, looks_like
from mergekit_lite.comparison.run_path import path_of
from mergekit_lite.comparison.survey import LEAST_SAMPLE, SAMPLE_COLUMNS, SAMPLE_ROWS
from mergekit_lite.errors import counted

ALIKE, RELATED, APART = 0.9, 0.3, 0.1  # cosines from which deltas are called so
ALPHA_TOLERANCE = 0.2  # relative distance from the asked to the effective alpha that is mentioned
LOW_RANK = 8.0  # median stable rank below which a change is called low

CAN_NOT_TELL = (
    "None of this measures what a model can do. Deltas of equal size may matter a lot or not at all, and two that "
    "point in different directions may still disturb each other in the activations.",
    "A low cosine says that different weights moved, or moved differently, not that different things were learnt.",
    "Choose by measuring: merge, extrapolate, and score the results on questions of your own.",
)


def suggestions(comparison: Comparison) -> list[str]:
    """Return what the figures suggest, a sentence or two each."""
    return [
        *_sizes(comparison),
        *(_path(comparison) if comparison.steps else _directions(comparison)),
        *_rounding(comparison),
        *_places(comparison),
        *_ranks(comparison),
        *_doubts(comparison),
    ]


def how(comparison: Comparison) -> str:
    """Say which figures are exact, and which are from a sample."""
    if comparison.whole:
        return "All figures are from every weight."
    return (
        "Norms, RMS, shares of changed elements, cosines, signs and VaRM are from every weight. Overlap, effective "
        "alpha, sizes, stable rank, and SCE where it selects, are from a fixed grid of rows and columns, "
        f"{LEAST_SAMPLE:,} to {SAMPLE_ROWS * SAMPLE_COLUMNS:,} weights of each larger tensor. The stable rank is that "
        "of the grid, which is smaller than the whole tensor's where that is high."
    )


def figure(value: float | None, form: str) -> str:
    """Format a figure, −0 as 0; a dash for None."""
    text = "–" if value is None else format(value, form)
    return text if text.strip("-0.") else text.removeprefix("-")


def percent(share: float | None) -> str:
    """Format a share as ``66.5 %``; a dash for None."""
    return "–" if share is None else f"{100 * share:.1f} %"


def _sizes(comparison: Comparison) -> Iterator[str]:
    overall = comparison.overall
    for number in comparison.shown:
        rms, changed = overall.rms[number], overall.changed[number]
        what = looks_like(rms)
        name = letter(number)
        if rms == 0:
            yield f"{name} has the very weights of the base: there is nothing to merge or to extrapolate."
        elif rms is not None:
            yield f"{name} differs from the base in {percent(changed)} of its weights, RMS {rms:.1e}: {what}, by size."
    if any(rms for rms in overall.rms):
        yield BANDS


def _directions(comparison: Comparison) -> Iterator[str]:
    overall = comparison.overall
    for i, j in combinations(range(len(comparison.models)), 2):
        cosine, conflict = overall.cosine[i][j], overall.conflict[i][j]
        if cosine is None:
            continue
        names = f"{letter(i)} and {letter(j)}"
        if cosine > ALIKE:
            said = "went nearly the same way: one is much like the other scaled, and a merge adds little new"
        elif cosine > RELATED:
            said = "share a direction: summed up, what they share is counted twice; averages and elections fit"
        elif cosine > APART:
            said = "have a little in common"
        elif cosine >= -APART:
            said = "went nearly orthogonal ways: their deltas can be added with little interference by this measure"
        else:
            said = "pull against each other: expect a merge to undo some of both"
        yield (
            f"{names} {said} (cosine {figure(cosine, '.2f')}; of the weights that both changed, "
            f"{percent(conflict)} moved in opposite directions, 50 % would be chance)."
        )


def _path(comparison: Comparison) -> Iterator[str]:
    path = path_of(comparison)
    if path.is_line is None:
        return
    share, bound = percent(path.explained[-1]), percent(path.bound[-1])
    if path.is_line:
        yield (
            f"One line explains {share} of the checkpoints' variance. From {bound} on, at these steps, it is a licence "
            "to follow it: extrapolate --to-step, or boost --tune to_step=LOW:HIGH to measure how far."
        )
    else:
        yield (
            f"One line explains {share} of the checkpoints' variance. Below {bound}, at these steps, the run wandered "
            "further than it went in any direction: don't follow it, average its end (merge_method: schedule_average)."
        )
    turns = [turn for turn in path.turn if turn is not None]
    if turns:
        yield (
            f"An update and the one before it have a cosine of {figure(median(turns), '.2f')} in the median: "
            + ("the run still goes one way." if median(turns) > RELATED else "each goes a way of its own.")
        )


def _rounding(comparison: Comparison) -> Iterator[str]:
    settings, overall = comparison.settings, comparison.overall
    for dtype, of_dtype in zip(settings.dtypes, overall.effective, strict=True):
        far = [
            f"{alpha:g} of {letter(number)} becomes {effective:.3f}"
            for alpha, row in zip(settings.alphas, of_dtype, strict=True)
            for number in comparison.shown
            if (effective := row[number]) is not None and abs(effective - alpha) > ALPHA_TOLERANCE * abs(alpha)
        ]
        if far:
            yield (
                f"Extrapolated and rounded to {dtype}, alpha {', '.join(far[:4])}{' …' if len(far) > 4 else ''}: many "
                "changes are smaller than the dtype's spacing. Stochastic rounding or float32 output keeps alpha."
            )


def _places(comparison: Comparison) -> Iterator[str]:
    layers = comparison.layers
    if len(layers) < 3:
        return
    for number in comparison.shown:
        by_size = sorted(((figures.rms[number] or 0.0), name) for name, figures in layers.items())
        (least, lowest), (most, highest) = by_size[0], by_size[-1]
        if most > 2 * least > 0:
            yield (
                f"{letter(number)} changed {highest} most (RMS {most:.1e}) and {lowest} least ({least:.1e}): "
                "weights that differ by layer may fit better than one for all."
            )


def _ranks(comparison: Comparison) -> Iterator[str]:
    low = [
        f"{letter(number)} (median {rank:.1f})"
        for number in comparison.shown
        if (rank := comparison.overall.stable_rank[number]) is not None and rank < LOW_RANK
    ]
    if low:
        yield (
            f"Low stable rank: {', '.join(low)}. Few directions hold most of the change, as after LoRA or a short "
            "training."
        )


def _doubts(comparison: Comparison) -> Iterator[str]:
    if bad := comparison.nonfinite:
        yield f"{counted(len(bad), 'tensor')} with NaN or infinity left out of all totals, for instance {bad[0]}."
    if comparison.unmatched:
        yield f"{counted(len(comparison.unmatched), 'tensor')} not compared: see the list."
    yield from comparison.notes
