"""A hub on this machine that takes uploads: what ``push`` needs of its interface, on top of what downloads need."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from urllib.parse import unquote, urlparse

from tests.checkpoint.hub_server import Hub, Repository, _Handler, running

TOKEN = "hf_MARKEDtokenMARKEDtokenMARKEDtoken"


@dataclass
class PushHub(Hub):
    private: dict[str, bool] = field(default_factory=dict)
    blobs: dict[str, bytes] = field(default_factory=dict)  # by SHA-256
    uploads: list[str] = field(default_factory=list)  # of blobs, in order
    refused: dict[str, int] = field(default_factory=dict)  # statuses by the step that is answered so
    opens: bool = False  # whatever is created is public
    commits: int = 0
    bodies: list[bytes] = field(default_factory=list)  # of all requests


@contextmanager
def serving() -> Iterator[PushHub]:
    """Run an empty hub on a free port until the block ends."""
    with running(PushHub({}), _PushHandler) as hub:
        yield hub


class _PushHandler(_Handler):
    hub: PushHub

    def step(self, name: str) -> bool:
        """Whether a step may go on; it is answered with what the test said otherwise."""
        if self.headers.get("Authorization") != f"Bearer {TOKEN}":
            self.fail(401)
            return False
        if (status := self.hub.refused.get(name)) is not None:
            self.fail(status)
            return False
        return True

    def body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            body = b""
            while size := int(self.rfile.readline(), 16):
                body += self.rfile.read(size)
                self.rfile.readline()
            self.rfile.readline()
        else:
            body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.hub.bodies.append(body)
        return body

    def do_GET(self) -> None:
        if urlparse(self.path).path == "/api/whoami-v2":
            if self.step("whoami"):
                self.send(json.dumps({"name": "org", "type": "user"}).encode())
        else:
            super().do_GET()

    def do_POST(self) -> None:
        path = unquote(urlparse(self.path).path)
        body = self.body()
        self.ask(f"POST {path}")
        parts = path.strip("/").split("/")
        if path == "/api/repos/create":
            self.create(json.loads(body))
        elif path == "/api/validate-yaml":
            self.send(json.dumps({"errors": [], "warnings": []}).encode())
        elif parts[4:5] == ["preupload"]:
            self.preupload(json.loads(body))
        elif path.endswith("/info/lfs/objects/batch"):
            self.batch(json.loads(body))
        elif parts[4:5] == ["commit"]:
            self.commit_all("/".join(parts[2:4]), body)
        else:
            self.fail(404)

    def do_PUT(self) -> None:
        body = self.body()
        digest = self.path.rpartition("/")[2]
        assert hashlib.sha256(body).hexdigest() == digest
        if (status := self.hub.refused.get("put")) is not None and len(self.hub.uploads) >= 1:
            self.fail(status)
            return
        self.hub.blobs[digest] = body
        self.hub.uploads.append(digest)
        self.send(b"")

    def is_private(self, repo: str) -> bool:
        return self.hub.private[repo]

    def create(self, asked: dict[str, object]) -> None:
        if not self.step("create"):
            return
        name = f"{asked.get('organization') or 'org'}/{asked['name']}"
        if name in self.hub.repositories:
            self.fail(409)
            return
        self.hub.private[name] = not self.hub.opens and (
            asked.get("private") is True or asked.get("visibility") == "private"
        )
        first = "0" * 40
        self.hub.repositories[name] = Repository({"main": first}, {first: {".gitattributes": b"*.safetensors lfs\n"}})
        self.send(json.dumps({"url": f"{self.hub.url}/{name}", "name": name}).encode())

    def preupload(self, asked: dict[str, list[dict[str, str]]]) -> None:
        if self.step("preupload"):
            files = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in asked["files"]
            ]
            self.send(json.dumps({"files": files}).encode())

    def batch(self, asked: dict[str, list[dict[str, object]]]) -> None:
        if self.step("batch"):
            objects = []
            for each in asked["objects"]:
                entry: dict[str, object] = {**each}
                if each["oid"] not in self.hub.blobs:
                    entry["actions"] = {"upload": {"href": f"{self.hub.url}/blobs/{each['oid']}"}}
                objects.append(entry)
            self.send(json.dumps({"objects": objects, "transfer": "basic"}).encode())

    def commit_all(self, repository: str, body: bytes) -> None:
        if not self.step("commit"):
            return
        found = self.hub.repositories[repository]
        files = dict(found.files[found.revisions["main"]])
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, found.revisions["main"]):
                self.fail(412)
                return
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.hub.blobs[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        self.hub.commits += 1
        commit = f"{self.hub.commits:040x}"
        found.files[commit] = files
        found.revisions["main"] = commit
        url = f"{self.hub.url}/{repository}/commit/{commit}"
        self.send(json.dumps({"commitUrl": url, "commitOid": commit, "pullRequestUrl": None, "success": True}).encode())
