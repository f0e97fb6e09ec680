"""Optuna's samplers as a search, for several parameters at once.

A candidate that was dropped early is a pruned trial, with the gain that the report shows. A study goes on where it
stopped: the trials that came to an end come first again, which costs nothing as their rows are stored,
then a trial that was running when the process died. The attributes of a trial are the candidate's outcome. The baseline
is a trial of its own, as its score is known.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from importlib.util import find_spec
from typing import TYPE_CHECKING

import xxhash

from mergekit_lite.boosting.candidates.candidate import Params
from mergekit_lite.boosting.candidates.ranges import Range, tidy
from mergekit_lite.boosting.search.point import Settings
from mergekit_lite.boosting.search.search import Search, SearchOutcome
from mergekit_lite.errors import UsageError

if TYPE_CHECKING:
    import optuna

SAMPLERS = ("tpe", "cmaes")


def optuna_search(
    ranges: Mapping[str, Range],
    settings: Settings,
    *,
    storage: str,
    sampler: str = "tpe",
    trials: int = 30,
    seed: int = 0,
    at_once: int = 1,
) -> Search:
    """Search by ``trials`` trials, those of earlier runs included.

    A candidate beyond a limit is reported to Optuna as no better than the worst, so that samplers avoid it; its own
    score is in the attributes. Studies of other ranges or settings can be in the same database.

    Args:
        ranges: of each parameter.
        settings: how candidates are judged; the baseline scores 0.
        storage: a database URL, such as ``sqlite:///study.db``.
        sampler: ``tpe``, or ``cmaes`` for two parameters or more.
        trials: their number in all.
        seed: of the sampler.
        at_once: trials that are asked for together, and told together: they are drawn without knowing each other's
            outcomes. Studies that differ in it are different.

    Raises:
        UsageError: Optuna (or cmaes) is missing, the sampler doesn't fit, or the database can't be opened. It is
            raised by this call, not by the first step of the search.
    """
    _check_installed(sampler, len(ranges))
    space = {name: [of.low, of.high, of.step] for name, of in ranges.items()}
    together = (at_once,) if at_once > 1 else ()
    name = f"boost-{xxhash.xxh3_64_hexdigest(repr((space, settings, sampler, seed, *together)).encode())}"
    study = _study(ranges, storage, name, settings.baseline)
    # A sampler that begins anew would draw its first candidates once more.
    study.sampler = _sampler(sampler, seed + len(study.get_trials(deepcopy=False)))
    return _search(ranges, study, trials, at_once)


def _search(ranges: Mapping[str, Range], study: optuna.Study, trials: int, at_once: int) -> Search:
    done = _ended(study)
    if done:
        yield [{name: tidy(value) for name, value in trial.params.items()} for trial in done]
    for number in range(len(done) - len(done) % at_once, trials, at_once):
        running = [study.ask() for _ in range(max(number, len(done)), min(number + at_once, trials))]
        outcomes = yield [
            {name: tidy(trial.suggest_float(name, of.low, of.high, step=of.step)) for name, of in ranges.items()}
            for trial in running
        ]
        for trial, outcome in zip(running, outcomes, strict=True):
            _tell(study, trial, outcome)


def _tell(study: optuna.Study, trial: optuna.Trial, outcome: SearchOutcome) -> None:
    from optuna.trial import TrialState

    for key, value in {"score": outcome.score, "allowed": outcome.allowed, **outcome.details}.items():
        trial.set_user_attr(key, value)
    gain = outcome.details.get("gain") or {}
    if outcome.details.get("dropped") and gain.get("mean") is not None:
        trial.report(gain["mean"], gain["items"])  # which is what a pruned trial's value is
        study.tell(trial, state=TrialState.PRUNED)
        return
    scores = [outcome.score] if math.isfinite(outcome.score) else []
    if not outcome.allowed:
        scores += [one.value for one in _ended(study) if one.value is not None]
    study.tell(trial, min(scores, default=0.0))


def _ended(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    from optuna.trial import TrialState

    states = (TrialState.COMPLETE, TrialState.PRUNED)
    ended: list[optuna.trial.FrozenTrial] = study.get_trials(deepcopy=False, states=states)
    return [trial for trial in ended if "baseline" not in trial.user_attrs]


def _study(ranges: Mapping[str, Range], storage: str, name: str, baseline: Params) -> optuna.Study:
    """Open the study, with interrupted trials put first; or a new one, which knows the baseline."""
    import optuna
    from optuna.trial import TrialState
    from sqlalchemy.exc import SQLAlchemyError

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(storage=storage, study_name=name, direction="maximize", load_if_exists=True)
    except (SQLAlchemyError, ImportError, ValueError) as error:
        raise UsageError(f"{storage}: Optuna can't open this database: {str(error).splitlines()[0]}") from error
    if not study.get_trials(deepcopy=False):
        distributions: dict[str, optuna.distributions.BaseDistribution] = {
            name: optuna.distributions.FloatDistribution(of.low, of.high, step=of.step) for name, of in ranges.items()
        }
        if all(of._contains(baseline[name]) for name, of in distributions.items()):
            trial = optuna.trial.create_trial(
                value=0.0, params=dict(baseline), distributions=distributions, user_attrs={"baseline": True}
            )
            study.add_trial(trial)
    for trial in study.get_trials(deepcopy=False, states=(TrialState.RUNNING,)):
        study.tell(trial.number, state=TrialState.FAIL)
        if set(trial.params) == set(ranges):
            study.enqueue_trial(trial.params)
    return study


def _check_installed(sampler: str, params: int) -> None:
    if find_spec("optuna") is None:
        raise UsageError("This search needs Optuna: pip install 'mergekit-lite[search]' (or pip install optuna).")
    if sampler not in SAMPLERS:
        raise UsageError(f"No sampler is called {sampler!r}; there are: {', '.join(SAMPLERS)}.")
    if sampler == "cmaes" and params < 2:
        raise UsageError("CMA-ES searches two numbers or more. For one take the bracket, a grid or TPE.")
    if sampler == "cmaes" and find_spec("cmaes") is None:
        raise UsageError("CMA-ES needs the package cmaes: pip install cmaes.")


def _sampler(name: str, seed: int) -> optuna.samplers.BaseSampler:
    import optuna

    if name == "tpe":
        return optuna.samplers.TPESampler(seed=seed)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)  # of considering pruned trials
        return optuna.samplers.CmaEsSampler(seed=seed, warn_independent_sampling=False, consider_pruned_trials=True)
