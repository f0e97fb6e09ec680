"""The commands that run modules of this folder in processes of their own."""

from __future__ import annotations

import sys
from pathlib import Path

# Modules come from where this one came from, never from the folder of the models, in which commands are run.
PATHS = [str(Path(__file__).parents[3]), *(path for path in sys.path if Path(path).is_absolute())]


def program(module: str) -> tuple[str, ...]:
    """Return the command of a module of this folder, which has a ``start``.

    As long as it is imported, an interruption ends it without a traceback.
    """
    silent = "import signal, sys; signal.signal(signal.SIGINT, signal.SIG_DFL)"
    begin = f"sys.path[:] = {PATHS}; from {__package__}.{module} import start; start()"
    return sys.executable, "-c", f"{silent}; {begin}"
