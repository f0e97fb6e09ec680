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

FENCE = re.compile(r"[ \t]*(`{3,}|~{3,})[ \t]*([\w+-]*)")
PYTHON = {"", "python", "python3", "py"}


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
        pool = ThreadPoolExecutor(self.at_once)
        try:
            return list(pool.map(self.score_one, judged))
        finally:  # after Ctrl-C too, which waits for no program: each dies with this process
            pool.shutdown(wait=False, cancel_futures=True)

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
    code, start = answer, 0
    fence: str | None = None  # of the block that is open
    language = ""
    lines = answer.split("\n")
    for number, line in enumerate(lines):
        if fence is None:
            if (opening := FENCE.match(line)) and number < len(lines) - 1:
                fence, language, start = opening[1], opening[2].lower(), number + 1
        elif line.strip(" \t\r") == fence:
            if language in PYTHON:
                code = "".join(f"{line}\n" for line in lines[start:number])
            fence = None
    return "\n".join(lines[start:]) if fence is not None and language in PYTHON else code
