"""What a distillation came to, in figures and in sentences that follow from them."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from statistics import fmean
from typing import Any

from mergekit_lite.answers.intervals import Interval
from mergekit_lite.distillation import curves
from mergekit_lite.distillation.curves import Log, Picture
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.held_out import CUT, LENGTH, Comparison, Model
from mergekit_lite.distillation.recipe import Recipe
from mergekit_lite.errors import counted

STAGES = ("sft", "preference")
NAMES: Mapping[Model, str] = {
    "untrained": "the target as it was",
    "sft": "the SFT model",
    "preference": "the preference model",
}
LONGER = 1.1  # times the length, from which it is told
FEW = 30  # prompts
MANY_CUT = 0.02  # share of answers
CAN_NOT_TELL = (
    "An interval tells what other prompts of this kind would have given. It knows nothing of another run of training: "
    "only runs with other seeds tell how far those differ.",
    "A scorer that also chose the training data favours what was learnt from it. One that had no part in them, or "
    "people, are better judges.",
    "Many scorers favour long answers. A higher score of longer answers may be that alone.",
    "A skill without held-out prompts here may have suffered unseen.",
)


@dataclass(frozen=True)
class Findings:
    """Everything the report is made of.

    Attributes:
        recipe: what was done.
        logs: of each stage of training that has one.
        table: of the pair stage, as its JSON has it.
        comparison: on held-out prompts, where there are any.
    """

    recipe: Recipe
    logs: Mapping[str, Log]
    table: Mapping[str, Any] | None
    comparison: Comparison | None

    @property
    def pictures(self) -> list[Picture]:
        """All that there is something to draw for."""
        drawn = [curves.held_out(self.comparison)] if self.comparison is not None else []
        trained = (curves.training(stage, self.logs.get(stage, [])) for stage in STAGES)
        return [*drawn, *(picture for picture in trained if picture is not None)]

    @property
    def said(self) -> list[str]:
        """What follows from the figures."""
        return [*_of_comparison(self.comparison), *_of_training(self.logs)]

    def to_json(self) -> dict[str, Any]:
        """All figures; what is not a finite number is null."""
        return {
            "target": self.recipe.target,
            "seed": self.recipe.seed,
            "rule": self.recipe.pairs.rule,
            "objective": self.recipe.train.preference.objective if self.recipe.train.preference else None,
            "said": self.said,
            "held_out": _comparison_json(self.comparison),
            "pairs": self.table,
            "training": {stage: {"first": log[0], "last": log[-1]} for stage, log in self.logs.items() if log},
        }


def gathered(recipe: Recipe, comparison: Comparison | None) -> Findings:
    """The findings in a recipe's folder."""
    folder = Folder(recipe.folder)
    logs = {stage: curves.read_log(folder.trained(stage) / "log.jsonl") for stage in STAGES}
    path = folder.root / "pairs" / "table.json"
    table = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
    return Findings(recipe, {stage: log for stage, log in logs.items() if log}, table, comparison)


def with_ends(of: Interval, signed: bool = False) -> str:
    """``0.012 [0.010, 0.015]``: a mean and its interval, in as many digits as tell something."""
    if not math.isfinite(of.mean):
        return "–"
    ends = (of.mean, of.low, of.high) if math.isfinite(of.low) else (of.mean,)
    mean, *around = (_number(end, of, "+" if signed else "") for end in ends)
    return f"{mean} [{', '.join(around)}]" if around else mean


def _number(value: float, of: Interval, sign: str) -> str:
    """With so many digits that the interval's half width has two."""
    half = (of.high - of.low) / 2
    if not math.isfinite(half) or half <= 0:
        return f"{value:{sign},.4g}".replace("-", "−")
    digits = min(max(1 - math.floor(math.log10(half)), 0), 6)
    return f"{value:{sign},.{digits}f}".replace("-", "−")


def _of_comparison(comparison: Comparison | None) -> Iterator[str]:
    if comparison is None:
        yield "No model was compared: the recipe has no held-out prompts (`report.prompts`)."
        return
    for scorer in comparison.scorers:
        yield from _winner(comparison, scorer)
    if len(comparison.prompts) < FEW:
        prompts = counted(len(comparison.prompts), "prompt")
        yield f"With only {prompts} all intervals are rough: too narrow, if anything."
    lengths = {model: comparison.mean(model, LENGTH).mean for model in comparison.answered}
    first, before = next(iter(lengths.items()))
    for model, length in lengths.items():
        if model != first and before > 0 and not 1 / LONGER < length / before < LONGER:
            yield (
                f"The answers of {NAMES[model]} have {length / before:.2f} times the length of those of "
                f"{NAMES[first]} ({length:,.0f} and {before:,.0f} characters)."
            )
    cut = {model: comparison.mean(model, CUT).mean for model in comparison.answered}
    if max(cut.values()) > MANY_CUT:
        shares = ", ".join(f"{100 * share:.1f} % of {NAMES[model]}" for model, share in cut.items())
        yield f"Of the answers the limit of tokens cut off {shares}."


def _winner(comparison: Comparison, scorer: str) -> Iterator[str]:
    """Which model a scorer has in front, and by how much."""
    means = {model: comparison.mean(model, scorer).mean for model in comparison.answered}
    known = [model for model, mean in means.items() if math.isfinite(mean)]
    if len(known) < 2:
        yield f"{scorer} has no verdicts to compare."
        return
    best = max(known, key=lambda model: means[model])
    parts = []
    for other in known:
        if other != best:
            ahead = comparison.against(best, other, scorer)
            noise = "beyond noise" if ahead.above else "within noise"
            parts.append(f"{with_ends(ahead, signed=True)} against {NAMES[other]} ({noise})")
    yield f"By {scorer}, {NAMES[best]} is first: {', '.join(parts)}."


def _of_training(logs: Mapping[str, Log]) -> Iterator[str]:
    log = logs.get("preference", ())
    last = log[-max(1, len(log) // 10) :]  # one step's few rows tell little

    def ended(figure: str) -> float | None:
        values = [row[figure] for row in last if figure in row]
        return fmean(values) if values else None

    if (accuracy := ended("accuracy")) is not None:
        yield (
            f"In the last tenth of preference training the chosen answers were above the rejected ones in "
            f"{100 * accuracy:.1f} % of the rows."
        )
    fallen = [role for role in ("source", "target") if (ended(f"rewards/{role}") or 0) < 0]
    if fallen:
        names = " and ".join(f"the {role}'s" for role in fallen)
        yield (
            f"The rewards of chosen answers ({names}) ended below 0: they became less probable, only less so than the "
            "rejected ones. That is common in DPO; a smaller learning rate or an NLL term holds against it."
        )


def _comparison_json(comparison: Comparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None
    figures = [*comparison.scorers, LENGTH, CUT]
    return {
        "prompts": len(comparison.prompts),
        "models": {
            model: {figure: _interval_json(comparison.mean(model, figure)) for figure in figures}
            for model in comparison.answered
        },
        "domains": {
            domain: {
                model: {figure: _interval_json(comparison.mean(model, figure, domain)) for figure in figures}
                for model in comparison.answered
            }
            for domain in comparison.domains
        },
        "differences": [
            {
                "after": one.after,
                "before": one.before,
                "figure": one.figure,
                **_interval_json(one.of),
                "beyond_noise": one.beyond_noise,
            }
            for one in comparison.differences
        ],
    }


def _interval_json(of: Interval) -> dict[str, Any]:
    ends = {"mean": of.mean, "low": of.low, "high": of.high}
    return {**{key: value if math.isfinite(value) else None for key, value in ends.items()}, "prompts": of.items}
