"""The command line in a process that the page started: the same, but for progress, which it tells every second."""

from __future__ import annotations

from mergekit_lite import commands
from mergekit_lite.commands import screen


def start() -> None:
    """Run the command line."""
    screen.PLAIN_INTERVAL = 1.0
    commands.start()
