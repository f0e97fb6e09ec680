"""Requests over HTTP, with connections that are kept for the next ones.

They use nothing but sockets, so they are sound in forked workers, and what comes is read straight into the memory that
it is for. Proxies and certificates are those of the environment (``HTTPS_PROXY``, ``NO_PROXY``, ``SSL_CERT_FILE``).
"""

from __future__ import annotations

import atexit
import http.client
import os
import ssl
import threading
from collections.abc import Mapping
from functools import lru_cache
from urllib.parse import SplitResult, urljoin, urlsplit
from urllib.request import getproxies, proxy_bypass

from mergekit_lite._version import __version__

TIMEOUT = 60  # seconds without a byte
REDIRECTS = (301, 302, 303, 307, 308)
MOST_REDIRECTS = 5
MOST_UNREAD = 1 << 16  # bytes of an unwanted answer that are read to keep a connection
MOST_IDLE = 16  # connections to one server
_lock = threading.Lock()
_idle: dict[tuple[str, str], list[http.client.HTTPConnection]] = {}
_process = os.getpid()


class Unanswered(Exception):
    """A request that got no whole answer: asking again may help. Its text holds no URL."""


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
            raise Unanswered(_said(error)) from error

    def read(self, most: int) -> bytes:
        """Return the body, up to ``most`` bytes of it. Raises Unanswered."""
        try:
            content = self._response.read(most)
        except (OSError, http.client.HTTPException, ValueError) as error:
            raise Unanswered(_said(error)) from error
        if len(content) < most and self.length:
            raise Unanswered("the answer was cut short")
        return content


def followed(verb: str, url: str, headers: Mapping[str, str], secret: Mapping[str, str] | None = None) -> Answer:
    """Send a request where redirections lead, and return the answer; ``secret`` are headers for the first server alone.

    Raises Unanswered where no answer comes, or it leads from https to http.
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
    target = url if _is_forwarded(parts) else target
    while True:
        connection, is_fresh = _connection(url)
        try:
            connection.request(verb, target, headers={"User-Agent": f"mergekit_lite/{__version__}", **headers})
            return Answer(url, connection, connection.getresponse())
        except (OSError, http.client.HTTPException) as error:
            connection.close()
            if is_fresh:  # else it was closed while nobody used it
                raise Unanswered(_said(error)) from error


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
        return http.client.HTTPConnection(at, at_port, timeout=TIMEOUT), True
    connection = http.client.HTTPSConnection(at, at_port, timeout=TIMEOUT, context=_certificates())
    if proxy:
        connection.set_tunnel(host, port or 443)
    return connection, True


def _is_forwarded(parts: SplitResult) -> bool:
    return parts.scheme == "http" and _proxy(parts.scheme, parts.netloc) is not None


@lru_cache(maxsize=64)
def _proxy(scheme: str, netloc: str) -> SplitResult | None:
    """Return the proxy that the environment names for a server."""
    named = getproxies().get(scheme)
    host = netloc.rpartition("@")[2].partition(":")[0]
    if not named or proxy_bypass(host):
        return None
    return urlsplit(named if "://" in named else f"http://{named}")


@lru_cache(maxsize=1)
def _certificates() -> ssl.SSLContext:
    bundle = os.environ.get("REQUESTS_CA_BUNDLE") or os.environ.get("CURL_CA_BUNDLE") or None
    return ssl.create_default_context(cafile=bundle)


def _said(error: BaseException) -> str:
    """Return what went wrong, without any URL."""
    if isinstance(error, TimeoutError):
        return f"no byte came for {TIMEOUT} seconds"
    if isinstance(error, http.client.HTTPException):
        return "the connection was cut"
    return getattr(error, "strerror", None) or type(error).__name__
