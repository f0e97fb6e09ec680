r"""An answer's maths compared with the reference, by the ``math-verify`` package.

It reads the contents of ``\boxed{}``, or the last expression, and compares by value: 1/2, 0.5 and \frac12 are the
same. Reading and comparing may run for ever or out of memory on what a model writes (9^{9^{9^9}}), in C code that no
signal interrupts. So they run in a process of their own, which is killed when its time is over, and which makes this
work in any thread.

    1     they are equal
    0     they are not, or the answer has no maths
    None  no reference, none that can be read, or no result in time
"""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
from typing import Any

from mergekit_lite.answers.scoring import math_worker
from mergekit_lite.answers.scoring.scorer import Judged, Positive, Score, Scorer, ScorerOptions, ScorerSettings, scorer

MEMORY = 4 << 30  # bytes that the process may have
START = 60  # seconds that it may take to import
TOO_LONG = 20_000  # characters: only the end of a longer answer is looked at


class Options(ScorerOptions):
    """``seconds`` for one answer."""

    seconds: Positive = 10


@scorer("maths")
class Maths(Scorer):
    """Compares in a process of its own, which is started again where it had to be killed."""

    def __init__(self, settings: ScorerSettings, options: Options):
        self.name = settings.name
        self.seconds = options.seconds
        self._process: subprocess.Popen[bytes] | None = None

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def score_one(self, judged: Judged) -> Score:
        """Return the score of an answer."""
        if judged.prompt.reference is None:
            return Score(None, "the prompt has no reference")
        reply = self._ask({"reference": judged.prompt.reference, "answer": judged.answer[-TOO_LONG:]})
        if reply is None:
            self.close()
            return Score(None, f"no verdict within {self.seconds} s")
        return Score(reply["value"], reply["why"])

    def _ask(self, question: dict[str, str]) -> dict[str, Any] | None:
        process = self._process or self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        return _line_of(process, self.seconds)

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", math_worker.__name__, str(self.seconds), str(MEMORY)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if _line_of(self._process, START) is None:
            self.close()
            raise RuntimeError("the process that compares maths doesn't start")
        return self._process


def _line_of(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
    """Read the process's reply; None where it gives none in time, or has ended.

    The process writes one short line for each question, at once: where something can be read, all of it can.
    """
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    line = process.stdout.readline()
    with contextlib.suppress(ValueError):
        reply: dict[str, Any] = json.loads(line)
        return reply
    return None
