"""The scores of candidates, as ``--score`` gives them: ``KIND:TARGET,SETTING=VALUE,…``; docs/boost.md lists them.

A kind is a scorer of answers (``answers/scorers``) or one of ``OWN``. In rows higher is better everywhere: a score of
which lower is better has the other sign there, and its own where it is shown.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any, NamedTuple

import yaml
from pydantic import ValidationError

from mergekit_lite.answers.scoring.registry import kind_of, wrong_settings
from mergekit_lite.answers.scoring.scorer import ScorerSettings, names
from mergekit_lite.errors import UsageError, listing, nearest

LOG_RATIO, PAIRS, NLL, LM_EVAL = "log_ratio", "pairs", "nll", "lm-eval"
OWN = {LOG_RATIO: LOG_RATIO, PAIRS: PAIRS, NLL: f"{NLL}:FILE", LM_EVAL: f"{LM_EVAL}:TASK"}  # how they are written
SETTING = re.compile(r",(?=[a-z_]+=)")
HARNESS: dict[str, type] = {
    "name": str,
    "metric": str,
    "minimise": bool,
    "include": str,
    "limit": int,
    "shots": int,
    "chat": bool,
}


class ScoreSpec(NamedTuple):
    """One ``--score``."""

    kind: str  # one of ``forms()``
    name: str  # of the score in the rows
    target: str = ""  # the model, function, file or task; empty where the kind has none
    settings: tuple[tuple[str, Any], ...] = ()  # of the harness
    scorer: ScorerSettings | None = None  # the settings of a scorer of answers; None for the other kinds

    @property
    def of_answers(self) -> bool:
        """Whether candidates have to answer prompts for it."""
        return self.scorer is not None or self.kind == LOG_RATIO


def forms() -> dict[str, str]:
    """Return how a ``--score`` of each kind is written, such as ``judge:MODEL,server=URL``."""
    return {kind: _form(kind) for kind in names() if kind not in OWN and kind_of(kind).judges} | OWN


def _form(kind: str) -> str:
    needs = dict(kind_of(kind).needs)
    target = f":{needs.pop('model')}" if "model" in needs else ""
    return "".join([kind, target, *(f",{key}={what}" for key, what in needs.items())])


def parse(texts: Sequence[str]) -> tuple[ScoreSpec, ...]:
    """Read every ``--score``.

    Raises:
        UsageError: some can't be used; the message has every reason.
    """
    scores: list[ScoreSpec] = []
    problems: list[str] = []
    for text in texts:
        try:
            scores.append(_score(text))
        except ValueError as error:
            problems.append(f"{text!r}: {error}")
    called = [score.name for score in scores]
    twice = [name for name in dict.fromkeys(called) if called.count(name) > 1]
    problems += [f"two scores are called {name!r}: give one of them another name=" for name in twice]
    if problems:
        raise UsageError(listing("Scores that can't be used", problems))
    return tuple(scores)


def _score(text: str) -> ScoreSpec:
    what, *settings = SETTING.split(text)
    written, _, target = what.partition(":")
    known = forms()
    kind = next((name for name in known if name.replace("-", "_") == written.replace("-", "_")), None)
    if kind is None:
        raise ValueError(f"no kind of score.{nearest(written, known)} There are: {', '.join(known)}")
    if bool(target) != (":" in known[kind]):
        raise ValueError(f"{kind} takes nothing after a colon" if target else f"expected {kind}:…")
    given = {name: _value(value) for name, _, value in (setting.partition("=") for setting in settings)}
    if len(given) < len(settings):
        raise ValueError("a setting is given twice")
    if kind not in OWN:
        return _of_answers(kind, target, given)
    if kind == LM_EVAL:
        return _of_harness(target, given)
    if given:
        raise ValueError(f"{kind} has no setting {next(iter(given))!r}: it has none")
    return ScoreSpec(kind, kind, target)


def _value(text: str) -> Any:
    try:
        return yaml.safe_load(text)
    except (yaml.YAMLError, ValueError, LookupError, RecursionError):  # what PyYAML raises of odd tags
        return text


def _of_answers(kind: str, target: str, given: dict[str, Any]) -> ScoreSpec:
    own = {name: value for name, value in given.items() if name in ScorerSettings.model_fields}
    options = {name: value for name, value in given.items() if name not in own}
    content = {"name": kind, "kind": kind, **({"model": target} if target else {}), **own}
    try:
        settings = ScorerSettings(**content, options=options) if options else ScorerSettings(**content)
    except ValidationError as error:
        reasons = [f"{'.'.join(map(str, each['loc']))}: {each['msg']}" for each in error.errors(include_url=False)]
        raise ValueError("; ".join(reasons)) from error
    if wrong := [f"{'.'.join(at)}: {said}" if at else said for at, said in wrong_settings(settings)]:
        raise ValueError("; ".join(wrong))
    return ScoreSpec(kind, settings.name, target, scorer=settings)


def _of_harness(task: str, given: dict[str, Any]) -> ScoreSpec:
    if unknown := [name for name in given if name not in HARNESS]:
        raise ValueError(f"{LM_EVAL} has no setting {unknown[0]!r}: it has {', '.join(HARNESS)}")
    for name, value in given.items():
        if type(value) is not HARNESS[name]:
            raise ValueError(f"{name}={value}: expected {HARNESS[name].__name__}")
    name = given.pop("name", task)
    return ScoreSpec(LM_EVAL, name, task, tuple(given.items()))
