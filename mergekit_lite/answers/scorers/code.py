"""The tests of a prompt, run on an answer's code.

The code is the answer's last fenced block of Python (or of no named language), or the whole answer where it has no
fence. It is compiled and run as a module, then each test runs as a program that sees its names. Models write this
code: it runs in the sandbox of ``scoring/sandbox.py``, and only where ``allow_code`` says so.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor

from mergekit_lite.answers.scoring.sandbox import SandboxLimits, check_sandbox, run_sandboxed
from mergekit_lite.answers.scoring.scorer import Judged, Score, Scorer, ScorerSettings, scorer

FENCED = re.compile(r"^[ \t]*(```+|~~~+)[ \t]*([\w+-]*)[^\n]*\n(.*?)(?:^[ \t]*\1[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
LANGUAGES = {"", "python", "python3", "py"}


@scorer("code", needs={"allow_code": "true"}, takes=("batch_size",))
class Code(Scorer):
    """1 where all tests pass, 0 with the reason where not; no score where the prompt has no tests."""

    def __init__(self, settings: ScorerSettings, options: SandboxLimits):
        check_sandbox(options)
        self.name = settings.name
        self.options = options
        self.at_once = min(settings.batch_size, os.cpu_count() or 1)

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """Return a score for each answer, in order."""
        with ThreadPoolExecutor(self.at_once) as pool:
            return list(pool.map(self.score_one, judged))

    def score_one(self, judged: Judged) -> Score:
        """Return the score of an answer."""
        if not judged.prompt.tests:
            return Score(None, "the prompt has no tests")
        outcome = run_sandboxed(python_in(judged.answer), judged.prompt.tests, self.options)
        return Score(float(outcome.passed), outcome.why)


def python_in(answer: str) -> str:
    """Return the last fenced block of Python, or the whole answer where there is none.

    A fence that is never closed, as in an answer that was cut, ends with the answer.
    """
    blocks = [body for _, language, body in FENCED.findall(answer) if language.lower() in LANGUAGES]
    return blocks[-1] if blocks else answer
