"""A hub on this machine: enough of its HTTP interface to download models, and a log of what was asked for."""

from __future__ import annotations

import hashlib
import json
import re
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import TypeVar
from urllib.parse import unquote, urlparse

AnyHub = TypeVar("AnyHub", bound="Hub")
RANGE = re.compile(r"bytes=(\d+)-(\d+)")


@dataclass
class Repository:
    """Commits by revision name, and each commit's files.

    ``denied`` is the status and error code of every file; ``pushed`` the commit that ``main`` moves to once looked up.
    """

    revisions: dict[str, str]
    files: dict[str, dict[str, bytes]]
    denied: tuple[int, str | None] | None = None
    pushed: str | None = None


@dataclass
class Hub:
    repositories: dict[str, Repository]
    url: str = ""
    asked: list[str] = field(default_factory=list)
    held: dict[str, threading.Event] = field(default_factory=dict)  # requests that wait, by the end of what is asked
    status: int | None = None  # answers everything with this, if set

    @property
    def downloads(self) -> set[str]:
        """Names of the files whose content was sent."""
        return {
            path.split("/", 5)[5] for verb, path in map(str.split, self.asked) if verb == "GET" and "/resolve/" in path
        }


@contextmanager
def serve(repositories: dict[str, Repository]) -> Iterator[Hub]:
    """Run a hub on a free port until the block ends."""
    with running(Hub(repositories), _Handler) as hub:
        yield hub


@contextmanager
def running(hub: AnyHub, handler: type[_Handler]) -> Iterator[AnyHub]:
    """Let a handler answer for a hub on a free port until the block ends."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (handler,), {"hub": hub}))
    hub.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    hub: Hub
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def ask(self, asked: str) -> None:
        """Note what is asked, and hold it if the test says so."""
        self.hub.asked.append(asked)
        for end, let_go in list(self.hub.held.items()):
            if asked.endswith(end):
                let_go.wait()

    def do_HEAD(self) -> None:
        self.do_GET()

    def do_GET(self) -> None:
        path = unquote(urlparse(self.path).path)
        self.ask(f"{self.command} {path}")
        parts = path.strip("/").split("/")
        if self.hub.status is not None:
            self.fail(self.hub.status)
        elif parts[:2] == ["api", "models"]:
            self.answer_api("/".join(parts[2:4]), parts[4:])
        elif parts[2:3] == ["resolve"]:
            self.answer_file("/".join(parts[:2]), parts[3], "/".join(parts[4:]))
        else:
            self.fail(404)

    def answer_api(self, repo: str, rest: list[str]) -> None:
        found = self.hub.repositories.get(repo)
        if found is None:
            return self.fail(401, "RepoNotFound")
        commit = self.commit(found, "/".join(rest[1:]) if rest else "main")
        if commit is None:
            return self.fail(404, "RevisionNotFound")
        files = found.files[commit]
        if rest[:1] == ["tree"]:
            entries = [
                {"type": "file", "path": name, "size": len(content), "oid": hashlib.sha1(content).hexdigest()}
                for name, content in files.items()
            ]
            return self.send(json.dumps(entries).encode())
        found.revisions["main"] = found.pushed or found.revisions["main"]
        siblings = [{"rfilename": name} for name in files]
        told = {"id": repo, "sha": commit, "siblings": siblings, "private": self.is_private(repo)}
        return self.send(json.dumps(told).encode())

    def is_private(self, repo: str) -> bool:
        return False

    def answer_file(self, repo: str, revision: str, name: str) -> None:
        found = self.hub.repositories.get(repo)
        commit = self.commit(found, revision) if found else None
        if found is None or commit is None:
            return self.fail(404, "RevisionNotFound")
        if found.denied:
            return self.fail(*found.denied)
        if name not in found.files[commit]:
            return self.fail(404, "EntryNotFound")
        content = found.files[commit][name]
        return self.send(content, {"ETag": f'"{hashlib.sha1(content).hexdigest()}"', "X-Repo-Commit": commit})

    @staticmethod
    def commit(repository: Repository, revision: str) -> str | None:
        if revision in repository.files:
            return revision
        return repository.revisions.get(revision)

    def send(self, content: bytes, headers: dict[str, str] | None = None, status: int = 200) -> None:
        if status == 200 and (asked := RANGE.fullmatch(self.headers.get("Range", ""))):
            first, last = int(asked[1]), min(int(asked[2]), len(content) - 1)
            headers = {**(headers or {}), "Content-Range": f"bytes {first}-{last}/{len(content)}"}
            content, status = content[first : last + 1], 206
        self.send_response(status)
        for key, value in {"Content-Length": str(len(content)), **(headers or {})}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def fail(self, status: int, code: str | None = None) -> None:
        self.send(b"{}", {"X-Error-Code": code} if code else {}, status)
