"""What candidates are scored by, as the command line gives it.

    reward:MODEL                      a reward model's number for each answer
    maths   exact   code              answers against the reference or the tests of their prompts
    judge:MODEL,server=URL            a language model grades answers
    function:MODULE:NAME              a Python function of prompt and answer
    log-ratio                         log-likelihood of answers under ALIGNED − under SFT; needs no other model
    pairs                             how preference pairs are ranked; needs no answers
    nll:FILE                          mean log-probability of a token of texts (−NLL); needs no answers
    lm-eval:TASK                      a task of the lm-evaluation-harness

Settings follow, each after a comma: ``reward:MODEL,name=rm,batch_size=4,max_length=2048``. Higher is better everywhere.
The first score decides; others are told beside it, and may have limits to what is lost.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple, get_args

import yaml
from pydantic import ValidationError

from mergekit_lite.answers.scorers.registry import wrong_settings
from mergekit_lite.answers.scorers.settings import Kind, ScorerSettings
from mergekit_lite.errors import UsageError, listing, nearest

OF_ANSWERS: tuple[str, ...] = tuple(kind for kind in get_args(Kind) if kind != "log_ratio")
LOG_RATIO, PAIRS, NLL, LM_EVAL = "log-ratio", "pairs", "nll", "lm-eval"
KINDS = (*OF_ANSWERS, LOG_RATIO, PAIRS, NLL, LM_EVAL)
WITHOUT_TARGET = ("maths", "exact", "code", LOG_RATIO, PAIRS)
SETTING = re.compile(r",(?=[a-z_]+=)")
FIXED = {LOG_RATIO, PAIRS, NLL}  # names of scores that have no other
HARNESS: dict[str, type] = {"name": str, "metric": str, "include": str, "limit": int, "shots": int, "chat": bool}


class Score(NamedTuple):
    """One score.

    Attributes:
        kind: one of ``KINDS``.
        name: of its values in the rows.
        target: the model, function, file or task; empty where the kind has none.
        settings: of the harness; what a scorer of answers has is in ``scorer``.
        scorer: how to open what scores answers, where it is of these.
    """

    kind: str
    name: str
    target: str = ""
    settings: tuple[tuple[str, Any], ...] = ()
    scorer: ScorerSettings | None = None


def parse(texts: Sequence[str]) -> tuple[Score, ...]:
    """Read every ``--score``.

    Raises:
        UsageError: with everything that is wrong.
    """
    found: list[Score] = []
    problems: list[str] = []
    for text in texts:
        try:
            found.append(_score(text))
        except ValueError as error:
            problems.append(f"{text!r}: {error}")
    names = [score.name for score in found]
    twice = [name for name in dict.fromkeys(names) if names.count(name) > 1]
    problems += [f"two scores are called {name!r}: give one of them another name=" for name in twice]
    if problems:
        raise UsageError(listing("Scores that can't be used", problems))
    return tuple(found)


def _score(text: str) -> Score:
    """Raises ValueError."""
    what, *settings = SETTING.split(text)
    kind, _, target = what.partition(":")
    if kind not in KINDS:
        raise ValueError(f"no kind of score.{nearest(kind, KINDS)} There are: {', '.join(KINDS)}")
    if bool(target) == (kind in WITHOUT_TARGET):
        raise ValueError(f"{kind} takes nothing after a colon" if target else f"expected {kind}:…")
    given = {name: _value(value) for name, _, value in (setting.partition("=") for setting in settings)}
    if len(given) < len(settings):
        raise ValueError("a setting is given twice")
    if kind in OF_ANSWERS:
        return _of_answers(kind, target, given)
    if kind == LM_EVAL:
        return _of_harness(target, given)
    if given:
        raise ValueError(f"{kind} has no setting {next(iter(given))!r}: it has none")
    return Score(kind, kind, target)


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except yaml.YAMLError:
        return text


def _of_answers(kind: str, target: str, given: dict[str, Any]) -> Score:
    own = {name: value for name, value in given.items() if name in ScorerSettings.model_fields}
    options = {name: value for name, value in given.items() if name not in own}
    content = {"name": kind, "kind": kind, **({"model": target} if target else {}), **own}
    try:
        settings = ScorerSettings(**content, options=options) if options else ScorerSettings(**content)
    except ValidationError as error:
        told = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)]
        raise ValueError("; ".join(told)) from error
    if wrong := [f"{'.'.join(at)}: {said}" if at else said for at, said in wrong_settings(settings)]:
        raise ValueError("; ".join(wrong))
    return Score(kind, settings.name, target, scorer=settings)


def _of_harness(task: str, given: dict[str, Any]) -> Score:
    unknown = [name for name in given if name not in HARNESS]
    if unknown:
        raise ValueError(f"{LM_EVAL} has no setting {unknown[0]!r}: it has {', '.join(HARNESS)}")
    wrong = [name for name, value in given.items() if type(value) is not HARNESS[name]]
    if wrong:
        raise ValueError(f"{wrong[0]}={given[wrong[0]]}: expected {HARNESS[wrong[0]].__name__}")
    name = given.pop("name", task)
    return Score(LM_EVAL, name, task, tuple(given.items()))
