"""One whole process, measured from its start to its end: wall time, processor time, peak memory."""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True, slots=True)
class Run:
    """What one process took.

    Attributes:
        wall: seconds from its start until it was gone.
        user, system: seconds of processor time, in the program and in the kernel for it.
        peak: most bytes resident at one time; never below ``own_peak()``, since a child inherits its parent's.
        others: cores that everything else on the machine kept busy meanwhile; None where the system doesn't tell.
    """

    wall: float
    user: float
    system: float
    peak: int
    others: float | None


def measured(command: Sequence[str]) -> Run:
    """Run a command to its end. Raises ClickException with the end of its messages where it fails."""
    with tempfile.TemporaryFile() as messages:
        busy = _busy_seconds()
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=messages)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            messages.seek(0)
            said = messages.read().decode(errors="replace")[-2000:]
            raise click.ClickException(f"This ended with exit code {process.returncode}: {' '.join(command)}\n{said}")
        cpu = usage.ru_utime + usage.ru_stime
        others = None if busy is None else max(0.0, ((_busy_seconds() or 0.0) - busy - cpu) / wall)
    return Run(wall, usage.ru_utime, usage.ru_stime, usage.ru_maxrss * RSS_UNIT, others)


def own_peak() -> int:
    """This process's own peak: the smallest that can be told of a child, so nothing large may be imported here."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def _busy_seconds() -> float | None:
    """Processor time of everything on this machine since it started, what a hypervisor took away included."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, counters.read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
