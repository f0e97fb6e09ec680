"""Maths answers against references, in a process of their own."""

from __future__ import annotations

import signal
import subprocess
import sys
import threading
import time

import pytest

from mergekit_lite.answers.scorers.maths import Maths
from mergekit_lite.answers.scoring.registry import open_scorer
from mergekit_lite.answers.scoring.scorer import Score, ScorerSettings
from tests.answers.scorers.asked import judged

EQUAL = [
    ("1/2", r"so it is \boxed{0.5}"),
    (r"\frac{1}{2}", r"The answer is $\frac12$."),
    (r"\frac{3}{4}", "3/4 of the cake"),
    ("42", "First 7, then 41. The answer is 42."),
    ("1,234", "1234"),
    ("1234", "about $1,234$"),
    ("x^2+2x+1", "$(x+1)^2$"),
    (r"\{1,2\}", r"\boxed{\{2,1\}}"),
    (r"\sqrt{8}", r"$2\sqrt{2}$"),
    ("(1,2)", "$(1, 2)$"),
    (r"\boxed{7}", "7"),
    ("10\\%", "0.1"),
    ("5", "$x = 5$"),
]
DIFFERENT = [
    ("3", "4"),
    ("3", "-3"),
    (r"\frac{3}{7}", "3"),
    (r"\frac{3}{7}", "7"),
    (r"2\pi", "2"),
    ("x^2+1", "1"),
    ("(1,2)", "$(2, 1)$"),
    (r"\boxed{0.5}", r"it is not \boxed{0.5} but \boxed{0.25}"),
    ("0.333", "1/3"),
]


def settings(seconds: int) -> ScorerSettings:
    return ScorerSettings(name="maths", kind="maths", options={"seconds": seconds})


@pytest.fixture(scope="module")
def scorer():
    with open_scorer(settings(seconds=6)) as opened:
        yield opened


@pytest.mark.parametrize(("reference", "answer"), EQUAL)
def test_equal(scorer: Maths, reference: str, answer: str) -> None:
    assert scorer.score([judged(answer, reference=reference)]) == [Score(1.0)]


@pytest.mark.parametrize(("reference", "answer"), DIFFERENT)
def test_different(scorer: Maths, reference: str, answer: str) -> None:
    assert scorer.score([judged(answer, reference=reference)]) == [Score(0.0)]


def test_what_cannot_be_compared_says_why(scorer: Maths) -> None:
    found = scorer.score([judged("7"), judged("7", reference=""), judged("I don't know", reference="7")])
    assert found == [
        Score(None, "the prompt has no reference"),
        Score(None, "no maths in the reference"),
        Score(0.0, "no maths in the answer"),
    ]


def test_outside_the_main_thread(scorer: Maths) -> None:
    found: list[Score] = []
    thread = threading.Thread(target=lambda: found.extend(scorer.score([judged("1/2", reference="0.5")])))
    thread.start()
    thread.join()
    assert found == [Score(1.0)]


def test_only_the_end_of_an_endless_answer_is_read(scorer: Maths) -> None:
    assert scorer.score([judged("7 " * 100_000 + r"\boxed{8}", reference="8")]) == [Score(1.0)]


def test_a_process_that_hangs_or_dies_is_replaced(scorer: Maths, monkeypatch: pytest.MonkeyPatch) -> None:
    assert scorer.score([judged("1", reference="1")]) == [Score(1.0)]
    first = scorer._process
    assert first is not None
    monkeypatch.setattr(scorer, "_reply", lambda seconds: None)
    assert scorer.score([judged("1", reference="1")]) == [Score(None, "no verdict within 6 s")]
    monkeypatch.undo()
    assert first.poll() is not None  # killed
    assert scorer.score([judged("1", reference="1")]) == [Score(1.0)]
    second = scorer._process
    assert second is not None and second is not first
    second.kill()
    second.wait()
    assert scorer.score([judged("1", reference="1")]) == [Score(None, "no verdict within 6 s")]
    assert scorer.score([judged("1", reference="1")]) == [Score(1.0)]


@pytest.mark.parametrize("answer", [r"\boxed{9^{9^{9^{9}}}}", r"\boxed{(10^{10^{9}})!}"])
def test_what_takes_for_ever_is_given_up(answer: str) -> None:
    with open_scorer(settings(seconds=2)) as scorer:
        scorer.score([judged("1", reference="1")])  # started
        began = time.monotonic()
        [verdict] = scorer.score([judged(answer, reference="387420489")])
        assert verdict.value in (None, 0.0) and time.monotonic() - began < 30
        assert scorer.score([judged("1", reference="1")]) == [Score(1.0)]


def test_a_process_that_nobody_kills_ends_by_itself() -> None:
    """As where the process that asked was killed meanwhile."""
    code = (
        "import sys\nsys.modules['math_verify'] = sys\nfrom mergekit_lite.answers.scoring import math_worker\n"
        "math_worker.compared = lambda *question: exec('while True: pass')\nmath_worker.main(1, 1 << 30)"
    )
    command = [sys.executable, "-c", code]
    ended = subprocess.run(command, input=b'{"reference": "", "answer": ""}\n', capture_output=True, timeout=120)
    assert ended.returncode == -signal.SIGXCPU and ended.stdout == b"{}\n"
