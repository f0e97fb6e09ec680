"""``python keeper.py COMMAND …``: runs a command that ends with whoever started it, however that ended.

Standard input is a pipe that nobody writes to. When it closes, the starter is gone, by SIGKILL maybe; then the whole
process group is ended, so what the command has started goes too. It imports nothing of the package, and starts at once.
"""

import os
import signal
import subprocess
import sys
import threading


def main() -> int:
    """The command's exit code."""
    signal.signal(signal.SIGTERM, lambda *_: None)  # it is the group's: the command ends by it, or doesn't
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
