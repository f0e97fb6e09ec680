"""Requests over HTTP, with connections that are kept for the next ones.

They use nothing but sockets, so they are sound in forked workers, and what comes is read straight into the memory that
it is for. Proxies and certificates are those of the environment (``HTTPS_PROXY``, ``NO_PROXY``, ``SSL_CERT_FILE``).
A proxy's password is shown to the proxy alone.
"""

from __future__ import annotations

import atexit
import base64
import http.client
import io
import os
import re
import ssl
import time
from collections.abc import Mapping
from functools import lru_cache
from typing import Any
from urllib.parse import SplitResult, unquote, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from mergekit_lite._version import __version__
from mergekit_lite.locks import ThreadLock

TIMEOUT = 60  # seconds without a byte
LEAST = 1 << 14  # bytes that an answer has to bring in each ``TIMEOUT``, unless it ends before
REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
MOST_UNREAD = 1 << 16  # bytes of an unwanted answer that are read to keep a connection
MOST_IDLE = 16  # connections to one server
REFUSED_BY_PROXY = (
    "the proxy refuses (407): check the user and the password in HTTPS_PROXY or HTTP_PROXY (http://USER:PASSWORD@HOST),"
    " or name the host in NO_PROXY."
)
_lock = ThreadLock()
_idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
_process = os.getpid()


class Unanswered(Exception):
    """A request that got no whole answer: asking again may help. Its text holds no URL.

    ``slow`` says that the server sends too little to wait for, so that what came is no reason to go on for ever.
    """

    def __init__(self, why: str, *, slow: bool = False) -> None:
        super().__init__(why)
        self.slow = slow


class Refused(Exception):
    """A request that asking again doesn't help. Its text holds no URL."""


class TooSlow(OSError):
    """An answer of which too little came in ``TIMEOUT`` seconds."""


class _Paced(io.RawIOBase):
    """What comes of an answer. Raises TooSlow where that is less than ``LEAST`` bytes in ``TIMEOUT`` seconds."""

    def __init__(self, received: io.RawIOBase) -> None:
        self._received = received
        self._since, self._came = time.monotonic(), 0

    def readable(self) -> bool:
        """Return True."""
        return True

    def readinto(self, out: Any) -> int | None:
        """Read once into ``out``."""
        count = self._received.readinto(out)
        self._came += count or 0
        if (now := time.monotonic()) - self._since > TIMEOUT:
            if count and self._came < LEAST:
                raise TooSlow
            self._since, self._came = now, 0
        return count

    def close(self) -> None:
        """Close it, and what it reads from."""
        self._received.close()
        super().close()


class _Response(http.client.HTTPResponse):
    """A response whose head and body have to come at a pace."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.fp = io.BufferedReader(_Paced(self.fp.detach()))


class Answer:
    """The answer to a request, whose body is still to be read. Its context keeps the connection, or closes it."""

    def __init__(self, url: str, connection: http.client.HTTPConnection, response: http.client.HTTPResponse) -> None:
        self.url = url
        self.status = response.status
        self.headers = response.headers
        self._connection = connection
        self._response = response

    def __enter__(self) -> Answer:
        return self

    def __exit__(self, *exception: object) -> None:
        try:
            if self.length is not None and self.length <= MOST_UNREAD:
                self._response.read()
        except (OSError, http.client.HTTPException):
            pass
        if self._response.isclosed() and not self._response.will_close:
            _keep(self.url, self._connection)
        else:
            self._response.close()
            self._connection.close()

    @property
    def length(self) -> int | None:
        """Bytes of the body that are still to come; None where the server doesn't say."""
        return self._response.length

    def read_into(self, out: memoryview) -> int:
        """Read once into ``out``, and return how many bytes came: none at the body's end. Raises Unanswered."""
        try:
            return self._response.readinto(out)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unanswered(_said(error), slow=isinstance(error, TooSlow)) from error

    def read(self, most: int) -> bytes:
        """Return the body, up to ``most`` bytes of it. Raises Unanswered."""
        try:
            content = self._response.read(most)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unanswered(_said(error), slow=isinstance(error, TooSlow)) from error
        if len(content) < most and self.length:
            raise Unanswered("the answer was cut short")
        return content


def followed(verb: str, url: str, headers: Mapping[str, str], secret: Mapping[str, str] | None = None) -> Answer:
    """Send a request where redirections lead, and return the answer; ``secret`` are headers for the first server alone.

    Raises Unanswered where no answer comes, or it leads from https to http; Refused where a proxy can't be used.
    """
    first = urlsplit(url).netloc
    for _ in range(MOST_REDIRECTS + 1):
        own = (secret or {}) if urlsplit(url).netloc == first else {}
        answer = _request(verb, url, {**headers, **own})
        location = answer.headers.get("Location")
        if answer.status not in REDIRECTS or not location:
            return answer
        with answer:
            target, scheme = _target(url, location)
        if scheme not in ("http", "https") or (url.startswith("https:") and scheme != "https"):
            raise Unanswered("the server sends elsewhere, without encryption")
        url = target
    raise Unanswered("the server sends from one address to the next without end")


def _target(url: str, location: str) -> tuple[str, str]:
    """Return where a redirection leads, and the scheme. Raises Unanswered where that is no address."""
    try:
        target = urljoin(url, location)
        parts = urlsplit(target)
        if parts.hostname and target.isascii() and (parts.port is None or parts.port > 0):
            return target, parts.scheme
    except ValueError:
        pass
    raise Unanswered("the server sends to what is no address")


def close_all() -> None:
    """Close the connections that nobody uses."""
    with _lock:
        for connections in _idle.values():
            for connection in connections:
                connection.close()
        _idle.clear()


atexit.register(close_all)


def _request(verb: str, url: str, headers: Mapping[str, str]) -> Answer:
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    sent = {"User-Agent": f"mergekit_lite/{__version__}", **headers}
    if parts.scheme == "http" and (proxy := _proxy(parts.scheme, parts.netloc)) is not None:
        target, sent = url, sent | _password(proxy)
    while True:
        connection, is_fresh = _connection(url)
        try:
            connection.request(verb, target, headers=sent)
            answer = Answer(url, connection, connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            _check_proxy(error)
            if is_fresh:  # else it was closed while nobody used it
                raise Unanswered(_said(error), slow=isinstance(error, TooSlow)) from error
            continue
        if answer.status == 407:
            with answer:
                raise Refused(REFUSED_BY_PROXY)
        return answer


def _keep(url: str, connection: http.client.HTTPConnection) -> None:
    """Keep a connection for the next request to its server."""
    parts = urlsplit(url)
    with _lock:
        kept = _idle.setdefault((parts.scheme, parts.netloc), [])
        if len(kept) < MOST_IDLE:
            kept.append(connection)
            return
    connection.close()


def _connection(url: str) -> tuple[http.client.HTTPConnection, bool]:
    """Return a connection to the server of a URL, and whether it is a new one; a fork shares none with its parent."""
    global _process
    parts = urlsplit(url)
    with _lock:
        if _process != os.getpid():
            _idle.clear()
            _process = os.getpid()
        if kept := _idle.get((parts.scheme, parts.netloc)):
            return kept.pop(), False
    host, port = parts.hostname or "", parts.port
    proxy = _proxy(parts.scheme, parts.netloc)
    at, at_port = (proxy.hostname or "", proxy.port or 8080) if proxy else (host, port)
    if parts.scheme == "http":
        connection = http.client.HTTPConnection(at, at_port, timeout=TIMEOUT)
    else:
        connection = http.client.HTTPSConnection(at, at_port, timeout=TIMEOUT, context=_certificates())
        if proxy:
            connection.set_tunnel(host, port or 443, _password(proxy))
    connection.response_class = _Response
    return connection, True


def _password(proxy: SplitResult) -> dict[str, str]:
    """Return the header by which a proxy knows a user, if its address names one."""
    if proxy.username is None:
        return {}
    words = f"{unquote(proxy.username)}:{unquote(proxy.password or '')}"
    return {"Proxy-Authorization": f"Basic {base64.b64encode(words.encode()).decode()}"}


def _check_proxy(error: BaseException) -> None:
    """Raise Refused where a proxy refuses who asks: asking again is no help."""
    if isinstance(error, OSError) and re.search(r"Tunnel connection failed: 40[37]", str(error)):
        raise Refused(REFUSED_BY_PROXY) from None


@lru_cache(maxsize=64)
def _proxy(scheme: str, netloc: str) -> SplitResult | None:
    """Return the proxy that the environment names for a server."""
    named = getproxies().get(scheme)
    host = urlsplit(f"//{netloc}").hostname or ""
    if not named or proxy_bypass(host) or proxy_bypass(netloc):  # NO_PROXY may name a port
        return None
    proxy = urlsplit(named if "://" in named else f"http://{named}")
    if proxy.scheme != "http":
        variable = f"{scheme.upper()}_PROXY"
        raise Refused(f"{variable}: names a proxy of {proxy.scheme}://; only http:// is spoken. Set it, or NO_PROXY.")
    return proxy


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or None
    return ssl.create_default_context(cafile=bundle)


def _said(error: BaseException) -> str:
    """Return what went wrong, without any URL."""
    if isinstance(error, TooSlow):
        return f"less than {LEAST:,} bytes came in {TIMEOUT} seconds"
    if isinstance(error, TimeoutError):
        return f"no byte came for {TIMEOUT} seconds"
    if isinstance(error, http.client.HTTPException):
        return "the connection was cut"
    return getattr(error, "strerror", None) or type(error).__name__
