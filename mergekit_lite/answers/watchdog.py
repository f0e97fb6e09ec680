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
from contextlib import suppress


def main() -> int:
    """Run the command and return its exit code."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # sent to the whole group: the command decides what to do
    try:
        process = subprocess.Popen(sys.argv[1:], stdin=subprocess.DEVNULL)
    except OSError as error:
        print(f"can't be started: {error.strerror}: {sys.argv[1]}", file=sys.stderr, flush=True)
        return 1
    threading.Thread(target=_end_with_starter, args=(process.pid,), daemon=True).start()
    code = process.wait()
    return code if code >= 0 else 128 - code


def end_all(process: int) -> None:
    """Kill a process that leads a group of its own, with all that it started; on Windows without the group."""
    if not hasattr(os, "killpg"):
        subprocess.run(["taskkill", "/F", "/T", "/PID", str(process)], capture_output=True)
        return
    with suppress(ProcessLookupError):
        os.killpg(process, signal.SIGKILL)


def _end_with_starter(command: int) -> None:
    os.read(0, 1)
    end_all(0 if hasattr(os, "killpg") else command)


if __name__ == "__main__":
    os._exit(main())
