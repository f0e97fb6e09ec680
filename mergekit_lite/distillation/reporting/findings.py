"""The results of a distillation, as figures and as sentences that follow from them."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean
from typing import Any, NamedTuple

from mergekit_lite.answers.intervals import Interval
from mergekit_lite.answers.rows import read_rows
from mergekit_lite.answers.traits import Reasons
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.schema import Recipe, RoundRecipe
from mergekit_lite.distillation.reporting import curves
from mergekit_lite.distillation.reporting.curves import Log, Picture
from mergekit_lite.distillation.reporting.held_out import CUT, LENGTH, UNTRAINED, HeldOutComparison
from mergekit_lite.distillation.rounds import all_rounds, is_done, trained_in
from mergekit_lite.distillation.training.held_out import Choice
from mergekit_lite.errors import counted
from mergekit_lite.input_files import read_json

NAMES = {
    UNTRAINED: "the target as it was",
    "sft": "the SFT model",
    "fuse": "the fused model",
    "on_policy": "the on-policy model",
    "preference": "the preference model",
}
LONGER = 1.1  # ratio of lengths that is reported
FEW = 30  # prompts below which intervals are called rough
PLACES = ((0, "first"), (1, "last"))  # of a figure's values over a training
MANY_CUT = 0.02  # share of answers cut off that is reported
CAN_NOT_TELL = (
    "An interval tells what other prompts of this kind would have given. It knows nothing of another run of training: "
    "only runs with other seeds tell how far those differ.",
    "A scorer that also chose the training data favours what was learnt from it. One that had no part in them, or "
    "people, are better judges.",
    "Many scorers favour long answers. A higher score of longer answers may be that alone.",
    "A skill without held-out prompts here may have suffered unseen.",
)


class RoundFigures(NamedTuple):
    """What one round had."""

    round: int
    prompts: int
    rows: int  # of its last training, with those of earlier rounds
    steps: int
    pairs: Mapping[str, Any] | None  # the table of its pair stage


@dataclass(frozen=True)
class Findings:
    """All results that the report shows.

    Attributes:
        recipe: of the distillation.
        logs: by training, of those that have one.
        table: the table of the pair stage, from its JSON file; with rounds each has its own.
        comparison: of the models on held-out prompts; None without such prompts.
        choices: by training, which checkpoint was published and why, of those where it was chosen.
        rounds: what each finished round had; none without rounds.
    """

    recipe: Recipe
    logs: Mapping[str, Log]
    table: Mapping[str, Any] | None
    comparison: HeldOutComparison | None
    choices: Mapping[str, str] = field(default_factory=dict)
    rounds: Sequence[RoundFigures] = ()

    @property
    def pictures(self) -> list[Picture]:
        """The pictures that there are figures for."""
        drawn = [curves.held_out(self.comparison)] if self.comparison is not None else []
        if self.comparison is not None and self.rounds:
            drawn.append(curves.rounds(self.comparison))
        trained = (curves.training(stage, log) for stage, log in self.logs.items())
        return [*drawn, *(picture for picture in trained if picture is not None)]

    @property
    def conclusions(self) -> list[str]:
        """Sentences that follow from the figures."""
        return [*_of_comparison(self.comparison), *_of_training(self.logs)]

    def to_json(self) -> dict[str, Any]:
        """Return all figures as plain data; numbers that are not finite are None."""
        return {
            "target": self.recipe.target,
            "seed": self.recipe.seed,
            "rule": self.recipe.pairs.rule,
            "objective": self.recipe.train.preference.objective if self.recipe.train.preference else None,
            "fuse": self.recipe.train.fuse.objective if self.recipe.train.fuse else None,
            "said": self.conclusions,
            "held_out": _comparison_json(self.comparison),
            "pairs": self.table,
            "training": {
                stage: {name: {key: pair[place] for key, pair in curves.ends(log).items()} for place, name in PLACES}
                for stage, log in self.logs.items()
                if log
            },
            "published": dict(self.choices),
            "rounds": [each._asdict() for each in self.rounds],
        }


def gather(recipe: Recipe, comparison: HeldOutComparison | None) -> Findings:
    """Read the logs and the table in a recipe's folder."""
    folders = trained_folders(recipe)
    logs = {stage: curves.read_log(folder / "log.jsonl") for stage, folder in folders.items()}
    chosen = {stage: _choice(folder / "training.json") for stage, folder in folders.items()}
    return Findings(
        recipe,
        {stage: log for stage, log in logs.items() if log},
        _table(recipe.folder),
        comparison,
        {stage: choice for stage, choice in chosen.items() if choice},
        [_round(each) for each in all_rounds(recipe) if is_done(each)],
    )


def _table(folder: Path) -> Mapping[str, Any] | None:
    path = folder / "pairs" / "table.json"
    return read_json(path) if path.exists() else None


def trained_folders(recipe: Recipe) -> dict[str, Path]:
    """Return the folders of the models that are trained, by training: with rounds ``round-1-sft`` and so on."""
    stages = trainings(recipe)
    if recipe.rounds is None:
        return {stage: Folder(recipe.folder).trained(stage) for stage in stages}
    rounds = all_rounds(recipe)
    return {f"{each.folder.name}-{stage}": Folder(each.folder).trained(stage) for each in rounds for stage in stages}


def _round(recipe: RoundRecipe) -> RoundFigures:
    prompts = sum(1 for _ in read_rows(Folder(recipe.folder).prompts, []))
    record = read_json(trained_in(recipe) / "training.json")
    return RoundFigures(
        recipe.number, prompts, record["rows"].get("kept", 0), record.get("steps", 0), _table(recipe.folder)
    )


def model_name(model: str) -> str:
    """Return a model's name in sentences."""
    return NAMES.get(model) or f"the model of {model.replace('-', ' ')}"


def trainings(recipe: Recipe) -> list[str]:
    """Return the trainings that may have a log, in their order: for FuseChat one of each teacher's student."""
    fuse = recipe.train.fuse
    students = [f"fuse-{teacher.name}" for teacher in recipe.teachers] if fuse and fuse.pairwise else []
    return ["sft", *students, "fuse", "on_policy", "preference"]


def _choice(path: Path) -> str:
    """Return in words which checkpoint was chosen to be published; an empty text where none was."""
    published = read_json(path).get("published") if path.exists() else None
    if not published:
        return ""
    figures = {int(step): value for step, value in published["checkpoints"].items()}
    return Choice(published["step"], published["by"], figures).told


def with_ends(interval: Interval, signed: bool = False) -> str:
    """Return a mean and its interval in significant digits: ``0.012 [0.010, 0.015]``."""
    if not math.isfinite(interval.mean):
        return "–"
    sign = "+" if signed else ""
    mean = _number(interval.mean, interval, sign)
    if not math.isfinite(interval.low):
        return mean
    return f"{mean} [{_number(interval.low, interval, sign)}, {_number(interval.high, interval, sign)}]"


def _number(value: float, interval: Interval, sign: str) -> str:
    """Return a number with enough decimals to show two digits of the interval's half width."""
    half = (interval.high - interval.low) / 2
    if not math.isfinite(half) or half <= 0:
        return f"{value:{sign},.4g}".replace("-", "−")
    digits = min(max(1 - math.floor(math.log10(half)), 0), 6)
    return f"{value:{sign},.{digits}f}".replace("-", "−")


def _of_comparison(comparison: HeldOutComparison | None) -> Iterator[str]:
    if comparison is None:
        yield "No model was compared: the recipe has no held-out prompts (`report.prompts`)."
        return
    for scorer in comparison.scorers:
        yield from _winner(comparison, scorer)
    if len(comparison.prompts) < FEW:
        prompts = counted(len(comparison.prompts), "prompt")
        yield f"With only {prompts} only large differences can be told from noise."
    lengths = {model: comparison.mean(model, LENGTH).mean for model in comparison.answers}
    first, before = next(iter(lengths.items()))
    for model, length in lengths.items():
        if model != first and before > 0 and not 1 / LONGER < length / before < LONGER:
            yield (
                f"The answers of {model_name(model)} have {length / before:.2f} times the length of those of "
                f"{model_name(first)} ({length:,.0f} and {before:,.0f} characters)."
            )
    cut = {model: comparison.mean(model, CUT).mean for model in comparison.answers}
    if max(cut.values()) > MANY_CUT:
        shares = ", ".join(f"{100 * share:.1f} % of {model_name(model)}" for model, share in cut.items())
        yield f"Of the answers the limit of tokens cut off {shares}."


def _winner(comparison: HeldOutComparison, scorer: str) -> Iterator[str]:
    means = {model: comparison.mean(model, scorer).mean for model in comparison.answers}
    known = [model for model, mean in means.items() if math.isfinite(mean)]
    if len(known) < 2:
        yield f"{scorer} has no verdicts to compare."
        return
    best = max(known, key=lambda model: means[model])
    parts = []
    for other in known:
        if other != best:
            ahead = comparison.difference(best, other, scorer)
            noise = "beyond noise" if ahead.above else "within noise"
            parts.append(f"{with_ends(ahead, signed=True)} against {model_name(other)} ({noise})")
    yield f"By {scorer}, {model_name(best)} is first: {', '.join(parts)}."


def _of_training(logs: Mapping[str, Log]) -> Iterator[str]:
    log = next((logs[stage] for stage in reversed([*logs]) if curves.kind_of(stage) == "preference"), ())
    last = log[-max(1, len(log) // 10) :]  # a single step has few rows

    def final(figure: str) -> float | None:
        values = [row[figure] for row in last if figure in row]
        return fmean(values) if values else None

    if (accuracy := final("accuracy")) is not None:
        yield (
            f"In the last tenth of preference training the chosen answers were above the rejected ones in "
            f"{100 * accuracy:.1f} % of the rows."
        )
    negative = [role for role in ("source", "target") if (final(f"rewards/{role}") or 0) < 0]
    if negative:
        names = " and ".join(f"the {role}'s" for role in negative)
        yield (
            f"The rewards of chosen answers ({names}) ended below 0: they became less probable, only less so than the "
            "rejected ones. That is common in DPO; a smaller learning rate, or an NLL term (`options: {nll: 0.2}`), "
            "holds against it."
        )


def _comparison_json(comparison: HeldOutComparison | None) -> dict[str, Any] | None:
    if comparison is None:
        return None

    def means(domain: str | None = None) -> dict[str, Any]:
        metrics = (*comparison.scorers, LENGTH, CUT)
        return {
            model: {metric: _interval_json(comparison.mean(model, metric, domain)) for metric in metrics}
            for model in comparison.answers
        }

    return {
        "prompts": len(comparison.prompts),
        "models": means(),
        "domains": {domain: means(domain) for domain in comparison.domains},
        "differences": [
            {
                "after": difference.after,
                "before": difference.before,
                "figure": difference.metric,
                **_interval_json(difference.interval),
                "beyond_noise": difference.beyond_noise,
            }
            for difference in comparison.differences
        ],
        "reasons": {scorer: _reasons_json(why) for scorer, why in comparison.reasons.items()},
    }


def _reasons_json(why: Reasons) -> dict[str, Any]:
    return {
        "prompts": why.prompts,
        "win_rate": why.win_rate,
        "alike": _interval_json(why.alike),
        "traits": [
            {
                "trait": effect.trait,
                "after": effect.ours,
                "before": effect.theirs,
                "weight": _interval_json(effect.weight),
                "part": effect.part,
            }
            for effect in why.effects
        ],
    }


def _interval_json(interval: Interval) -> dict[str, Any]:
    ends = {"mean": interval.mean, "low": interval.low, "high": interval.high}
    finite = {key: value if math.isfinite(value) else None for key, value in ends.items()}
    return {**finite, "prompts": interval.items}
