"""An OpenAI-compatible server that answers by a formula, and misbehaves on request."""

from __future__ import annotations

import json
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from mergekit_lite.answers.rows import seed_of

# drop, cut, hang, drip, flood, empty, none, filtered, garbage, page; a status; or a body instead of the right one
Trouble = str | int | bytes | None
PACKED = b"\x1f\x8b"  # a body that begins so is sent as a packed one
REASONS = {  # as the client counts them
    "drop": "no connection",
    "cut": "no connection",
    "empty": "an empty reply",
    "none": "an empty reply",
    "filtered": "cut by the server's content filter",
    "garbage": "a reply that can't be read",
    "page": "a reply that can't be read",
}


def answer_to(text: str, seed: int) -> str:
    """What the server says."""
    return f"{text.upper()} {seed_of(text, seed):x}"


@dataclass
class Fake:
    """The server's log and its mood.

    ``mood`` is given the asked text and how often it was asked before, and says what goes wrong this time.
    """

    mood: Callable[[str, int], Trouble] = lambda text, before: None
    on_request: Callable[[str], None] = lambda text: None
    say: Callable[[str, int], str] = answer_to
    reply: Callable[[dict[str, Any]], str] | None = None  # says it by the whole request instead
    retry_after: str | None = None
    complaint: str = ""  # in the body of an error
    more_headers: dict[str, str] = field(default_factory=dict)
    refuses: Callable[[dict[str, Any]], str | dict[str, Any] | None] = lambda body: None  # what 400 says to a request
    several: bool = True  # whether it gives `n` answers
    thoughts: Callable[[str], str | None] = lambda text: None
    reads: Callable[[dict[str, Any]], int | None] = lambda body: None  # tokens of a request, which it tells
    url: str = ""
    bodies: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    asked: Counter[str] = field(default_factory=Counter)
    given: Counter[Trouble] = field(default_factory=Counter)
    answered: Counter[tuple[str, int]] = field(default_factory=Counter)
    answered_for: Counter[str] = field(default_factory=Counter)  # by the key that came with the request
    open: int = 0  # requests that have come, and whose reply has not begun
    most_open: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)
    poured: int = 0  # bytes of floods
    closing: threading.Event = field(default_factory=threading.Event)


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    fake: Fake

    def log_message(self, *arguments: object) -> None:
        pass

    def do_POST(self) -> None:
        fake = self.fake
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        text = body["prompt"] if "prompt" in body else body["messages"][-1]["content"]
        name = f"{text}|{body.get('seed')}" if body["model"] == "by seed" else text
        with fake.lock:
            trouble = fake.mood(text, fake.asked[name])
            fake.asked[name] += 1
            fake.given[trouble] += 1
            fake.bodies.append(body)
            fake.headers.append({key.lower(): value for key, value in self.headers.items()})
            fake.open += 1
            fake.most_open = max(fake.most_open, fake.open)
        fake.on_request(text)
        with fake.lock:
            fake.open -= 1  # before the reply: who has got it may ask again at once
        with suppress(BrokenPipeError, ConnectionResetError):  # the client was killed
            if (refusal := fake.refuses(body)) is None:
                self._reply(trouble, text, body)
            else:
                error = {"message": refusal} if isinstance(refusal, str) else refusal
                self._send(400, json.dumps({"error": error}).encode())

    def _reply(self, trouble: Trouble, text: str, body: dict[str, Any]) -> None:
        fake = self.fake
        if trouble == "drop":
            self.close_connection = True
        elif trouble == "hang":
            self.fake.closing.wait(30)
            self.close_connection = True
        elif trouble in ("drip", "flood"):
            self._pour(b" " if trouble == "drip" else b" " * (1 << 16), 0.05 if trouble == "drip" else 0)
        elif isinstance(trouble, int):
            self._send(
                trouble, json.dumps({"error": {"message": f"no luck: {trouble} {self.fake.complaint}"}}).encode()
            )
        elif isinstance(trouble, bytes):
            self._send(200, trouble)
        elif trouble == "garbage":
            self._send(200, b'{"id": "x", "choices": [{"mess')
        elif trouble == "page":
            self._send(200, b"<html>gateway</html>", kind="text/html")
        else:
            finish = "content_filter" if trouble == "filtered" else "length" if "long" in text else "stop"
            choices = []
            for place in range(body.get("n", 1) if fake.several else 1):
                seed = body.get("seed", 0) + place
                said = {"empty": "  ", "none": None}.get(str(trouble), fake.say(text, seed))
                if fake.reply is not None:
                    said = fake.reply(body)
                message = {"role": "assistant", "content": said}
                if (thoughts := fake.thoughts(text)) is not None:
                    message["reasoning_content"] = thoughts
                what = {"text": said} if "prompt" in body else {"message": message}
                choices.append({"index": place, "finish_reason": finish, **what})
            usage = {"completion_tokens": 3, "total_tokens": 4}
            if (read := fake.reads(body)) is not None:
                usage["prompt_tokens"] = read
            reply = json.dumps(
                {
                    "id": "x",
                    "object": "chat.completion",
                    "created": 0,
                    "model": body["model"],
                    "choices": choices[::-1],
                    "usage": usage,
                }
            ).encode()
            if trouble is None:
                with fake.lock:
                    fake.answered[text, body.get("seed", 0)] += 1
                    fake.answered_for[self.headers.get("Authorization", "").removeprefix("Bearer ")] += 1
            self._send(200, reply, cut=trouble == "cut")

    def _pour(self, piece: bytes, pause: float) -> None:
        """Send pieces for ever."""
        self.send_response(200)
        self.end_headers()
        self.close_connection = True
        while not self.fake.closing.wait(pause):
            self.wfile.write(piece)
            self.fake.poured += len(piece)

    def _send(self, status: int, body: bytes, *, kind: str = "application/json", cut: bool = False) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(body)))
        if body.startswith(PACKED):
            self.send_header("Content-Encoding", "gzip")
        for name, value in self.fake.more_headers.items():
            self.send_header(name, value)
        if status == 429 and self.fake.retry_after:
            self.send_header("Retry-After", self.fake.retry_after)
        self.end_headers()
        self.wfile.write(body[: len(body) // 2] if cut else body)
        if cut:
            self.close_connection = True


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128

    def handle_error(self, request: object, address: object) -> None:
        pass


@contextmanager
def fake_server(fake: Fake | None = None) -> Iterator[Fake]:
    """A server on a free port, until the block ends."""
    fake = fake or Fake()
    handler = type("Handler", (_Handler,), {"fake": fake})
    with _Server(("127.0.0.1", 0), handler) as server:
        fake.url = f"http://127.0.0.1:{server.server_address[1]}/v1"
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
        thread.start()
        try:
            yield fake
        finally:
            fake.closing.set()
            server.shutdown()
            thread.join()
