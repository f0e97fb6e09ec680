"""Boost in one call: search by measuring, then make the chosen model as ``extrapolate`` and ``merge`` do."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.answers.aggregating.answering import Untold
from mergekit_lite.answers.aggregating.running import Reports
from mergekit_lite.boosting import record, report
from mergekit_lite.boosting.candidates.candidate import Params
from mergekit_lite.boosting.candidates.family import RecipeFamily
from mergekit_lite.boosting.description import described
from mergekit_lite.boosting.evaluators import cluster_of, evaluator_of, team_of
from mergekit_lite.boosting.measure import opponent
from mergekit_lite.boosting.measure.evaluator import ModelEvaluator
from mergekit_lite.boosting.measure.nulls import null_tests
from mergekit_lite.boosting.measure.tasks import Harness
from mergekit_lite.boosting.options import BoostOptions, request_of
from mergekit_lite.boosting.request import Prepared, prepare
from mergekit_lite.boosting.search import choice
from mergekit_lite.boosting.search.choice import Result
from mergekit_lite.boosting.search.point import Point
from mergekit_lite.boosting.search.study import Study
from mergekit_lite.options import named_options

if TYPE_CHECKING:
    from typing_extensions import Unpack

    from mergekit_lite.engine.run import Finished
    from mergekit_lite.engine.schedule import Progress


@dataclass(frozen=True)
class Boosted:
    """The result of a boost.

    Attributes:
        result: the search's.
        page: path of the report.
        about: what was searched with, in words.
        finished: the chosen model as it was written; None where no candidate helps.
    """

    result: Result
    page: Path
    about: Mapping[str, str]
    finished: Finished | None

    def to_json(self) -> dict[str, Any]:
        """Return all figures, and the path of the output."""
        finished = self.finished
        return {
            **record.as_json(self.result, self.about),
            "output": str(finished.outputs[0]) if finished is not None else None,
            "effective": finished.reports[0].effective if finished is not None else None,
            "page": str(self.page),
        }


@named_options
def boost(
    *,
    output: str | Path,
    scores: Sequence[str],
    sft: str | Path | None = None,
    aligned: str | Path | None = None,
    recipe: str | Path | None = None,
    base: str | Path | None = None,
    checkpoints: str | Path | Sequence[str | Path] = (),
    **options: Unpack[BoostOptions],
) -> Boosted:
    """Choose how far to go past ``aligned`` or a run's end, or numbers of a recipe, by measuring, and make that model.

    What is measured is kept in ``OUTPUT.boost``: a search that was killed goes on, and measures nothing twice.

    Args:
        output: the chosen model's folder.
        scores: ``KIND[:WHAT]`` each, as the command's ``--score`` takes them; the first one decides: ``reward:MODEL``,
            ``maths``, ``pairs``, ``nll:FILE``, ``lm-eval:TASK`` …
        sft: the model before alignment, with ``aligned``: any reference.
        aligned: the model after.
        recipe: instead of a pair, a merge recipe, with the option ``tune``.
        base: instead of a pair, the model that a training run began with, with ``checkpoints``.
        checkpoints: two or more of that run, the folder that holds them, or a pattern, ``run/step-*``; the option
            ``tune`` says how far it may go on, ``to_step=75:1000``.
        **options: see ``BoostOptions``.

    Returns:
        The search's result, the report's path, and the model that was made, if a candidate is better than the baseline.

    Raises:
        UsageError: an option is wrong; every problem that can be seen at once is named.
        MergekitLiteError: a candidate can't be made or asked, or the output not written. What was measured is kept.
    """
    return search_and_write(prepare(request_of(output, scores, sft, aligned, recipe, options, base, checkpoints)))


def search_and_write(
    prepared: Prepared,
    measured: Callable[[Point], None] = lambda point: None,
    writing: Callable[[], AbstractContextManager[Progress | None]] = nullcontext,
    note: Callable[[str], None] = lambda text: None,
    reports: Reports | None = None,
) -> Boosted:
    """Search, report, and write the model that was chosen.

    Args:
        prepared: from ``prepare``.
        measured: called with each candidate once it is measured.
        writing: gives the progress of the bytes read while the model is made.
        note: called with remarks, such as that a worker died and was replaced.
        reports: takes what is told while an opponent answers; by default nothing is.

    Raises:
        MergekitLiteError: a candidate can't be made or asked, or the output not written. Measured rows stay stored.
    """
    check_output(prepared)
    request = prepared.request
    if prepared.opponent is not None:
        prepared = prepared.against(opponent.answers_of(prepared.opponent, reports or Untold()))
    elsewhere = prepared.measures_elsewhere
    with (
        cluster_of(prepared) as cluster,
        evaluator_of(prepared, measures=not elsewhere) as evaluator,
        Study(request.folder, _identity(prepared, evaluator), evaluator.items, request.seed) as study,
        team_of(prepared, study.items, cluster, note) if elsewhere else nullcontext() as team,
    ):
        settings = replace(prepared.settings, minimised=_minimised(prepared, evaluator))
        test = partial(null_tests, prepared.scores, prepared.prompts, request.folder)
        about = described(prepared)
        record.write_items(request.folder, study.items, evaluator.asked)
        so_far = partial(record.write_so_far, request.folder, about=about)
        result = choice.boost(prepared.searcher, evaluator, study, settings, measured, test, team, so_far)
        page = report.write(result, study, about, evaluator.asked)
    if result.chosen is None:
        return Boosted(result, page, about, None)
    with writing() as progress:
        return Boosted(result, page, about, write(prepared, result.chosen, progress))


def _minimised(prepared: Prepared, evaluator: ModelEvaluator) -> tuple[str, ...]:
    """Return the names of the scores of which lower is better."""
    asked = [score.name for score in prepared.scores if score.scorer is not None and score.scorer.minimise]
    tasks = [measure.name for measure in evaluator.measures if isinstance(measure, Harness) and measure.minimised]
    return (*asked, *tasks)


def _identity(prepared: Prepared, evaluator: ModelEvaluator) -> dict[str, Any]:
    """Return all that a row depends on; so also the sign of its values, which a task's own file says."""
    minimised = _minimised(prepared, evaluator)
    return prepared.identity() | ({"minimised": list(minimised)} if minimised else {})


def check_output(prepared: Prepared) -> None:
    """Refuse, before the search, an output path that can't be written to after it.

    An output that exists may be the one that this very boost made before: that is known once it has chosen again.

    Raises:
        UsageError: the path lies in an input, or exists and was not made by a boost of this folder.
    """
    from mergekit_lite.engine.run import check_outputs

    request = prepared.request
    again = (request.folder / "study.json").exists()
    plan = prepared.family.plan(prepared.family.baseline, request.output)
    check_outputs(plan, resume=False, force=request.force or again)


def write(prepared: Prepared, params: Params, progress: Progress | None = None) -> Finished:
    """Make the model of these params, as ``extrapolate`` or ``merge`` does; an interrupted run goes on.

    Raises:
        MergekitLiteError: as ``run`` says.
    """
    from mergekit_lite.engine.run import run

    request = prepared.request
    plan = prepared.family.plan(params, request.output)
    if isinstance(prepared.family, RecipeFamily):
        (request.folder / "recipe.yml").write_text(plan.text, encoding="utf-8", newline="\n")
    return run(
        plan,
        device=prepared.device,
        threads=request.threads,
        resume=True,
        force=request.force,
        sync=request.sync,
        progress=progress,
    )
