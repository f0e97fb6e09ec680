"""A server of the user's own, started over a model and ended with all that it started.

The command is split into words, and no shell reads it. ``{model}`` and ``{port}`` in it stand for a folder or a name
on the hub, and for a free port. What the server prints goes to a file. It ends with the context, on Ctrl-C, and when
this process dies in any way (``watchdog.py``).
"""

from __future__ import annotations

import json
import os
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import partial
from http.client import HTTPException
from pathlib import Path
from typing import Any, NamedTuple
from urllib.request import Request, urlopen

from mergekit_lite.answers.watchdog import end_all
from mergekit_lite.errors import RunError, UsageError
from mergekit_lite.plain_text import plain_line

PLACES = ("{model}", "{port}")
STOP_SECONDS = 20.0  # that a server gets to stop by itself
POLL_SECONDS = 0.2
SHOWN = 15  # lines of a server's output that an error shows
SHOWN_BYTES = 20_000  # of its end
LONGEST_REPLY = 1 << 20  # bytes that are read of a list of models


class RunningServer(NamedTuple):
    """A server that is ready."""

    url: str  # ``http://127.0.0.1:port/v1``
    model: str  # the name by which it is asked for the model
    ended: Callable[[], str | None]  # says why it answers no more; None while it runs


def wrong_command(command: str) -> str | None:
    """Return what is wrong with a command that is to start a server; None for nothing."""
    try:
        words = split_command(command)
    except ValueError as error:
        return f"{command!r}: {error}"
    missing = [place for place in PLACES if not any(place in word for word in words)]
    if missing:
        return f"it lacks {' and '.join(missing)}: expected for instance 'vllm serve {{model}} --port {{port}}'"
    return None


def serve_words(command: str, option: str) -> list[str]:
    """Split a command into words. Raises UsageError, naming the option, where it can't start a server here."""
    if wrong := wrong_command(command):
        raise UsageError(f"{option}: {wrong}.")
    words = split_command(command)
    if shutil.which(words[0]) is None:
        raise UsageError(f"{option}: there is no program {words[0]!r} here.")
    return words


def split_command(command: str) -> list[str]:
    """Split a command as a shell would; on Windows a backslash is part of a path. Raises ValueError."""
    lexer = shlex.shlex(command, posix=True)
    lexer.whitespace_split, lexer.commenters = True, ""
    if os.sep == "\\":
        lexer.escape = ""
    return list(lexer)


@contextmanager
def serving(words: Sequence[str], model: str, log: Path, patience: float) -> Iterator[RunningServer]:
    """Start a server over a model, wait until it is ready, and end it with the context.

    Args:
        words: the command.
        model: fills ``{model}``.
        log: the file that takes what the server prints.
        patience: seconds that the server has to load the model.

    Raises:
        RunError: it ended, or wasn't ready in time; the message has the end of what it printed.
    """
    with serving_several(words, model, [log], patience) as (running,):
        yield running


@contextmanager
def serving_several(
    words: Sequence[str], model: str, logs: Sequence[Path], patience: float, group: tuple[int, int] = (0, 1)
) -> Iterator[list[RunningServer]]:
    """Start several servers over one model, as ``serving`` does, one for each log; they load it at the same time.

    ``{number}`` in the words stands for the number of a server, from 0: for instance that of its GPU. ``group`` are the
    number of this group of servers, and of all such groups that are started side by side: they number their servers
    on, and take no port of each other's.
    """
    ports: set[int] = set()
    with ExitStack() as stack:
        started = [
            stack.enter_context(_started(_numbered(words, number), model, log, ports, group))
            for number, log in enumerate(logs, group[0] * len(logs))
        ]
        stack.callback(_ask_to_stop, *(process for process, _ in started))  # all at once; then each is awaited
        yield [
            RunningServer(url, _wait(process, url, model, patience, log), partial(_ended, process, log))
            for (process, url), log in zip(started, logs, strict=True)
        ]


def _numbered(words: Sequence[str], number: int) -> list[str]:
    return [word.replace("{number}", str(number)) for word in words]


def _ended(process: subprocess.Popen[bytes], log: Path) -> str | None:
    code = process.poll()
    return None if code is None else f"The server ended with exit code {code}.{_said(log)}"


@contextmanager
def _started(
    words: Sequence[str], model: str, log: Path, ports: set[int], group: tuple[int, int]
) -> Iterator[tuple[subprocess.Popen[bytes], str]]:
    """Start the server in a process group that ends with this context or process; yield its process and URL.

    It gets a free port of its group that is none of ``ports``, which is added to them.
    """
    port = next(port for port in iter(partial(_free_port, *group), None) if port not in ports)
    ports.add(port)
    filled = [word.replace("{port}", str(port)).replace("{model}", model) for word in words]
    watched = [sys.executable, "-I", "-S", str(Path(__file__).with_name("watchdog.py")), *filled]
    log.parent.mkdir(parents=True, exist_ok=True)
    with log.open("wb") as output:
        process = subprocess.Popen(watched, stdin=subprocess.PIPE, stdout=output, stderr=output, start_new_session=True)
    try:
        yield process, f"http://127.0.0.1:{port}/v1"
    finally:
        _stop(process)


def _ask_to_stop(*processes: subprocess.Popen[bytes]) -> None:
    for process in processes:
        if not hasattr(os, "killpg"):  # on Windows nothing asks
            end_all(process.pid)
            continue
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGTERM)


def _stop(process: subprocess.Popen[bytes]) -> None:
    """End a process and all it started: SIGTERM first, then SIGKILL."""
    _ask_to_stop(process)
    with suppress(subprocess.TimeoutExpired):
        process.wait(STOP_SECONDS)
    end_all(process.pid)
    process.wait()
    if process.stdin is not None:
        process.stdin.close()


def _wait(process: subprocess.Popen[bytes], url: str, model: str, patience: float, log: Path) -> str:
    """Wait until the server is ready, and return the name by which it is asked for the model."""
    until = time.monotonic() + patience
    while time.monotonic() < until:
        if process.poll() is not None:
            raise RunError(f"The server ended with exit code {process.returncode} before it was ready.{_said(log)}")
        if (name := _name(url, model, until)) is not None:
            return name
        time.sleep(POLL_SECONDS)
    raise RunError(f"The server was not ready after {patience:g} s: nothing sound at {url}/models.{_said(log)}")


def _name(url: str, model: str, until: float) -> str | None:
    """Return the name of the model at a server; None while it isn't ready.

    Servers list what they serve, and most call it as they were told. ``transformers serve`` lists what is in the hub's
    cache instead, perhaps nothing, and takes the name that it was given alone; ``mlx_lm.server`` does, and loads any
    model that it is asked for. So a server that lists other names is asked by the one it was given, and by the first
    that it lists only where it refuses that. It may load the model with that question: it has until then to answer.
    """
    listed = _reply(f"{url}/models", 5)
    entries = listed.get("data") if isinstance(listed, dict) else None
    entries = [each for each in entries if isinstance(each, dict)] if isinstance(entries, list) else []
    names = [each["id"] for each in entries if isinstance(each.get("id"), str)]
    if model in names:
        return model
    for each in entries:
        if each.get("root") == model and each.get("id") in names:  # vLLM's and SGLang's word for it
            return str(each["id"])
    if names:
        asked = {"messages": [{"role": "user", "content": "?"}], "max_tokens": 1, "seed": 0}
        left = max(1.0, until - time.monotonic())
        answers = _reply(f"{url}/chat/completions", left, {"model": model, **asked}) is not None
        return model if answers else names[0]
    return model if _reply(f"{url.removesuffix('/v1')}/health", 5) is not None else None


def _reply(address: str, seconds: float, asked: object = None) -> Any:
    """Return what a server says, as JSON; an empty text where it says something else, None for an error."""
    data = None if asked is None else json.dumps(asked).encode()
    request = Request(address, data, {"Content-Type": "application/json"})
    try:
        with urlopen(request, timeout=seconds) as response:
            text = response.read(LONGEST_REPLY)
    except (OSError, ValueError, HTTPException):
        return None
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return ""


def _said(log: Path) -> str:
    with log.open("rb") as file:
        file.seek(max(0, file.seek(0, 2) - SHOWN_BYTES))
        text = file.read().decode(errors="replace")
    lines = [plain_line(line) for line in text.splitlines()[-SHOWN:]]
    return "\n".join([" It said:", *(f"  {line}" for line in lines)]) if lines else " It said nothing."


def _free_port(place: int, groups: int) -> int:
    """Return a free port whose number leaves ``place`` when it is divided by the number of groups.

    Linux gives out ports of one parity alone as long as it can, so from the one that it gives the next of the group is
    taken, if that is free.
    """
    while True:
        with socket.socket() as probe, socket.socket() as ours:
            probe.bind(("127.0.0.1", 0))
            given: int = probe.getsockname()[1]
            port = given + (place - given) % groups
            if port == given:
                return port
            with suppress(OSError, OverflowError):
                ours.bind(("127.0.0.1", port))
                return port
