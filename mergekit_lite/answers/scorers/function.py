"""Any Python function as a scorer.

``module:function`` takes the prompt (``answers.rows.Prompt``) and the answer's text and returns a number, or None where
it can't judge. The module is looked for as ``import`` does, and in the current folder. Its name comes from the user's
own recipe or command line only: a model folder can't name code.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

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
from mergekit_lite.errors import UsageError

Judge = Callable[[Any, str], float | None]


def _check(settings: ScorerSettings) -> Iterator[Wrong]:
    if settings.model and ":" not in settings.model:
        yield Wrong(("model",), f"{settings.model!r}: a function is given as module:function")


@scorer("function", needs={"model": "MODULE:NAME"}, takes=("minimise",), check=_check)
class Function(Scorer):
    """The number that the function returns; no score, with its message, where it raises."""

    def __init__(self, settings: ScorerSettings, options: ScorerOptions):
        self.name = settings.name
        self.function = function_named(settings.model or "")

    def score_one(self, judged: Judged) -> Score:
        """Return the score of an answer."""
        try:
            value = self.function(judged.prompt, judged.answer)
            return Score(None, "the function returned None") if value is None else finite(float(value))
        except Exception as error:  # the function is not ours
            return Score(None, f"{type(error).__name__}: {error}")


def function_named(reference: str) -> Judge:
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
        raise UsageError(f"Module {module_name!r} has no function {function_name!r}.")
    judge: Judge = function
    return judge
