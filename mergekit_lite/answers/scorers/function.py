"""Any Python function as a scorer, in the form of TRL's reward functions.

    def score(prompts, completions, **columns) -> list[float | None]: ...

It is called with keywords, for some answers at once, and returns a number for each, or None where it can't judge:

- ``prompts``: a text each where the data have a text as ``prompt``, else a list of messages ``{role, content}``
- ``completions``: the answers in the same form: a text each, or a list of one message of the role ``assistant``
- a list for each column of the prompts: ``id``, ``domain``, ``reference``, ``tests``, and those that the prompts keep

As in TRL, a function names the columns that it wants and takes the others by ``**columns``; one without ``**columns``
gets only what it names. The module is looked for as ``import`` does, and in the current folder. Its name comes from the
user's own recipe or command line only: a model folder can't name code.
"""

from __future__ import annotations

import inspect
import sys
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from importlib import import_module
from numbers import Real
from pathlib import Path
from typing import Any

from mergekit_lite.answers.rows import Prompt
from mergekit_lite.answers.scoring.scorer import (
    Judged,
    Score,
    Scorer,
    ScorerOptions,
    ScorerSettings,
    Wrong,
    finite,
    scorer,
)
from mergekit_lite.errors import RunError, UsageError, one_line, shortened

RewardFunction = Callable[..., Any]
OWN = ("prompts", "completions")
FORM = "f(prompts, completions, **columns) -> list[float | None]"


def _check(settings: ScorerSettings) -> Iterator[Wrong]:
    if settings.model and ":" not in settings.model:
        yield Wrong(("model",), f"{settings.model!r}: a function is given as module:function")


@scorer(
    "function", needs={"model": "MODULE:NAME"}, takes=("minimise",), sees_form=True, opponent_as="column", check=_check
)
class Function(Scorer):
    """The numbers that the function returns. Where it raises for some answers only, these have its message instead."""

    def __init__(self, settings: ScorerSettings, options: ScorerOptions):
        self.name = settings.name
        self.reference = settings.model or ""
        self.function = function_named(self.reference)
        self.has_scored = False  # an answer, so that what it raises from now on is about single answers

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """Return a score for each answer, in order.

        Raises:
            UsageError: the function takes what there isn't.
            RunError: it raises for all of its first answers, with its traceback; or it doesn't return numbers.
        """
        if not judged:
            return []
        try:
            scores = self._called(judged)
        except RaisedError as raised:
            scores = self._one_by_one(judged, raised)
        self.has_scored = self.has_scored or any(score.value is not None for score in scores)
        return scores

    def _one_by_one(self, judged: Sequence[Judged], raised: RaisedError) -> list[Score]:
        """Find out for which answers it raises. That it does so for all of its first ones is a mistake in it."""
        scores, failed = [], 0
        for each in judged:
            try:
                scores += self._called([each])
            except RaisedError as error:
                failed += 1
                scores.append(Score(None, error.line))
        if failed == len(judged) and not self.has_scored:
            raise raised
        return scores

    def _called(self, judged: Sequence[Judged]) -> list[Score]:
        arguments = self._arguments(judged)
        try:
            returned = self.function(**arguments)
        except Exception as error:  # the function is not ours
            raise RaisedError(self.reference, error) from error
        return [Score(None, "the function returned None") if value is None else finite(value) for value in
                self._numbers(returned, len(judged))]  # fmt: skip

    def _numbers(self, returned: Any, count: int) -> list[float | None]:
        """Return what the function returned as a list of numbers, or raise RunError that says what is wrong with it."""
        expected = f"expected is a list with a number or None for each answer: {FORM}."
        if isinstance(returned, str | bytes | Mapping) or not hasattr(returned, "__iter__"):
            what = f"{type(returned).__name__}, {one_line(repr(returned), 60)}"
            raise RunError(f"The function {self.reference} returned {what}: {expected}")
        values = returned.tolist() if hasattr(returned, "tolist") else list(returned)
        if not isinstance(values, list) or len(values) != count:
            given = f"{len(values):,} scores" if isinstance(values, list) else "one number"
            raise RunError(f"The function {self.reference} returned {given} for {count:,} answers: {expected}")
        values = [value.item() if hasattr(value, "item") else value for value in values]  # of numpy or torch
        for place, value in enumerate(values):
            if value is not None and not isinstance(value, Real):
                what = (
                    f"{one_line(repr(value), 60)}, of the type {type(value).__name__}, as the score of answer {place}"
                )
                raise RunError(f"The function {self.reference} returned {what}: {expected}")
        return [None if value is None else float(value) for value in values]

    def _arguments(self, judged: Sequence[Judged]) -> dict[str, list[Any]]:
        """Return what the function gets: all, or what it names.

        Raises:
            UsageError: it needs something that there isn't.
        """
        columns = _columns([each.prompt for each in judged])
        given = columns | {
            "prompts": [_as_in_data(each.prompt) for each in judged],
            "completions": [_answer_as(each) for each in judged],
        }
        try:
            parameters = inspect.signature(self.function).parameters.values()
        except (TypeError, ValueError):  # of a function written in C
            return given
        takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters)
        by_name = [each for each in parameters if each.kind in (each.POSITIONAL_OR_KEYWORD, each.KEYWORD_ONLY)]
        lacking = [each.name for each in by_name if each.default is each.empty and each.name not in given]
        lacking += [each.name for each in parameters if each.kind is each.POSITIONAL_ONLY]
        if lacking:
            raise UsageError(
                f"The function {self.reference} takes {', '.join(map(repr, lacking))}, which there isn't. It is called "
                f"as {FORM}, by keywords; there are {', '.join((*OWN, *columns))}. Further columns of the prompts are "
                "there where the recipe keeps them: `keep: [NAME]` beside their `path`."
            )
        return given if takes_all else {each.name: given[each.name] for each in by_name if each.name in given}


class RaisedError(RunError):
    """A function of the user's raised; the message is its traceback, for the mistake is in there."""

    def __init__(self, reference: str, error: Exception):
        below = error.__traceback__.tb_next if error.__traceback__ is not None else None  # the first frame is ours
        shown = "".join(traceback.format_exception(type(error), error, below)).rstrip()
        self.line = one_line(f"{type(error).__name__}: {error}")
        super().__init__(f"The function {reference} raised an error on its first answers:\n\n{shown}")


def _columns(prompts: Sequence[Prompt]) -> dict[str, list[Any]]:
    columns: dict[str, list[Any]] = {
        "id": [prompt.id for prompt in prompts],
        "domain": [prompt.domain for prompt in prompts],
        "reference": [prompt.reference for prompt in prompts],
        "tests": [list(prompt.tests) for prompt in prompts],
    }
    for name in dict.fromkeys(name for prompt in prompts for name in prompt.columns):
        if name in OWN:
            raise UsageError(
                f"The prompts keep a column {name!r}, which is what a function gets: give it another name."
            )
        columns[name] = [prompt.columns.get(name) for prompt in prompts]
    return columns


def _as_in_data(prompt: Prompt) -> Any:
    return prompt.messages[-1]["content"] if prompt.plain else [dict(message) for message in prompt.messages]


def _answer_as(judged: Judged) -> Any:
    return judged.answer if judged.prompt.plain else [{"role": "assistant", "content": judged.answer}]


def function_named(reference: str) -> RewardFunction:
    """Import the function called ``module:function``.

    Raises:
        UsageError: there is no such function.
    """
    module_name, _, function_name = reference.partition(":")
    if not module_name or not function_name:
        raise UsageError(f"A function is named module:function, got {reference!r}.")
    here = str(Path.cwd())
    sys.path.append(here)
    try:
        function = getattr(import_module(module_name), function_name, None)
    except Exception as error:  # whatever importing a module of the user's raises
        raise UsageError(f"Can't import {module_name!r} for {reference!r}: {type(error).__name__}: {error}") from error
    finally:
        sys.path.remove(here)
    if not callable(function):
        raise UsageError(f"Module {module_name!r} has no function {shortened(function_name)!r}.")
    found: RewardFunction = function
    return found
