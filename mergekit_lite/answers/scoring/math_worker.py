"""The process in which ``scorers/maths.py`` compares answers.

    python -m mergekit_lite.answers.scoring.math_worker SECONDS MEMORY

A line of JSON each way: ``{"reference", "answer"}`` in, ``{"value", "why"}`` out; ``{}`` first, when it is ready. The
package's own time limits come first and leave the process alive; the other side kills it where they don't work. Where
the other side is gone, a limit on processor time ends it.
"""

from __future__ import annotations

import json
import logging
import math
import os
import sys
from contextlib import suppress
from typing import Any


def main(seconds: int, memory: int) -> None:
    """Answer questions until there are no more."""
    with suppress(ImportError, OSError, ValueError):  # Windows has no such limits, macOS has them by name
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (memory, memory))
    logging.disable()  # math-verify logs each answer that it can't read
    import math_verify  # noqa: F401  # imported before the first question comes

    replies = os.fdopen(os.dup(1), "w", encoding="ascii")
    os.dup2(2, 1)  # all other output
    print("{}", file=replies, flush=True)
    for line in sys.stdin:
        end_after(seconds)
        question = json.loads(line)
        value, why = compared(question["reference"], question["answer"], max(1, (seconds - 1) // 3))
        print(json.dumps({"value": value, "why": why}), file=replies, flush=True)


def end_after(seconds: int) -> None:
    """Let the system end this process once it has used some more seconds of processor time, if it can."""
    with suppress(ImportError):
        import resource

        used = resource.getrusage(resource.RUSAGE_SELF)
        most = math.ceil(used.ru_utime + used.ru_stime) + seconds
        resource.setrlimit(resource.RLIMIT_CPU, (most, resource.getrlimit(resource.RLIMIT_CPU)[1]))


def compared(reference: str, answer: str, seconds: int) -> tuple[float | None, str]:
    """Return a score and its reason; reading either text and comparing them take at most ``seconds`` each."""
    from math_verify.errors import TimeoutException

    try:
        # As plain text only where it isn't LaTeX: there 2\pi would be 2.
        golds = parsed(as_latex(reference), seconds) or parsed(reference, seconds)
    except (Exception, TimeoutException) as error:
        return None, f"the reference can't be read: {type(error).__name__}"
    if not golds:
        return None, "no maths in the reference"
    try:
        expressions = parsed(answer, seconds)
        if not expressions:
            return 0.0, "no maths in the answer"
        return equal(golds, expressions, seconds), ""
    except (Exception, TimeoutException) as error:  # sympy raises anything
        return None, f"can't be compared: {type(error).__name__}"


def as_latex(reference: str) -> str:
    """Add the dollars to a reference: many are LaTeX without them."""
    marked = any(mark in reference for mark in ("$", "\\(", "\\[", "\\boxed", "\n"))
    return reference if marked else f"${reference}$"


def parsed(text: str, seconds: int) -> list[Any]:
    """Return the expressions that math-verify finds, and the last of them as text."""
    from math_verify import parse

    expressions: list[Any] = parse(text, parsing_timeout=seconds, raise_on_error=True)
    return expressions


def equal(golds: list[Any], expressions: list[Any], seconds: int) -> float:
    """Return 1 where any form of the reference equals any of the answer, else 0."""
    from math_verify import verify

    return float(verify(golds, expressions, timeout_seconds=seconds, raise_on_error=True))


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]))
