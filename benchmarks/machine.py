"""The machine that the figures were measured on."""

from __future__ import annotations

import json
import os
import platform
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from benchmarks.tables import size

LEFT_FREE = 1 << 30  # bytes of memory that aren't touched
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


def touch_memory(nbytes: int) -> None:
    """Write to some free memory once, and give it back: what is free since a moment ago is taken first again.

    A virtual machine gets a page from its host when it first writes to it. On a machine that had just started that made
    a gigabyte of output cost 2.1 seconds of processor time, and 0.2 later.
    """
    touched = min(nbytes, (_memory("MemFree") or 0) - LEFT_FREE)
    if touched > 0:
        subprocess.run([sys.executable, "-c", 'import sys; b"1" * int(sys.argv[1])', str(touched)], check=True)


def _memory(name: str) -> int | None:
    facts = Path("/proc/meminfo")
    if not facts.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in facts.read_text().splitlines() if line.startswith(name))


def _cpu() -> str:
    facts = Path("/proc/cpuinfo")
    lines = facts.read_text().splitlines() if facts.exists() else []
    return next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.processor())
