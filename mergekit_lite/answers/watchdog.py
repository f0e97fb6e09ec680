"""``python watchdog.py COMMAND …``: runs a command and ends it when the process that started it has ended in any way.

Standard input is a pipe that nobody writes to. When it closes, the starter has ended, perhaps by SIGKILL; then the
whole process group is killed, with all that the command has started. This program imports nothing of the package, so
it starts at once.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """Run the command and return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to the whole group: the command decides what to do
    try:
        process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"can't be started: {error.strerror}: {sys.argv[1]}", file=sys.stderr, flush=True)
        return 1
    threading.Thread(target=_end_with_starter, daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def _end_with_starter() -> None:
    os.read(0, 1)
    os.killpg(0, signal.SIGKILL)


if __name__ == "__main__":
    os._exit(main())
