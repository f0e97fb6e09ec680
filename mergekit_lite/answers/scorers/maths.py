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
import subprocess
import sys
import threading
from queue import Empty, SimpleQueue
from typing import IO, Any

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
        self._replies: SimpleQueue[bytes] = SimpleQueue()

    def close(self) -> None:
        """End the process."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            assert self._process.stdin is not None
            with contextlib.suppress(OSError):  # a question that it didn't take
                self._process.stdin.close()
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
        return self._reply(self.seconds)

    def _started(self) -> subprocess.Popen[bytes]:
        command = [sys.executable, "-m", math_worker.__name__, str(self.seconds), str(MEMORY)]
        self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE)
        self._replies = SimpleQueue()
        threading.Thread(target=_read, args=(self._process.stdout, self._replies), daemon=True).start()
        if self._reply(START) is None:
            self.close()
            raise RuntimeError("the process that compares maths doesn't start")
        return self._process

    def _reply(self, seconds: float) -> dict[str, Any] | None:
        """Return the process's reply, a line; None where it gives none in time, or has ended."""
        with contextlib.suppress(Empty, ValueError):
            reply: dict[str, Any] = json.loads(self._replies.get(timeout=seconds))
            return reply
        return None


def _read(replies: IO[bytes], queue: SimpleQueue[bytes]) -> None:
    """Pass on a process's lines, and an empty one at its end: not every system can wait for a pipe for some time."""
    with replies:
        while line := replies.readline():
            queue.put(line)
    queue.put(b"")
