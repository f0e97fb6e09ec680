"""Distill in one call: what the command ``distill run`` does, for Python."""

from __future__ import annotations

from pathlib import Path

from mergekit_lite.distillation import prompts
from mergekit_lite.distillation import sample as sampling
from mergekit_lite.distillation import teach as teaching
from mergekit_lite.distillation import train as training
from mergekit_lite.distillation.dry_run import unfilled
from mergekit_lite.distillation.pair import pair
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.distillation.report import report
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.reporting.findings import Findings
from mergekit_lite.distillation.rounds import each_round
from mergekit_lite.distillation.score import score
from mergekit_lite.errors import UsageError, listing
from mergekit_lite.options import named_options


@named_options
def distill(recipe: str | Path, *, skip_missing: bool = False, reporter: Reporter | None = None) -> Findings:
    """Distill strong models into a small one, as a recipe says: sample, score, pair, teach, train and report.

    Every stage reads and writes files in the recipe's folder; what is done is not done again. With ``rounds`` all but
    the report is done in each.

    Args:
        recipe: a YAML file; see docs/distill.md.
        skip_missing: go on without the answers that a source fails to give, and the rows that a teacher fails to score.
        reporter: gets results, warnings and progress; by default nothing is shown.

    Returns:
        What training did to answers on held-out prompts, as the report has it.

    Raises:
        UsageError: the recipe is wrong; every problem is named with its line and column.
        MergekitLiteError: a model can't be asked, judged or trained. What was finished is kept.
    """
    loaded, reporter = load(Path(recipe)), reporter or Reporter()
    for number, each in enumerate(each_round(loaded, reporter)):
        teaching.check(each)  # what would be refused hours later
        training.check(each)
        sampling.check(each, and_target=True)
        if number == 0:
            _hold_batches(loaded)
        _stages(each, reporter, skip_missing)
    reporter.line("[report]")
    return report(loaded, reporter)


def _hold_batches(recipe: Recipe) -> None:
    """Refuse, before anybody is asked, trainings whose rows can't fill a batch.

    Prompts that are near others aren't known yet, nor how many of each domain there are.

    Raises:
        UsageError: with each of them.
    """
    if any(entry.nearest is not None for entry in recipe.prompts):
        return
    asked = [] if recipe.rows is not None else prompts.read(recipe, Reporter(), plan=True)
    if problems := unfilled(recipe, asked):
        raise UsageError(listing("There will be too few rows to train on", problems))


def _stages(recipe: Recipe, reporter: Reporter, skip_missing: bool) -> None:
    """Run the stages up to training: twice, where the target answers for itself once its SFT is done."""
    for _ in range(1 if recipe.target_source is None else 2):
        reporter.line("[sample]")
        sampling.sample(recipe, reporter, skip_missing=skip_missing)
        reporter.line("[score]")
        score(recipe, reporter)
        reporter.line("[pair]")
        pair(recipe, reporter, skip_missing=skip_missing)
        if recipe.train.fuse is not None:
            reporter.line("[teach]")
            teaching.teach(recipe, reporter, skip_missing=skip_missing)
        reporter.line("[train]")
        training.train(recipe, reporter)
