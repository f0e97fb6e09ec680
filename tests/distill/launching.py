"""Training in two processes, as ``accelerate launch`` starts them, held to training in one."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from tests.distill.training import figures, recipe, target, trained, weights, write_rows

ROOT = Path(__file__).parents[2]
TRAIN = ("-m", "tests.distill.training")


class Two:
    """The same training by one process, in ``one``, and by two, in ``two``."""

    def __init__(self, folder: Path, prepare: Callable[[Path], Any] | None = None, **stages: Any) -> None:
        """Train in one process. ``prepare`` is called with both folders, once they have rows."""
        self.folder = folder
        self.stages = [name for name in ("sft", "fuse", "preference") if name in stages]
        target(folder / "target")
        for name in ("one", "two"):
            write_rows(folder / name)
            if prepare is not None:
                prepare(folder / name)
        made = recipe(folder / "two", folder / "target", **stages)
        (folder / "two.json").write_text(made.model_dump_json())
        (folder / "one" / "target").symlink_to(folder / "target")
        threads = torch.get_num_threads()
        torch.set_num_threads(1)
        trained(folder / "one", **stages)
        torch.set_num_threads(threads)

    def launch(self, environment: Mapping[str, str], program: tuple[str, ...] = TRAIN, until: str = "") -> str:
        """Train in two processes, or kill both once a file of that name is in the trained folder; what they told.

        On a CPU ``accelerate launch`` starts one process only, whatever it is told.
        """
        command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone", *program]
        own = {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
        with (self.folder / "stdout").open("w+") as stdout, (self.folder / "stderr").open("w+") as stderr:
            process = subprocess.Popen(
                [*command, str(self.folder / "two.json")],
                env=os.environ | own | environment,
                stdout=stdout,
                stderr=stderr,
            )
            try:
                while process.poll() is None and not (until and (self.folder / "two" / "train" / until).exists()):
                    time.sleep(0.002)
            finally:
                if process.returncode is None:
                    family = [process, *psutil.Process(process.pid).children(recursive=True)]
                    for each in family:  # each of the two has a session of its own
                        each.kill()
                    psutil.wait_procs(family[1:])
                    process.wait()
        assert process.returncode == (-signal.SIGKILL if until else 0), (self.folder / "stderr").read_text()
        return (self.folder / "stdout").read_text()

    def check_alike(self) -> None:
        """Hold the figures and the published tensors to each other, but for the order in which floats are added."""
        for stage in self.stages:
            first, second = (self.folder / name / "train" / stage for name in ("one", "two"))
            expected, found = weights(first), weights(second)
            assert expected.keys() == found.keys()
            for tensor in expected:
                torch.testing.assert_close(found[tensor], expected[tensor], rtol=1e-3, atol=2e-5)
            for mine, other in zip(figures(first), figures(second), strict=True):
                assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)
