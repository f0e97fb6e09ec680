r"""Whether an answer's maths equals the reference, by the ``math-verify`` package.

It takes what stands in ``\boxed{}``, or the last expression, and compares by value: 1/2, 0.5 and \frac12 are the same.
Both may run for ever or out of memory on what a model writes (9^{9^{9^9}}), in C code that no signal interrupts. So
they run in a process of their own, which is killed when its time is over, and which makes this work in any thread.

    1     they are equal
    0     they are not, or there is no maths in the answer
    None  no reference, none that can be read, or no verdict in time
"""

from __future__ import annotations

import contextlib
import json
import selectors
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from mergekit_lite.answers.scorers.scorer import Judged, Score
from mergekit_lite.answers.scorers.settings import Positive, Strict

MEMORY = 4 << 30  # bytes that the process may have
START = 60  # seconds that it may take to import
TOO_LONG = 20_000  # characters: only the end of a longer answer is looked at


class Options(Strict):
    """``seconds`` for one answer."""

    seconds: Positive = 10


class Maths:
    """Compares in a process of its own, which is started again where it had to be killed."""

    def __init__(self, name: str, options: Options):
        self.name = name
        self.seconds = options.seconds
        self._process: subprocess.Popen[bytes] | None = None

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """A verdict for each."""
        return [self._verdict(each) for each in judged]

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.communicate()
            self._process = None

    def _verdict(self, judged: Judged) -> Score:
        if judged.prompt.reference is None:
            return Score(None, "the prompt has no reference")
        told = self._asked({"reference": judged.prompt.reference, "answer": judged.answer[-TOO_LONG:]})
        if told is None:
            self.close()
            return Score(None, f"no verdict within {self.seconds} s")
        return Score(told["value"], told["why"])

    def _asked(self, question: dict[str, str]) -> dict[str, Any] | None:
        process = self._process or self._started()
        assert process.stdin is not None
        try:
            process.stdin.write(json.dumps(question).encode() + b"\n")
            process.stdin.flush()
        except BrokenPipeError:
            return None
        return _line_of(process, self.seconds)

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", "mergekit_lite.answers.scorers.math_worker", str(self.seconds), str(MEMORY)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        if _line_of(self._process, START) is None:
            self.close()
            raise RuntimeError("the process that compares maths doesn't start")
        return self._process


@contextmanager
def comparing(name: str, options: Options) -> Iterator[Maths]:
    """The scorer; its process ends with the context."""
    maths = Maths(name, options)
    try:
        yield maths
    finally:
        maths.close()


def _line_of(process: subprocess.Popen[bytes], seconds: float) -> dict[str, Any] | None:
    """What the process answers; None where it doesn't in time, or has ended.

    A line is short enough to be written at once, and there is one for each question: where something can be read, all
    of it can.
    """
    assert process.stdout is not None
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        if not selector.select(seconds):
            return None
    line = process.stdout.readline()
    with contextlib.suppress(ValueError):
        told: dict[str, Any] = json.loads(line)
        return told
    return None
