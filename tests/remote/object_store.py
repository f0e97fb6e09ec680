"""A proxy before an object store on this machine that spoils requests."""

from __future__ import annotations

import hashlib
import http.client
import os
import random
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import unquote

from mergekit_lite.output import remote_target
from tests.stores.object_stores import Store


def set_up(variables: dict[str, str]) -> None:
    """Set variables of the environment; to be called in a new process."""
    os.environ.update(variables)


def long_after(variables: dict[str, str]) -> None:
    """Set variables as well, and let runs that were killed count as dead at once."""
    set_up(variables)
    remote_target.DEAD = 0.0


@dataclass
class Proxy:
    """How a proxy treats requests, and what it saw: (method, path, what was done to it)."""

    url: str
    share: float = 0.0  # of the requests that fail
    cut: list[str] = field(default_factory=list)  # the answer to the next request whose path holds this is cut
    hold: str = ""  # uploads whose path holds this wait until the end
    ended: threading.Event = field(default_factory=threading.Event)
    delay: float = 0.0  # seconds before each upload of bytes
    seed: int = 0
    conditional: bool = False  # whether writes on condition are honoured, as rclone's server doesn't
    seen: list[tuple[str, str, str]] = field(default_factory=list)


@contextmanager
def spoiling(store: Store, **settings: object) -> Iterator[tuple[Store, Proxy]]:
    """Run a proxy in front of a store; yields the store as seen through it."""
    proxy = Proxy("", **settings)  # type: ignore[arg-type]
    handler = type(
        "Handler",
        (_Handler,),
        {
            "proxy": proxy,
            "behind": store.url.removeprefix("http://"),
            "draws": random.Random(proxy.seed),
            "root": store.root,
        },
    )
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    proxy.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield store.at(proxy.url), proxy
    finally:
        proxy.ended.set()
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    proxy: Proxy
    behind: str
    root: Path
    draws: random.Random
    protocol_version = "HTTP/1.1"
    lock = threading.Lock()

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        length = int(self.headers.get("Content-Length") or 0)
        body = self.rfile.read(length)
        with self.lock:
            fails = self.draws.random() < self.proxy.share
            how = self.draws.choice(["503", "cut before", "cut after", "cut within"]) if fails else ""
        path = unquote(self.path)
        if self.proxy.cut and self.proxy.cut[0] in path:
            self.proxy.cut.pop(0)
            how = "cut within"
        self.proxy.seen.append((self.command, path, how))
        if self.command == "PUT" and self.proxy.hold and self.proxy.hold in path:
            self.proxy.ended.wait(120)
            self.close_connection = True
            return
        if self.command == "PUT":
            time.sleep(self.proxy.delay)
        if how == "cut before":
            self.close_connection = True
            return
        if how == "503":
            self.answer(503, [], b"<Error><Code>SlowDown</Code><Message>slow down</Message></Error>")
            return
        if self.proxy.conditional and not self.holds():
            self.answer(412, [], b"<Error><Code>PreconditionFailed</Code></Error>")
            return
        status, headers, content = self.forward(body)
        if how == "cut after":
            self.close_connection = True
            return
        self.answer(status, headers, content, within=how == "cut within")

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def holds(self) -> bool:
        """Whether the request's conditions hold; rclone tells the MD5 of a file as its etag."""
        path = self.root / unquote(self.path.partition("?")[0]).strip("/")
        there = hashlib.md5(path.read_bytes()).hexdigest() if path.is_file() else None
        wanted = self.headers.get("If-Match")
        is_new = self.headers.get("If-None-Match") == "*"
        return not (is_new and there is not None) and not (wanted and wanted.strip('"') != there)

    def forward(self, body: bytes) -> tuple[int, list[tuple[str, str]], bytes]:
        connection = http.client.HTTPConnection(self.behind, timeout=60)
        try:
            connection.putrequest(self.command, self.path, skip_host=True, skip_accept_encoding=True)
            for name, value in self.headers.items():
                connection.putheader(name, value)
            connection.endheaders(body or None)
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()

    def answer(self, status: int, headers: list[tuple[str, str]], content: bytes, *, within: bool = False) -> None:
        self.send_response(status)
        has_length = False
        for name, value in headers:
            if name.lower() not in ("transfer-encoding", "connection", "date", "server"):
                has_length |= name.lower() == "content-length"
                self.send_header(name, value)
        if not has_length:
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        with suppress(OSError):
            if self.command != "HEAD":
                self.wfile.write(content[: len(content) // 2] if within else content)
        if within:
            self.close_connection = True
