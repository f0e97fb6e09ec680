"""A Ray cluster of several nodes on this machine, in processes of its own: the tests' own process never loads Ray."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any

from mergekit_lite.engine.ray_cluster import GAVE_UP, TRIES

ROOT = Path(__file__).parents[1]
STORE = 80 << 20  # bytes of each node's object store
QUIET = {"RAY_USAGE_STATS_ENABLED": "0"}


class RayNodes:
    """A cluster of nodes with one processor each; it ends with its context.

    The first node holds the cluster together: of it only the head's own process can be killed.
    """

    def __init__(self, count: int, address: str = "", **environment: str) -> None:
        """Start it; ``address`` is this machine's among those of the nodes, which get an ``environment``."""
        self._host = subprocess.Popen(
            [sys.executable, "-m", "tests.ray_nodes", str(count), address],
            cwd=ROOT,
            env=os.environ | QUIET | environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
        self._others: list[subprocess.Popen[bytes]] = []
        self.address = self._line()
        assert self.address, "Ray did not start"

    def __enter__(self) -> RayNodes:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        for other in self._others:
            end_group(other)
        assert self._host.stdin and self._host.stdout
        self._host.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._host.wait(30)
        end_group(self._host)
        self._host.stdout.close()

    def _line(self) -> str:
        assert self._host.stdout
        return self._host.stdout.readline().strip()

    @property
    def host(self) -> int:
        """The process that started the nodes."""
        return self._host.pid

    def kill(self) -> None:
        """Kill all processes of the newest node."""
        assert self._told("kill") == "killed"

    def kill_head(self) -> None:
        """Kill the process by which the nodes find each other."""
        assert self._told("kill head") == "killed"

    def add(self) -> None:
        """Add a node like the others."""
        assert self._told("add") == "added"

    @property
    def alive(self) -> int:
        """The number of nodes that the first one knows to be alive."""
        return int(self._told("count"))

    def _told(self, line: str) -> str:
        assert self._host.stdin
        self._host.stdin.write(f"{line}\n")
        self._host.stdin.flush()
        return self._line()

    def join(self, first: str, *options: str, inside: tuple[str, ...] = (), **environment: str) -> None:
        """Add a node by ``ray start``, in a mount namespace of its own, where shell commands are run ``first``.

        ``inside`` is a command that runs it elsewhere, such as ``ip netns exec``.
        """
        ray = f"{sys.executable} -m ray.scripts.scripts start --address={self.address} --num-cpus=1 --block"
        start = f"{ray} --object-store-memory={STORE} {' '.join(options)}"
        script = f"{first}\nwhile true; do {start} || true; done"  # on a busy machine Ray gives up early
        self._others.append(
            subprocess.Popen(
                [*inside, "unshare", "--mount", "sh", "-ec", script],
                env=os.environ | QUIET | environment,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                start_new_session=True,
            )
        )


def end_group(process: subprocess.Popen[bytes] | subprocess.Popen[str]) -> None:
    """Kill a process and all that it started in its session."""
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def patiently(start: Callable[[], Any]) -> Any:
    """Start a node, again where Ray gave it up: it waits for 30 s, which is too short on a busy machine."""
    for further in reversed(range(TRIES)):
        try:
            return start()
        except Exception as error:
            if not further or GAVE_UP not in str(error).lower():
                raise
    return None


def host(count: int, address: str) -> None:
    """Start a cluster, print its address, and obey lines of standard input until it ends."""
    from ray.cluster_utils import Cluster

    options = {"num_cpus": 1, "object_store_memory": STORE, "include_dashboard": False}
    options |= {"include_log_monitor": False, "no_monitor": True}  # processes that take seconds to start
    options |= {"node_ip_address": address} if address else {}
    cluster = patiently(lambda: Cluster(initialize_head=True, head_node_args=options))

    def added() -> Any:
        return patiently(lambda: cluster.add_node(num_cpus=1, object_store_memory=STORE))

    nodes = [added() for _ in range(count - 1)]
    print(cluster.address, flush=True)
    for line in sys.stdin:
        if line == "kill\n":
            for processes in nodes.pop().all_processes.values():
                for process in processes:
                    os.kill(process.process.pid, signal.SIGKILL)
            print("killed", flush=True)
        elif line == "kill head\n":
            (head,) = cluster.head_node.all_processes["gcs_server"]
            os.kill(head.process.pid, signal.SIGKILL)
            print("killed", flush=True)
        elif line == "count\n":
            print(sum(node["Alive"] for node in cluster.global_state.node_table()), flush=True)
        else:
            nodes.append(added())
            print("added", flush=True)
    cluster.shutdown()


def processes_in(folder: Path) -> set[str]:
    """Return the processes, by their numbers, that work or have something in a folder, such as those of a cluster."""
    found = set()
    for path in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if str(folder) in f"{(path / 'cwd').readlink()} {(path / 'cmdline').read_bytes()!r}":
                found.add(path.name)
    return found


def wait_for(condition: Callable[[], bool], seconds: float = 3600) -> None:
    """Wait until something holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not come about"
        time.sleep(0.02)


if __name__ == "__main__":
    host(int(sys.argv[1]), sys.argv[2])
