"""One whole command, measured from its start to its end: wall time, processor time, peak memory.

Memory that processes share is counted once: a command's is the sum of its processes' proportional sets (PSS), looked at
twice a second, or its largest process's peak where that is more.
"""

from __future__ import annotations

import os
import resource
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import click

LOOK_EVERY = 0.5  # seconds: a look takes 2 ms for each process with torch in it, and holds up what it touches
RSS_UNIT = 1 if sys.platform == "darwin" else 1024  # of ru_maxrss


@dataclass(frozen=True, slots=True)
class Run:
    """The time and memory of one process.

    Attributes:
        wall: seconds from its start until it was gone.
        user, system: seconds of processor time, in the program and in the kernel for it.
        peak: most bytes in memory at one time; never below ``own_peak()``, since a child inherits its parent's.
        others: cores that everything else on the machine kept busy meanwhile; None where the system doesn't tell.
    """

    wall: float
    user: float
    system: float
    peak: int
    others: float | None


def measured(command: Sequence[str], server: int | None = None) -> Run:
    """Run a command to its end. Raises ClickException with the end of its messages where it fails.

    What the process ``server`` does for it meanwhile is neither its time nor others'.
    """
    with tempfile.TemporaryFile() as messages:
        busy = busy_seconds()
        served = seconds_of(server) if server is not None and busy is not None else 0.0
        started = time.perf_counter()
        process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=messages)
        together = _Together(process.pid)
        try:
            _, status, usage = os.wait4(process.pid, 0)
        except KeyboardInterrupt:
            process.kill()
            process.wait()
            raise
        finally:
            together.stop()
        wall = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            messages.seek(0)
            said = messages.read().decode(errors="replace")[-2000:]
            raise click.ClickException(f"This ended with exit code {process.returncode}: {' '.join(command)}\n{said}")
        cpu = usage.ru_utime + usage.ru_stime
        known = cpu + (seconds_of(server) - served if server is not None and busy is not None else 0.0)
        others = None if busy is None else max(0.0, ((busy_seconds() or 0.0) - busy - known) / wall)
    return Run(wall, usage.ru_utime, usage.ru_stime, max(usage.ru_maxrss * RSS_UNIT, together.peak), others)


class _Together:
    """Looks at the memory of a process and of those it started, until it is stopped."""

    def __init__(self, pid: int) -> None:
        self.peak = 0
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._look, args=(pid,), daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Look no more."""
        self._stopped.set()
        self._thread.join()

    def _look(self, pid: int) -> None:
        while not self._stopped.wait(LOOK_EVERY):
            self.peak = max(self.peak, _memory(pid))


def _memory(pid: int) -> int:
    """Bytes of a process and of all it started; 0 where the system doesn't tell, or they are gone."""
    try:
        lines = Path(f"/proc/{pid}/smaps_rollup").read_text().splitlines()
        own = next(int(line.split()[1]) * 1024 for line in lines if line.startswith("Pss:"))
        children = [
            child for task in Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()
        ]
    except (OSError, StopIteration):
        return 0
    return own + sum(map(_memory, map(int, children)))


def seconds_of(pid: int) -> float:
    """Return the processor time of a process since it started. Raises OSError where it is gone or can't be seen."""
    user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]  # a name may hold anything
    return (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")


def own_peak() -> int:
    """Return this process's peak: no child's can be measured below it, so nothing large may be imported here."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * RSS_UNIT


def busy_seconds() -> float | None:
    """Processor time of everything on this machine since it started, what a hypervisor took away included."""
    counters = Path("/proc/stat")
    if not counters.exists():
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal, *_ = map(
        int, counters.read_text().split("\n")[0].split()[1:]
    )
    return (user + nice + system + irq + softirq + steal) / os.sysconf("SC_CLK_TCK")
