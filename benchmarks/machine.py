"""The machine that the figures were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO

from benchmarks.tables import size

LEFT_FREE = 1 << 28  # bytes of memory that the page cache isn't made to take
# asked of a child, so that this process stays small: see processes.own_peak
PROBE = """
import json, torch, mergekit_lite
gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
print(json.dumps({"torch": torch.__version__, "mergekit_lite": mergekit_lite.__version__, "gpu": gpu}))
"""


@dataclass(frozen=True)
class Machine:
    """The facts a reader needs to compare."""

    cpu: str
    cores: int
    memory: int
    system: str
    python: str
    torch: str
    mergekit_lite: str
    gpu: str | None

    def __str__(self) -> str:
        return (
            f"{self.cpu}, {self.cores} cores, {size(self.memory)} of memory, {self.gpu or 'no GPU'}; {self.system}; "
            f"Python {self.python}, torch {self.torch}; mergekit_lite {self.mergekit_lite}"
        )

    def as_data(self) -> dict[str, object]:
        """For results.json."""
        return asdict(self)


def this_machine() -> Machine:
    """Describe the machine, and the versions that a child process sees."""
    versions = json.loads(subprocess.run([sys.executable, "-c", PROBE], check=True, capture_output=True).stdout)
    return Machine(
        cpu=_cpu(),
        cores=len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1,
        memory=os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        system=f"{platform.system()} {platform.release()}",
        python=platform.python_version(),
        **versions,
    )


def available_memory() -> int | None:
    """Bytes a new process may take without swapping; None where the system doesn't tell."""
    return _memory("MemAvailable")


def fill_memory(holes: IO[bytes]) -> None:
    """Let the page cache take what memory is free, as it has on any machine that has run for a while.

    A virtual machine gets a page from its host when it first writes to it, and where it reports free pages it gives
    them back within seconds. Now and then a gigabyte of output takes 2.3 seconds of processor time then, and 0.3 else.
    What the page cache holds stays until a new page takes its place: here pages of a file of holes, each read once.
    """
    piece = memoryview(bytearray(1 << 20))  # small: no child is measured below this process
    holes.truncate(holes.tell() + (_memory("MemFree") or 0))  # at most: a system may make room as fast as it is taken
    while (_memory("MemFree") or 0) > LEFT_FREE and holes.readinto(piece):
        pass


def _memory(name: str) -> int | None:
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in facts.read_text().splitlines() if line.startswith(name))


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
