"""The head of a Ray cluster, by whose address others find it: whether it answers.

Without it Ray's calls wait, and after a minute it ends this process by itself, with a line of its log. So it is looked
after before those calls.
"""

from __future__ import annotations

import socket
import time
from dataclasses import dataclass
from typing import Any

from mergekit_lite.errors import GOES_ON, RunError

PATIENCE = 30.0  # seconds for which a head may be out of reach; Ray itself has 60
LOOK_EVERY, TIMEOUT = 1.0, 5.0  # seconds


@dataclass(frozen=True)
class Head:
    """The head at an address, ``HOST:PORT``."""

    address: str

    def answers(self) -> bool:
        """Return whether something takes connections there."""
        host, _, port = self.address.rpartition(":")
        try:
            socket.create_connection((host.strip("[]"), int(port)), TIMEOUT).close()
        except (OSError, ValueError, OverflowError):
            return False
        return True

    def wait(self) -> None:
        """Wait until it answers. Raises RunError where it doesn't."""
        until = time.monotonic() + PATIENCE
        while not self.answers():
            if time.monotonic() > until:
                raise RunError(
                    f"Ray: the head of the cluster, {self.address}, has not answered for {PATIENCE:.0f} seconds. "
                    f"Start a cluster again. {GOES_ON}"
                )
            time.sleep(LOOK_EVERY)


def head_of(ray: Any) -> Head:
    """Return the head of the cluster that this process is connected to."""
    return Head(ray.get_runtime_context().gcs_address)
