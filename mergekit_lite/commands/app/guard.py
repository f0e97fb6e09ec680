"""What the page's server answers at all: its own page in a browser of this machine, and nothing of files."""

from __future__ import annotations

from collections.abc import Awaitable, Callable, Collection, MutableMapping
from typing import Any

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Message, Receive, Send], Awaitable[None]]

ADDRESS = "127.0.0.1"
MOST_BYTES = 1_000_000  # of a request: a recipe and what stands beside it on the page
# What the page needs of Gradio's routes. Those that serve, take or fetch files are not among them.
PATHS = ("/config", "/theme.css", "/favicon.ico", "/manifest.json", "/gradio_api/startup-events", "/gradio_api/app_id",
         "/gradio_api/theme.css", "/gradio_api/info", "/gradio_api/reset", "/gradio_api/cancel")  # fmt: skip
OUTPUT = "/output/"  # files of the finished output, where the page is public: serving.py
BELOW = ("/assets/", "/static/", "/gradio_api/queue/", "/gradio_api/heartbeat/", OUTPUT)
HUB = "https://huggingface.co"  # shows a space in a frame
# No request of the page goes elsewhere, and no other page shows it in a frame.
POLICY = (
    "default-src 'self'; script-src 'self' 'unsafe-inline' 'unsafe-eval' blob:; style-src 'self' 'unsafe-inline'; "
    "img-src 'self' data: blob:; font-src 'self' data:; connect-src 'self'; frame-src 'self' data:; "
    "worker-src 'self' blob:; base-uri 'self'; form-action 'self'; frame-ancestors 'self'"
)


class Guard:
    """An ASGI application before another one, which gets the page's own requests alone."""

    def __init__(self, app: App, port: int, space: Collection[str] = ()) -> None:
        """Let requests through to ``app`` that are addressed to this port of the loopback address.

        ``space`` are the names under which the hub serves it as a space. There anybody may ask, by whatever name its
        proxy gives the server, but no page of another origin.
        """
        self.app = app
        self.hosts = {f"{name}:{port}" for name in (ADDRESS, "localhost")}
        self.space = {f"https://{name}" for name in space}
        self.policy = f"{POLICY} {HUB}" if space else POLICY

    async def __call__(self, scope: Message, receive: Receive, send: Send) -> None:
        """Pass a request on, or answer 403, 404 or 413; the page has no WebSockets."""
        if scope["type"] == "lifespan":
            await self.app(scope, receive, send)
            return
        if scope["type"] != "http":
            await send({"type": "websocket.close", "code": 1008})
            return
        if status := self.refusal(scope):
            await send({"type": "http.response.start", "status": status, "headers": [(b"content-type", b"text/plain")]})
            await send({"type": "http.response.body", "body": b"This page answers its own requests alone."})
            return

        async def with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                message["headers"] = [*message["headers"], (b"content-security-policy", self.policy.encode())]
            await send(message)

        await self.app(scope, receive, with_policy)

    def refusal(self, scope: Message) -> int:
        """Return the status that a request is refused with; 0 where it is the page's own.

        A name that leads here from elsewhere (DNS rebinding) is seen by the host, another page's request by the
        origin, which browsers put on all that changes something, or by where they say that it comes from.
        """
        headers = {name.decode("latin-1").lower(): value.decode("latin-1") for name, value in scope["headers"]}
        host, origin = headers.get("host", ""), headers.get("origin")
        own = self.space or {f"http://{host}"}
        if (not self.space and host not in self.hosts) or (origin is not None and origin not in own):
            return 403
        path = scope["path"]
        if headers.get("sec-fetch-site", "none") not in ("same-origin", "none") and path != "/":
            return 403
        if path != "/" and path.rstrip("/") not in PATHS and not path.startswith(BELOW):
            return 404
        length = headers.get("content-length", "0")
        is_long = "transfer-encoding" in headers or not length.isdigit() or int(length) > MOST_BYTES
        return 413 if is_long else 0
