"""Answers of servers that mean no good, and answers that come late."""

from __future__ import annotations

import base64
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from types import SimpleNamespace
from typing import Any

import pytest

from mergekit_lite import store_process
from mergekit_lite.checkpoint.stores import addresses, http, mirror, objects, ranges, source, web
from mergekit_lite.checkpoint.stores.remote_file import RemoteFile
from mergekit_lite.checkpoint.stores.source import AT_ONCE, DESCRIPTION, Source
from mergekit_lite.errors import CheckpointError, RunError, UsageError
from mergekit_lite.input_files import MAX_BYTES
from mergekit_lite.object_stores import is_final, parse_place, without_secrets


@pytest.mark.parametrize("location", ["http://host:99999999/x", "http://[::1", "http://host:x/", "http://hést/é"])
def test_redirections_to_no_address(location: str) -> None:
    with pytest.raises(http.Unanswered, match="no address"):
        http._target("http://host/model", location)


def test_pages_name_files_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """What can't be a file's name is not asked for, and gets into no message."""
    links = ["config.json", "..%2fx", "%2e%2e", "a%1b%5b31mb", "a%0ab", "unet/", "http://[bad", "x?y", DESCRIPTION]
    page = "".join(f'<a href="{link}">' for link in links).encode()
    monkeypatch.setattr(web, "_answer", lambda *_: (200, {"content-type": "text/html"}, page))
    assert web._links("https://host/model/") == (["config.json"], ["unet"])
    monkeypatch.setattr(web, "MAX_PAGE", len(page))
    with pytest.raises(CheckpointError, match="longer than"):
        web._links("https://host/model/")


def test_folders_of_very_many_files(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are refused before each is asked for, whoever lists them; eight are asked for at once."""
    asked, at_once, most = 0, 0, 0

    def head(url: str) -> RemoteFile:
        nonlocal asked, at_once, most
        asked, at_once = asked + 1, at_once + 1
        most = max(most, at_once)
        time.sleep(0.001)
        at_once -= 1
        return RemoteFile(url, 1, "")

    monkeypatch.setattr(source, "MOST_FILES", 100)
    monkeypatch.setattr(web, "_head", head)
    for count in (100, 101):
        monkeypatch.setattr(web, "_links", lambda _, count=count: ([f"{n}.bin" for n in range(count)], []))
        if count == 100:
            assert len(web.source("https://host/model", "").listed("")) == 100 == asked and most <= AT_ONCE
    with pytest.raises(CheckpointError, match=r"https://host/model: has 101 files, more than 100"):
        web.source("https://host/model", "").listed("")
    assert asked == 100
    by_name = Source("https://host/model", lambda _: ({}, []), head)
    found = by_name.some({f"{n}.bin" for n in range(100)})
    assert list(found) == sorted(found) and len(found) == 100 and asked == 200 and 1 < most <= AT_ONCE
    with pytest.raises(CheckpointError, match=r"https://host/model: has 101 files"):
        by_name.some({f"{n}.bin" for n in range(101)})
    assert asked == 200
    listed = {f"{n}.bin": (1, "") for n in range(101)}
    monkeypatch.setattr(store_process, "ask", lambda *_: (listed, []))
    with pytest.raises(CheckpointError, match=r"s3://bucket/model: has 101 files"):
        objects.source("s3://bucket/model", "").listed("")


def test_an_answer_that_nobody_waited_for_is_none_to_the_next_question(monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(_: object) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(store_process, "_receive", interrupted)
    with pytest.raises(KeyboardInterrupt):
        store_process.ask("sign", "s3://bucket/one")
    assert store_process._process is None


@pytest.mark.skipif(not hasattr(os, "fork"), reason="there is no fork here")
@pytest.mark.parametrize("module", [store_process, http, ranges])
def test_a_fork_waits_for_no_thread_of_its_parent(module: Any) -> None:
    """A thread that holds a lock at the fork isn't in the fork, and never gives it back there."""
    held, over = threading.Event(), threading.Event()

    def hold() -> None:
        with module._lock:
            held.set()
            over.wait()

    thread = threading.Thread(target=hold)
    thread.start()
    held.wait()
    child = os.fork()
    if child == 0:
        with module._lock:
            os._exit(0)
    until = time.monotonic() + 120
    while (ended := os.waitpid(child, os.WNOHANG)) == (0, 0) and time.monotonic() < until:
        time.sleep(0.01)
    over.set()
    thread.join()
    if ended == (0, 0):
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    assert ended == (child, 0)


def test_a_file_that_changed_is_asked_for_by_its_new_etag() -> None:
    files = [RemoteFile("https://host/x", 10, etag) for etag in ("one", "two", "W/three", "")]
    asked = [addresses.address_of(file).headers.get("If-Match") for file in files]
    assert asked == ['"one"', '"two"', None, None]


def test_answers_that_are_worth_asking_again() -> None:
    for status, final in {"400": True, "404": True, "412": True, "408": False, "429": False, "503": False}.items():
        assert is_final(OSError(f"error response from server: status code: {status} Told")) is final


def test_places_that_stores_take_for_others() -> None:
    for url in ("s3://b/a//x", "s3://b//x", "s3://b/./x", "s3://b/a/../x"):
        with pytest.raises(UsageError, match=r"is no URL that can be opened|can't be read or written"):
            parse_place(url)
    assert parse_place("s3://b/a/x/").key == "a/x" and parse_place("s3://b").key == ""


def test_texts_without_secrets() -> None:
    for text in (
        "s3://bucket: is gone", "https://host:8080: is gone", 'at "http://127.0.0.1:9000"', "http://h:90/x@y",
        "hf://org/name@main", "http://[::1]:80/x",
    ):  # fmt: skip
        assert without_secrets(text) == text
    assert without_secrets("s3://KEY:a/b+c@bucket/x is gone") == "s3://…@bucket/x is gone"


def test_many_small_files_are_refused_before_they_are_read(monkeypatch: pytest.MonkeyPatch) -> None:
    files = {f"vocab{n}.txt": RemoteFile(f"https://host/model/vocab{n}.txt", MAX_BYTES, "") for n in range(11)}
    monkeypatch.setattr(mirror, "_files", lambda _: files)
    monkeypatch.setattr(mirror, "_content", lambda _: pytest.fail("read"))
    with pytest.raises(CheckpointError, match="1,100,000,000 bytes in small files"):
        mirror.stand_up("https://host/model")


@contextmanager
def answering(answer: Callable[[str, socket.socket], None]) -> Iterator[str]:
    """Run a server that answers each connection by a function of the request's text; gives host and port."""
    with socket.create_server(("127.0.0.1", 0)) as server:

        def serve() -> None:
            with suppress(OSError):
                while True:
                    connection, _ = server.accept()
                    threading.Thread(target=handle, args=(connection,), daemon=True).start()

        def handle(connection: socket.socket) -> None:
            with connection, suppress(OSError):
                request = b""
                while not request.endswith(b"\r\n\r\n"):
                    request += connection.recv(1 << 16)
                answer(request.decode(), connection)

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"127.0.0.1:{server.getsockname()[1]}"


@pytest.fixture
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let requests be repeated without waits, and the environment's proxies be looked up anew."""
    monkeypatch.setattr(ranges, "time", SimpleNamespace(sleep=lambda _: None))
    monkeypatch.setattr(web, "time", SimpleNamespace(sleep=lambda _: None))
    for name in ("NO_PROXY", "no_proxy", "HTTP_PROXY", "http_proxy", "HTTPS_PROXY", "https_proxy"):
        monkeypatch.delenv(name, raising=False)
    http._proxy.cache_clear()


HEAD = "HTTP/1.1 206 Partial Content\r\nContent-Length: 1000\r\nContent-Range: bytes 0-999/1000\r\n"


@pytest.mark.parametrize("part", ["head", "body"])
@pytest.mark.usefixtures("at_once")
def test_a_server_that_trickles_is_given_up(monkeypatch: pytest.MonkeyPatch, part: str) -> None:
    """A byte now and then is no progress: a bound on time holds, whatever comes."""
    monkeypatch.setattr(http, "TIMEOUT", 0.2)
    monkeypatch.setattr(ranges, "ATTEMPTS", 3)

    def trickle(_: str, connection: socket.socket) -> None:
        if part == "body":
            connection.sendall(f"{HEAD}\r\n".encode())
        while True:
            connection.sendall(b"x")
            time.sleep(0.02)

    with answering(trickle) as host, pytest.raises(RunError, match=r"after 3 attempts: less than 16,384 bytes came"):
        ranges.fetch(RemoteFile(f"http://{host}/x", 1000, ""), 0, memoryview(bytearray(1000)))


@pytest.mark.usefixtures("at_once")
def test_a_slow_start_of_a_sound_answer_is_waited_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(http, "TIMEOUT", 1.0)
    monkeypatch.setattr(http, "LEAST", 100)

    def slow(_: str, connection: socket.socket) -> None:
        connection.sendall(f"{HEAD}\r\n".encode())
        for _ in range(10):
            time.sleep(0.1)
            connection.sendall(b"x" * 100)

    out = bytearray(1000)
    with answering(slow) as host:
        ranges.fetch(RemoteFile(f"http://{host}/x", 1000, ""), 0, memoryview(out))
    assert out == b"x" * 1000


@pytest.mark.usefixtures("at_once")
def test_proxies_with_a_password(monkeypatch: pytest.MonkeyPatch) -> None:
    """It goes to the proxy alone; a wrong one is an error that names the URL, and shows nothing of it."""
    right = "Basic " + base64.b64encode(b"me:MARK ED/").decode()
    asked: list[str] = []

    def proxy(request: str, connection: socket.socket) -> None:
        asked.append(request)
        if f"Proxy-Authorization: {right}\r\n" not in request:
            connection.sendall(b"HTTP/1.1 407 Proxy Authentication Required\r\nContent-Length: 0\r\n\r\n")
        elif request.startswith("CONNECT"):
            connection.sendall(b"HTTP/1.1 503 Tunnel Unavailable\r\n\r\n")
        else:
            connection.sendall(f"{HEAD}\r\n".encode() + b"y" * 1000)

    def fetched(url: str, at: str) -> bytes:
        for scheme in ("HTTP", "HTTPS"):
            monkeypatch.setenv(f"{scheme}_PROXY", at)
        http._proxy.cache_clear()
        out = bytearray(1000)
        ranges.fetch(RemoteFile(url, 1000, ""), 0, memoryview(out))
        return bytes(out)

    with answering(proxy) as host:
        assert fetched("http://example.org/x", f"http://me:MARK%20ED%2F@{host}") == b"y" * 1000
        assert asked[-1].startswith("GET http://example.org/x HTTP/1.1")
        for url in ("http://example.org/x", "https://example.org/x"):
            with pytest.raises(RunError, match=rf"{url}: the proxy refuses \(407\)") as refused:
                fetched(url, f"http://me:MARKwrong@{host}")
            assert "MARK" not in str(refused.value)
        with pytest.raises(CheckpointError, match="the proxy refuses") as refused_head:
            web._head("https://example.org/x")
        assert "MARK" not in str(refused_head.value)
        with pytest.raises(RunError, match=r"HTTPS_PROXY: names a proxy of socks5://; only http://") as refused:
            fetched("https://example.org/x", f"socks5://me:MARK@{host}")
        assert "MARK" not in str(refused.value)
        with pytest.raises(RunError, match="can't be fetched"):
            fetched("https://example.org/x", f"http://me:MARK%20ED%2F@{host}")
        assert asked[-1].startswith("CONNECT example.org:443 ") and right in asked[-1]


@pytest.mark.usefixtures("at_once")
def test_servers_that_ignore_ranges(monkeypatch: pytest.MonkeyPatch) -> None:
    """The whole of a small file is as good as its range; else an error names the URL, and says what to do."""

    def whole(_: str, connection: socket.socket) -> None:
        connection.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\n" + b"z" * 1000)

    with answering(whole) as host:
        file, out = RemoteFile(f"http://{host}/x", 1000, ""), bytearray(1000)
        ranges.fetch(file, 0, memoryview(out))
        assert out == b"z" * 1000
        for begin, count in ((0, 10), (10, 10)):
            with pytest.raises(RunError, match=rf"{file.url}: its server doesn't send ranges(?s:.*)Download the model"):
                ranges.fetch(file, begin, memoryview(bytearray(count)))
    sent = [b"ab", b"abcdefgh", b"x" * 11]
    monkeypatch.setattr(store_process, "ask", lambda verb, *_: "" if verb == "sign" else sent.pop(0))
    file = RemoteFile("s3://bucket/never-signed", 1000, "")
    ranges.fetch(file, 0, memoryview(out)[:10])
    assert out[:10] == b"ababcdefgh"  # a short one is asked for the rest
    with pytest.raises(RunError, match=r"s3://bucket/never-signed: its server doesn't send ranges"):
        ranges.fetch(file, 0, memoryview(bytearray(10)))


@pytest.mark.usefixtures("at_once")
@pytest.mark.parametrize(
    ("told", "sent"),
    [("0-9/1000", 1000), ("1-1000/1001", 1000), ("0-999/1000", 1100), ("5-2/1000", 0), ("0-1999/1000", 1000)],
)
def test_answers_that_contradict_themselves(monkeypatch: pytest.MonkeyPatch, told: str, sent: int) -> None:
    """Bytes beyond the range that an answer names are nobody knows what."""
    monkeypatch.setattr(ranges, "ATTEMPTS", 2)

    def answer(_: str, connection: socket.socket) -> None:
        head = f"HTTP/1.1 206 Partial Content\r\nContent-Length: {sent}\r\nContent-Range: bytes {told}\r\n\r\n"
        connection.sendall(head.encode() + b"x" * sent)

    with answering(answer) as host, pytest.raises(RunError, match=r"another range than was asked|changed since"):
        ranges.fetch(RemoteFile(f"http://{host}/x", 1000, ""), 0, memoryview(bytearray(1000)))


@pytest.mark.usefixtures("at_once")
def test_a_server_that_compresses() -> None:
    """Its ranges are those of other bytes; what the error says comes before size and etag, which are others, too."""

    def answer(_: str, connection: socket.socket) -> None:
        head = "HTTP/1.1 206 Partial Content\r\nContent-Length: 9\r\nContent-Range: bytes 0-8/9\r\nETag: other\r\n"
        connection.sendall(f"{head}Content-Encoding: gzip\r\n\r\n".encode() + b"x" * 9)

    with answering(answer) as host, pytest.raises(RunError, match=r"sends it compressed \(gzip\)"):
        ranges.fetch(RemoteFile(f"http://{host}/x", 1000, "etag"), 0, memoryview(bytearray(1000)))


def test_keys_that_the_client_can_not_list(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are told at once, as asking again doesn't help."""
    asked: list[str] = []

    def listing(request: str, connection: socket.socket) -> None:
        asked.append(request)
        entry = "<Size>1</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
        content = f"<ListBucketResult><Contents><Key>m/./x</Key>{entry}</Contents></ListBucketResult>"
        connection.sendall(f"HTTP/1.1 200 OK\r\nContent-Length: {len(content)}\r\n\r\n{content}".encode())

    with answering(listing) as host:
        for name, value in {"ENDPOINT": f"http://{host}", "ALLOW_HTTP": "true", "SKIP_SIGNATURE": "true"}.items():
            monkeypatch.setenv(f"AWS_{name}", value)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        store_process.end()
        try:
            with pytest.raises(CheckpointError, match=r"^s3://odd-keys/m: can't be read: the store has a key 'm/./x'"):
                objects.source("s3://odd-keys/m", "").listed("")
        finally:
            store_process.end()
    assert len(asked) == 1


@pytest.mark.skipif(os.name != "posix", reason="Ctrl-C is a signal there")
@pytest.mark.parametrize("scheme", ["http", "s3"])
def test_nobody_waits_for_a_silent_server_after_ctrl_c(scheme: str) -> None:
    """Files are asked for side by side, and each of those requests would be repeated for minutes."""
    asked, over = threading.Event(), threading.Event()
    page = "".join(f'<a href="{name}">' for name in ("config.json", "model.safetensors"))
    entry = "<Size>1</Size><LastModified>2026-01-01T00:00:00.000Z</LastModified><ETag>x</ETag>"
    keys = "".join(f"<Contents><Key>m/{name}</Key>{entry}</Contents>" for name in ("config.json", "vocab.json"))

    def silent(request: str, connection: socket.socket) -> None:
        if request.startswith("GET /m/ ") or "list-type" in request:
            content = page if scheme == "http" else f"<ListBucketResult>{keys}</ListBucketResult>"
            head = f"HTTP/1.1 200 OK\r\nContent-Type: text/html\r\nContent-Length: {len(content)}\r\n\r\n"
            connection.sendall(f"{head}{content}".encode())
        else:
            asked.set()
            over.wait()

    with answering(silent) as host:
        environment = {"AWS_ENDPOINT": f"http://{host}", "AWS_ALLOW_HTTP": "true", "AWS_SKIP_SIGNATURE": "true"}
        url = f"http://{host}/m" if scheme == "http" else "s3://bucket/m"
        command = [sys.executable, "-m", "mergekit_lite", "inspect", url]
        with subprocess.Popen(
            command, env=os.environ | environment | {"NO_PROXY": "127.0.0.1"}, stderr=subprocess.PIPE, text=True
        ) as process:
            try:
                assert asked.wait(120)
                process.send_signal(signal.SIGINT)
                _, told = process.communicate(timeout=40)
                assert process.returncode == 1 and "Interrupted" in told and "Traceback" not in told, told
            finally:
                process.kill()
                over.set()


@pytest.mark.parametrize(
    ("left_out", "direct"),
    [("::1", {"[::1]:9000", "[::1]"}), ("host:9000", {"host:9000"}), ("host", {"host:9000", "host:80"}), ("", set())],
)
def test_servers_that_are_asked_without_a_proxy(
    monkeypatch: pytest.MonkeyPatch, left_out: str, direct: set[str]
) -> None:
    """Addresses of IPv6 have colons of their own, and one port of a host may be meant."""
    for name, value in {"http_proxy": "http://proxy:3128", "no_proxy": left_out}.items():
        monkeypatch.delenv(name.upper(), raising=False)
        monkeypatch.setenv(name, value)
    http._proxy.cache_clear()
    asked = {"[::1]:9000", "[::1]", "host:9000", "host:80", "other:9000"}
    assert {netloc for netloc in asked if http._proxy("http", netloc) is None} == direct
    http._proxy.cache_clear()


def test_lists_that_are_cut_short_are_asked_for_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """The store's own client takes such an answer for one; where none comes it ends some time."""
    clock = [0.0]
    monkeypatch.setattr(objects, "time", SimpleNamespace(monotonic=lambda: clock[0], sleep=lambda _: None))
    asked: list[str] = []

    def ask(verb: str, url: str) -> tuple[dict[str, tuple[int, str]], list[str]]:
        asked.append(verb)
        clock[0] += 1.0
        if len(asked) <= failures:
            raise OSError("Got invalid list response: ill-formed document")
        return {"m.safetensors": (3, "x")}, []

    monkeypatch.setattr(objects.store_process, "ask", ask)
    failures = 6
    assert objects.source("s3://b/m", "").list("")[0]["m.safetensors"].size == 3
    asked.clear()
    failures = 1000
    with pytest.raises(CheckpointError, match=r"s3://b/m: can't be reached: Got invalid list response"):
        objects.source("s3://b/m", "").list("")
    assert len(asked) < 30
