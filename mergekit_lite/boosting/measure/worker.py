"""The process of a worker: does the jobs that come over a socket, and ends with it.

The process that started it may die in any way: then the socket closes, and the system sends SIGKILL where it can. A
worker in the middle of a job ends at once, and its servers with it (``answers/watchdog.py``); else it ends in order.
"""

from __future__ import annotations

import os
import pickle
import queue
import signal
import threading
import traceback
from contextlib import suppress
from multiprocessing.connection import Connection
from typing import Any, NoReturn

from mergekit_lite.c_library import c_function
from mergekit_lite.errors import MergekitLiteError, RunError, UsageError

PR_SET_PDEATHSIG = 1


def main(descriptor: int) -> NoReturn:
    """Be a worker until there is no other end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the process that started it decides
    connection = Connection(descriptor)
    if (prctl := c_function("prctl")) is not None:
        prctl(PR_SET_PDEATHSIG, signal.SIGKILL)
    received: queue.SimpleQueue[Any] = queue.SimpleQueue()
    at_work = threading.Event()
    threading.Thread(target=_receive, args=(connection, received, at_work), daemon=True).start()
    try:
        maker = received.get()
        if isinstance(maker, BaseException):
            raise maker
        if maker is not None:
            with maker as do:
                while (job := received.get()) is not None:
                    for piece in do(job):
                        if piece.ended:
                            at_work.clear()
                        connection.send_bytes(pickle.dumps((piece, None)))
    except BaseException as failure:
        with suppress(OSError):
            connection.send_bytes(pickle.dumps((None, _sendable(failure))))
    os._exit(0)  # tearing torch down takes a while and frees nothing


def _receive(connection: Connection, received: queue.SimpleQueue[Any], at_work: threading.Event) -> None:
    """Pass on what comes: first what makes the function that does jobs, then jobs, None at the end."""
    try:
        while True:
            something = connection.recv()
            at_work.set()
            received.put(something)
    except (EOFError, OSError):
        if at_work.is_set():
            os._exit(1)
        received.put(None)
    except BaseException as failure:  # what was sent can't be unpacked here
        received.put(failure)


def _sendable(failure: BaseException) -> BaseException:
    """Return a failure, or where pickling loses it or its message one that says the same.

    Of a mistake of this package the traceback is worth more than the class.
    """
    if not isinstance(failure, MergekitLiteError):
        return RuntimeError(f"in a worker:\n{''.join(traceback.format_exception(failure))}")
    with suppress(Exception):
        if str(pickle.loads(pickle.dumps(failure))) == str(failure):
            return failure
    return UsageError(str(failure)) if isinstance(failure, UsageError) else RunError(str(failure))
