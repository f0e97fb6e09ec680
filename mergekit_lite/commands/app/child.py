"""The command line in a process that the page started: the same, but for progress, which it tells every second."""

from __future__ import annotations

from mergekit_lite.commands import screen, start

if __name__ == "__main__":
    screen.PLAIN_INTERVAL = 1.0
    start()
