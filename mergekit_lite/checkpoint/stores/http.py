"""Requests over HTTP, with connections that are kept: one for each thread and server.

They use nothing but sockets, so they are sound in forked workers, and what comes is read straight into the memory that
it is for. Proxies and certificates are those of the environment (``HTTPS_PROXY``, ``NO_PROXY``, ``SSL_CERT_FILE``).
"""

from __future__ import annotations

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
MOST_KEPT = 1 << 16  # bytes of an unwanted answer that are read to keep a connection
_kept = threading.local()


class Unanswered(Exception):
    """A request that got no whole answer: asking again may help. Its text holds no URL."""


def request(verb: str, url: str, headers: Mapping[str, str]) -> http.client.HTTPResponse:
    """Send a request, and return the answer, whose body is still to be read. Raises Unanswered."""
    parts = urlsplit(url)
    target = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    for attempt in range(2):
        connection, is_fresh = _connection(parts)
        try:
            path = target if not _is_forwarded(parts) else url
            connection.request(verb, path, headers={"User-Agent": f"mergekit_lite/{__version__}", **headers})
            return connection.getresponse()
        except (OSError, http.client.HTTPException) as error:
            drop(url)
            if is_fresh or attempt:  # else it was closed while nobody used it
                raise Unanswered(_said(error)) from error
    raise AssertionError


def read_into(response: http.client.HTTPResponse, out: memoryview) -> int:
    """Read once into ``out``, and return how many bytes came: none at the body's end. Raises Unanswered."""
    try:
        return response.readinto(out)
    except (OSError, http.client.HTTPException, ValueError) as error:
        raise Unanswered(_said(error)) from error


def finish(url: str, response: http.client.HTTPResponse) -> None:
    """Make the connection of an answer fit for the next request, or let it go where too much would have to be read."""
    try:
        if response.length is not None and response.length <= MOST_KEPT:
            response.read()
    except (OSError, http.client.HTTPException):
        drop(url)
    if not response.isclosed():
        drop(url)


def followed(
    verb: str, url: str, headers: Mapping[str, str], secret: Mapping[str, str] | None = None
) -> tuple[str, http.client.HTTPResponse]:
    """Send a request where redirections lead, and return where that is, and the answer.

    ``secret`` are headers for the first server alone. Raises Unanswered, also where it leads from https to http.
    """
    first = urlsplit(url).netloc
    for _ in range(MOST_REDIRECTS + 1):
        own = (secret or {}) if urlsplit(url).netloc == first else {}
        response = request(verb, url, {**headers, **own})
        location = response.headers.get("Location")
        if response.status not in REDIRECTS or not location:
            return url, response
        finish(url, response)
        target = urljoin(url, location)
        scheme = urlsplit(target).scheme
        if scheme not in ("http", "https") or (url.startswith("https:") and scheme != "https"):
            raise Unanswered("the server sends elsewhere, without encryption")
        url = target
    raise Unanswered("the server sends from one address to the next without end")


def drop(url: str) -> None:
    """Close this thread's connection to the server of a URL."""
    parts = urlsplit(url)
    connection = _connections().pop((parts.scheme, parts.netloc), None)
    if connection is not None:
        connection.close()


def drop_all() -> None:
    """Close this thread's connections."""
    for connection in _connections().values():
        connection.close()
    _connections().clear()


def _connections() -> dict[tuple[str, str], http.client.HTTPConnection]:
    """Return this thread's connections; a forked child has none of its parent's."""
    if getattr(_kept, "process", None) != os.getpid():
        _kept.process, _kept.connections = os.getpid(), {}
    connections: dict[tuple[str, str], http.client.HTTPConnection] = _kept.connections
    return connections


def _connection(parts: SplitResult) -> tuple[http.client.HTTPConnection, bool]:
    """Return a connection to a server, and whether it is a new one."""
    connections, key = _connections(), (parts.scheme, parts.netloc)
    if key in connections:
        return connections[key], False
    host, port = parts.hostname or "", parts.port
    proxy = _proxy(parts.scheme, parts.netloc)
    if parts.scheme == "https":
        at, at_port = (proxy.hostname or "", proxy.port or 8080) if proxy else (host, port)
        connection: http.client.HTTPConnection = http.client.HTTPSConnection(
            at, at_port, timeout=TIMEOUT, context=_certificates()
        )
        if proxy:
            connection.set_tunnel(host, port or 443)
    else:
        at, at_port = (proxy.hostname or "", proxy.port or 8080) if proxy else (host, port)
        connection = http.client.HTTPConnection(at, at_port, timeout=TIMEOUT)
    connections[key] = connection
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
