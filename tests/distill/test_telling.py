"""What the stages tell, on a terminal and in a pipe."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from mergekit_lite.commands import reporter
from mergekit_lite.commands.reporter import TerminalReporter, rate


def test_in_a_pipe_progress_is_a_line_now_and_then(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 5.0, 20.0, 25.0])
    monkeypatch.setattr(reporter.time, "monotonic", lambda: next(now))
    with TerminalReporter().progress("gemma", 1000, 200) as advance:
        for _ in range(3):
            advance(100)
    told = capsys.readouterr()
    assert not told.out
    assert told.err == "gemma   40%  400 of 1,000  10.0/s  60 s left\n"


def test_on_a_terminal_every_task_has_its_bar() -> None:
    teller = TerminalReporter()
    screen = io.StringIO()
    teller.err = Console(file=screen, force_terminal=True, width=100)
    with teller.progress("gemma", 10, 5) as one, teller.progress("qwen", 20) as other:
        one(2)
        other(20)
        teller.line("a step")
    assert teller._bars is None
    told = screen.getvalue()
    assert "gemma" in told and "7/10" in told and "20/20" in told and "a step" in told


def test_results_go_to_standard_output_and_warnings_are_never_quiet(capsys: pytest.CaptureFixture[str]) -> None:
    for quiet in (False, True):
        teller = TerminalReporter(quiet=quiet)
        teller.line("[pair] a line")
        teller.table(("name", ">count"), [("x", "1")])
        teller.warn("[look]")
        with teller.progress("x", 1) as advance:
            advance(1)
        told = capsys.readouterr()
        assert told.err == "Warning: [look]\n"
        assert (told.out == "") if quiet else ("[pair] a line" in told.out and "count" in told.out)


def test_slow_rates_are_told_by_the_minute() -> None:
    assert (rate(12.34), rate(0.05)) == ("12.3/s", "3.0/min")
