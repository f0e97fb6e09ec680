"""Workers of a Ray cluster by themselves: what they ask of Ray, and what they tell while they work."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# Ray counts the GPUs that it is told of, whether they are there or not.
GPUS = """
import os, tempfile, time
from pathlib import Path
import ray
from mergekit_lite.engine.ray_workers import Cluster

for further in (True, True, False):  # on a busy machine Ray gives up its start
    try:
        ray.init(address="local", num_cpus=1, num_gpus=2, object_store_memory=80 << 20, include_dashboard=False)
        break
    except Exception:
        if not further:
            raise
        ray.shutdown()
together, there = 3, tempfile.mkdtemp()

def worker():
    def do(task):
        Path(there, str(os.getpid())).touch()
        until = time.monotonic() + 120  # the other worker may start late
        while len(os.listdir(there)) < 2 and time.monotonic() < until:
            time.sleep(0.1)
        return os.getpid(), tuple(ray.get_gpu_ids()), os.environ["CUDA_VISIBLE_DEVICES"]
    return do

cluster = Cluster(lambda: None, local=True, gpus=True, threads=together)
seen = list(cluster.run(range(4 * together), worker))
of_process = {process: (gpus, visible) for process, gpus, visible in seen}
assert len(seen) == 4 * together and len(of_process) == 2, seen
assert sorted(visible for _, visible in of_process.values()) == ["0", "1"], of_process
assert all([str(gpu) for gpu in gpus] == [visible] for gpus, visible in of_process.values()), of_process
"""

NEWS = """
import time
from mergekit_lite.engine import ray_workers
from mergekit_lite.engine.ray_cluster import connected

ray_workers.NEWS_EVERY = 0.2
STEPS, SIZE = 40, 100

def worker():
    from mergekit_lite.engine.news import MADE  # that of the worker's own process

    def do(task):
        for _ in range(STEPS):
            time.sleep(0.1)
            MADE.add(SIZE)
        return task
    return do

with connected("local:2") as cluster:
    for _ in range(2):  # of the second round the first one's figures are no news
        told, shown, done = [], [], 0

        def heard(ahead):
            told.append(ahead)
            (node,) = cluster.nodes.values()
            assert node.ahead == ahead and (not ahead or node.rate > 0)
            shown.append(done + ahead)

        cluster.on_news = heard
        for _ in cluster.run(range(4), worker, lambda task: STEPS * SIZE):
            done += STEPS * SIZE
        assert max(told) <= 3 * STEPS * SIZE and sum(ahead > 0 for ahead in told) > 2, told
        assert all(later >= before for before, later in zip(shown, shown[1:], strict=False)), shown
        assert cluster.on_news is None
    (node,) = cluster.nodes.values()
    assert node.nbytes == 2 * 4 * STEPS * SIZE and node.tasks == 8
"""

HANGS = """
import os, signal, tempfile, time
from pathlib import Path
from mergekit_lite.engine import ray_round
from mergekit_lite.engine.ray_cluster import connected

ray_round.LATE = 3.0
there = tempfile.mkdtemp()

def worker():
    def do(task):
        try:
            Path(there, "stopped").touch(exist_ok=False)
        except FileExistsError:
            time.sleep(0.1)
            return task, os.getpid()
        Path(there, "stopped").write_text(str(os.getpid()))
        os.kill(os.getpid(), signal.SIGSTOP)
    return do

with connected("local:2") as cluster:
    for _ in range(2):
        assert sorted(task for task, _ in cluster.run(range(12), worker)) == list(range(12))
    stopped = int(Path(there, "stopped").read_text())
    assert stopped not in {process for _, process in cluster.run(range(12), worker)}
    (node,) = cluster.nodes.values()
    assert node.lost == 1  # which is told
"""


def run(code: str) -> None:
    ended = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr


@pytest.mark.slow
def test_each_worker_has_a_gpu_of_its_own() -> None:
    """With ``--device cuda`` there are as many workers as GPUs, whatever the processors, and each sees one."""
    run(GPUS)


@pytest.mark.slow
def test_what_is_made_of_long_tasks_is_told_before_they_are_done() -> None:
    run(NEWS)


@pytest.mark.slow
def test_a_worker_that_hangs_is_not_waited_for() -> None:
    """An idle one does its tasks, each is done once to who asked, and later tasks are given to others."""
    run(HANGS)
