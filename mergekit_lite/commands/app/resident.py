"""A process that runs one command after the other and keeps the models that they load, as long as its server lives."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import traceback
from pathlib import Path
from typing import BinaryIO

from mergekit_lite.commands.app.programs import program

MOST_BYTES = 1 << 16  # of a command
PATIENCE = 600  # seconds without a command after which the models are let go
PROGRAM = program("resident")


class Resident:
    """The server's end of the process, which is there while models are kept.

    It gets commands by a socket, with the files that they need: the run's lock, and where they print to. The socket's
    end is its own, too, so that it outlives no server but for the answer that it is at.
    """

    def __init__(self, root: Path) -> None:
        """Start nothing yet."""
        self.root = root
        self._changing = threading.RLock()
        self._process: subprocess.Popen[bytes] | None = None
        self._line: socket.socket | None = None
        self._idle = threading.Timer(0, self.let_go)

    @property
    def holds(self) -> bool:
        """Whether the process is there."""
        process = self._process
        return self._line is not None and process is not None and process.poll() is None

    def give(self, arguments: list[str], lock: int, out: BinaryIO, said: BinaryIO) -> int:
        """Have a command run, and return the number of the process that does it."""
        with self._changing:
            self._idle.cancel()
            if not self.holds:
                self.let_go()
                self._begin()
            assert self._process is not None and self._line is not None
            socket.send_fds(self._line, [json.dumps(arguments).encode() + b"\n"], [lock, out.fileno(), said.fileno()])
            self._idle = threading.Timer(PATIENCE, self.let_go)
            self._idle.daemon = True
            self._idle.start()
            return self._process.pid

    def let_go(self) -> None:
        """End the process, once it has run what it was given."""
        with self._changing:
            self._idle.cancel()
            if self._line is not None:
                self._line.close()
                self._line = None
                threading.Thread(target=self._process.wait, daemon=True).start()  # type: ignore[union-attr]

    def _begin(self) -> None:
        if self._process is not None:
            self._process.wait()  # its memory is needed
        self._line, theirs = socket.socketpair()
        with theirs:
            self._process = subprocess.Popen(
                [*PROGRAM, str(theirs.fileno())], cwd=self.root, pass_fds=[theirs.fileno()], start_new_session=True,
                stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL,
            )  # fmt: skip


def start() -> None:
    """Run commands until the server closes its end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    from mergekit_lite.commands import main
    from mergekit_lite.previewing.preview import Kept

    kept, nowhere = Kept(), os.open(os.devnull, os.O_RDWR)
    with socket.socket(fileno=int(sys.argv[1])) as line:
        while True:
            written, files, _, _ = socket.recv_fds(line, MOST_BYTES, 3)
            if not written.endswith(b"\n"):
                os._exit(0)  # without tearing down what torch made
            lock, out, said = files
            os.dup2(out, 1)
            os.dup2(said, 2)
            try:
                signal.signal(signal.SIGINT, signal.default_int_handler)
                main(json.loads(written), prog_name="mergekit-lite", obj=kept)
            except (SystemExit, KeyboardInterrupt):
                pass
            except Exception:
                traceback.print_exc()
            finally:
                signal.signal(signal.SIGINT, signal.SIG_IGN)
                sys.stdout.flush()
                sys.stderr.flush()
                os.dup2(nowhere, 1)
                os.dup2(nowhere, 2)
                for file in (out, said, lock):
                    os.close(file)
