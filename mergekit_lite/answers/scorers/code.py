"""Whether an answer's code passes its prompt's tests.

The code is the answer's last fenced block of Python (or of no named language), or the whole answer where it has no
fence. It has to compile, then runs as a module, then each test runs as a program that sees its names. Models write
this code: it runs behind the walls of ``fence.py``, and only where ``allow_code`` says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mergekit_lite.answers.scorers.sandbox import Limits, run_fenced
from mergekit_lite.answers.scorers.scorer import Judged, Score

FENCED = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
LANGUAGES = {"", "python", "python3", "py"}


class Options(Limits):
    """The limits of the fence."""


class Code:
    """1 where all tests pass, 0 where not, with the reason; None where the prompt has no tests."""

    def __init__(self, name: str, options: Options, at_once: int):
        self.name = name
        self.options = options
        self.at_once = min(at_once, os.cpu_count() or 1)

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """A verdict for each."""
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(self._verdict, judged))

    def _verdict(self, judged: Judged) -> Score:
        if not judged.prompt.tests:
            return Score(None, "the prompt has no tests")
        outcome = run_fenced(python_in(judged.answer), judged.prompt.tests, self.options)
        return Score(float(outcome.passed), outcome.why)


def python_in(answer: str) -> str:
    """The last fenced block of Python, or the whole answer where there is none.

    A fence that is never closed, as in an answer that was cut, ends with the answer.
    """
    blocks = [body for _, language, body in FENCED.findall(answer) if language.lower() in LANGUAGES]
    return blocks[-1] if blocks else answer
