"""URLs of object stores: recognised, kept free of secrets, and opened by ``obstore``.

``s3://bucket/key``, ``gs://bucket/key`` and ``az://container/key`` name objects. Credentials, endpoints and regions
come from the environment (``AWS_ACCESS_KEY_ID``, ``AWS_ENDPOINT`` …), never from a URL, so that a URL can be printed,
logged and put into a manifest.

A store must not be used on both sides of a fork: its library runs threads of its own, which a fork doesn't copy, and a
request in the child would wait for them without end. So a process that was forked from one that had used a store is
refused here rather than left to hang.
"""

from __future__ import annotations

import os
import re
from datetime import timedelta
from functools import lru_cache
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Any, NamedTuple, cast

from mergekit_lite.backoff import FIRST, LONGEST
from mergekit_lite.errors import CheckpointError, RunError, UsageError, one_line

if TYPE_CHECKING:
    from obstore.store import ObjectStore

OBJECTS = ("s3", "gs", "az")  # what obstore opens
WEB = ("https", "http")
URL = re.compile(rf"(?P<scheme>{'|'.join((*OBJECTS, *WEB))})://(?P<rest>.*)", re.DOTALL)
INSTALL = "pip install 'mergekit-lite[remote]'"
NO_RANGES = (
    "its server doesn't send ranges of files, so nothing can be read from it as it is needed. Download the model, and "
    "name the folder."
)
CHANGED = "changed since it was opened (its etag or its size is another one). Start again with a file that stays."
CREDENTIALS = {  # where each store's own tools look
    "s3": "AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN, AWS_REGION; AWS_SKIP_SIGNATURE=true for a "
    "public bucket",
    "gs": "GOOGLE_APPLICATION_CREDENTIALS; GOOGLE_SKIP_SIGNATURE=true for a public bucket",
    "az": "AZURE_STORAGE_ACCOUNT_NAME and AZURE_STORAGE_ACCOUNT_KEY or AZURE_STORAGE_SAS_TOKEN; "
    "AZURE_SKIP_SIGNATURE=true for a public container",
}
# A user and a password, which may have slashes, as keys of S3 do; a port is none.
PASSWORD = re.compile(r"(?P<scheme>\w+://)(?!\[)[^/\s?#:@]*:(?:(?!\d*(?:[^\w+=~%-]|$))[^\s?#@]*@?|/[^\s?#@]+@)")
NO_BUCKET = re.compile(r"\((NoSuchBucket|InvalidBucketName|ContainerNotFound|InvalidResourceName)\)")
SECRET = re.compile(r"KEY|SECRET|TOKEN|PASSWORD|CREDENTIAL|SAS", re.IGNORECASE)  # in the name of a variable
PREFIXES = {"s3": "AWS", "gs": "GOOGLE", "az": "AZURE"}  # of the variables that a client is set up by
SWITCHES = ("allow_http", "allow_invalid_certificates")
TEXTS = ("proxy_url", "proxy_ca_certificate", "proxy_excludes", "connect_timeout", "read_timeout", "timeout")
_used_by: set[int] = set()  # processes, this one or those it was forked from, that have used a store


class Place(NamedTuple):
    """An object, or a prefix of objects, in a store."""

    scheme: str
    bucket: str  # a bucket or a container
    key: str  # without slashes at its ends; empty for the whole bucket

    def __str__(self) -> str:
        return f"{self.scheme}://{self.bucket}/{self.key}".rstrip("/")

    def __truediv__(self, name: str) -> Place:
        return self._replace(key=f"{self.key}/{name}" if self.key else name)

    @property
    def name(self) -> str:
        """The last part of the key."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """What the name ends with, from its last dot on."""
        return PurePosixPath(self.key).suffix

    @property
    def folder(self) -> Place:
        """What it lies in."""
        return self._replace(key=self.key.rpartition("/")[0])

    def with_name(self, name: str) -> Place:
        """Return the place of this name beside this one."""
        return self.folder / name


def is_url(text: str) -> bool:
    """Return whether a text is the URL of an object store or of a web server."""
    return URL.fullmatch(text) is not None


def is_object(text: str) -> bool:
    """Return whether a text is the URL of an object store."""
    match = URL.fullmatch(text)
    return match is not None and match["scheme"] in OBJECTS


def check_url(url: str) -> None:
    """Raise UsageError where a URL can hold a secret, or can't be an object's; the message doesn't repeat a secret."""
    match = URL.fullmatch(url)
    if match is None:
        raise UsageError(f"{one_line(url, 80)}: is not a URL of {', '.join(f'{each}://' for each in (*OBJECTS, *WEB))}")
    scheme, host, shown = match["scheme"], re.split(r"[/?#]", match["rest"], maxsplit=1)[0], without_secrets(url)
    remedy = f"Set {CREDENTIALS[scheme]} instead." if scheme in CREDENTIALS else "Give a URL that needs none of it."
    has_password = ":" in host and (scheme in OBJECTS or PASSWORD.match(url) is not None)
    if "@" in host or has_password:
        shown = f"{scheme}://…" if has_password else shown
        raise UsageError(
            f"{shown}: has a user or a password in it, which would get into logs and manifests. Refused. {remedy}"
        )
    if "?" in url or "#" in url:
        raise UsageError(
            f"{shown}: has a query, which may be a signature or a token and would get into logs and manifests. "
            f"Refused. {remedy}"
        )
    if not host or not url.isprintable() or ".." in match["rest"].split("/"):
        raise UsageError(f"{one_line(shown, 200)}: is no URL that can be opened: {scheme}://NAME/PATH is expected.")


def without_secrets(text: str) -> str:
    """Return a text without what may be secrets: user, password, query and fragment of URLs, and the environment's."""
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET.search(name):
            text = text.replace(value, "…")
    text = PASSWORD.sub(r"\g<scheme>…@", text)
    text = re.sub(r"(?P<scheme>\w+://)[^/\s?#]*@", r"\g<scheme>…@", text)
    return re.sub(r"(?P<url>\w+://[^\s?#'\")]*)[?#][^\s'\")]*", r"\g<url>?…", text)


def parse_place(url: str) -> Place:
    """Return the place that the URL of an object store names. Raises UsageError as ``check_url``."""
    check_url(url)
    if not is_object(url):
        raise UsageError(f"{url}: is not in an object store ({', '.join(f'{each}://' for each in OBJECTS)}).")
    place = place_at(url)
    if {"", "."} & {*place.key.split("/")} and place.key:  # a client may take it for another, or ask again for a minute
        raise UsageError(f"{url}: can't be read or written: a part of its path is empty, or a dot.")
    return place


def place_at(url: str) -> Place:
    """Return the place of a URL that was made here: of a place that was checked, and of names that a store told.

    These may hold what a user's URL may not, such as a question mark.
    """
    scheme, _, rest = url.partition("://")
    bucket, _, key = rest.strip("/").partition("/")
    return Place(scheme, bucket, key)


def store_of(place: Place, *, retries: int = 10, timeout: str = "120s") -> ObjectStore:
    """Return the client of a place's bucket, one for each process; keys are then paths in the bucket.

    Args:
        place: in the store.
        retries: how often the client itself repeats a request that failed: with exponential back-off and jitter, for
            connections that break, timeouts and answers 429 and 5xx.
        timeout: of a request; the environment goes first (``AWS_TIMEOUT`` …).

    Raises:
        CheckpointError: obstore isn't installed, or the environment isn't enough to open the store.
        RunError: this process was forked from one that has used a store.
    """
    try:
        import obstore  # noqa: F401
    except ImportError as error:
        raise CheckpointError(f"{place}: object stores need obstore: {INSTALL}") from error
    check_not_forked()
    _used_by.add(os.getpid())
    try:
        return _store(place.scheme, place.bucket, retries, timeout)
    except Exception as error:
        raise CheckpointError(f"{place}: can't be opened: {said(error)}. Set {CREDENTIALS[place.scheme]}.") from error


def is_on(value: str) -> bool:
    """Return whether a variable's text switches something on."""
    return value.lower() in ("1", "true", "yes", "on", "t", "y")


def unsigned(place: Place) -> str:
    """Return where an object of S3 is requested that everybody may read: a signed URL without what signs it."""
    import obstore
    from obstore.store import S3Store

    store = S3Store(
        place.bucket,
        skip_signature=False,
        access_key_id="nobody",
        secret_access_key="nothing",
        client_options=cast(Any, _client_options(place.scheme)),
    )
    signed: str = obstore.sign(store, "GET", place.key, timedelta(hours=1))
    return signed.partition("?")[0]


def is_usable() -> bool:
    """Return whether this process may use stores: no process that it was forked from has."""
    return _used_by <= {os.getpid()}


def check_not_forked() -> None:
    """Raise RunError where this process was forked from one that has used a store: a request would never end."""
    if not is_usable():
        raise RunError(
            "This process was forked from one that had used an object store, whose client doesn't survive that. Start "
            "a fresh process for it (multiprocessing's spawn)."
        )


def said(error: BaseException) -> str:
    """Return what a client's error says, in one line without secrets: of a server's answer only its status and code.

    An answer's text may repeat the name of a key, or all that was signed.
    """
    text = str(error).split("\n\nDebug source:", maxsplit=1)[0]
    if type(error).__name__ == "InvalidPathError":
        key = re.search(r'Path "([^"]*)"', text)
        what = f"a key {key[1]!r}" if key else "a key"
        why = f"the store has {what} with a part that is empty or dots, which its client can't list"
        return one_line(f"{why}: move it away, or read a copy without it", 300)
    if "builder error" in text:  # of a client that is not allowed to make the request
        return "an endpoint without TLS is asked only if AWS_ALLOW_HTTP=true is set (GOOGLE_…, AZURE_…)"
    if status := re.search(r"status code: (\d{3}[ \w]*)", text):
        code = re.search(r"<Code>(\w+)</Code>", text)
        return f"the store answered {status[1].strip()}" + (f" ({code[1]})" if code else "")
    return one_line(without_secrets(text), 300).rstrip(". ")


def is_final(error: BaseException) -> bool:
    """Return whether a client's error tells of what asking again doesn't change."""
    told = re.search(r"(answered |code: )4(?!08|25|29)\d\d|without TLS", said(error)) is not None
    return told or type(error).__name__ == "InvalidPathError"


def no_bucket(place: Place, why: str) -> str | None:
    """Return what to do where an answer, as ``said``, tells that there is no such bucket; None where it doesn't."""
    if NO_BUCKET.search(why) is None:
        return None
    what = "container" if place.scheme == "az" else "bucket"
    return (
        f"{place._replace(key='')}: there is no such {what}: {why}. Check its name, and what the environment says: "
        f"{CREDENTIALS[place.scheme]}."
    )


@lru_cache(maxsize=64)
def _store(scheme: str, bucket: str, retries: int, timeout: str) -> ObjectStore:
    from obstore.store import from_url

    store: ObjectStore = from_url(
        f"{scheme}://{bucket}",
        client_options=cast(Any, _client_options(scheme, timeout)),
        retry_config={
            "max_retries": retries,
            "retry_timeout": timedelta(minutes=4),
            "backoff": {"init_backoff": timedelta(seconds=FIRST), "max_backoff": timedelta(seconds=LONGEST), "base": 2},
        },
    )
    return store


def _client_options(scheme: str, timeout: str = "120s") -> dict[str, object]:
    """Return how requests are made. What the environment says goes first: options given here would hide all of it."""
    options: dict[str, object] = {"connect_timeout": "10s", "timeout": timeout}
    for name in (*SWITCHES, *TEXTS):
        if value := os.environ.get(f"{PREFIXES[scheme]}_{name.upper()}"):
            options[name] = is_on(value) if name in SWITCHES else value
    return options


def denied(url: str) -> str:
    """Return what to do where the credentials don't give access to a URL."""
    scheme = url.partition("://")[0]
    return f"access was refused. Set {CREDENTIALS[scheme]}." if scheme in CREDENTIALS else "access was refused."
