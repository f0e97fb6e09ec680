"""A shared access signature of a container, as Azure's documentation describes it."""

from __future__ import annotations

import base64
import hashlib
import hmac
from datetime import UTC, datetime, timedelta
from functools import cache
from urllib.parse import urlencode

ACCOUNT = "account"
VERSION = "2020-12-06"


@cache
def token(key: str, container: str, permissions: str = "rwdl") -> str:
    """Return one that allows for an hour what its letters say: to read, write, delete and list."""
    until = (datetime.now(UTC) + timedelta(hours=1)).strftime("%Y-%m-%dT%H:%M:%SZ")
    place = f"/blob/{ACCOUNT}/{container}"
    signed = [permissions, "", until, place, "", "", "", VERSION, "c", *[""] * 7]
    digest = hmac.new(base64.b64decode(key), "\n".join(signed).encode(), hashlib.sha256).digest()
    told = {"sv": VERSION, "sr": "c", "sp": permissions, "se": until}
    return urlencode({**told, "sig": base64.b64encode(digest).decode()})
