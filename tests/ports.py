"""Ports for servers that take no 0 for one."""

from __future__ import annotations

import random
import socket
from contextlib import suppress


def free_port() -> int:
    """Return a port of the loopback address that nobody has.

    It lies below those that systems give to connections, so that none is given it before the server takes it.
    """
    for port in random.SystemRandom().sample(range(10_000, 32_768), 1_000):
        with suppress(OSError), socket.socket() as probe:
            probe.bind(("127.0.0.1", port))
            return port
    raise AssertionError("no port is free")
