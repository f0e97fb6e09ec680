"""The reply of a server, which may be anything: read up to a bound, and checked before it is an answer."""

from __future__ import annotations

import json
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple

if TYPE_CHECKING:
    from httpx2 import Response

LONGEST_REPLY = 4 << 20  # bytes
MOST_TOKENS = 10**9  # a count beyond is none


class Reply(NamedTuple):
    """The reply to a question; see ``rows.Answer``."""

    text: str
    finish: str
    tokens: int | None
    thoughts: str | None = None


class Failed(Exception):
    """A request got no reply. ``wait``: seconds that the server asked for."""

    def __init__(self, why: str, *, repeat: bool, stop: bool = False, fresh_seed: bool = False, wait: float = 0.0):
        super().__init__(why)
        self.repeat = repeat
        self.stop = stop
        self.fresh_seed = fresh_seed
        self.wait = wait


async def body_of(response: Response) -> bytes:
    """Return a body as it was sent, nothing unpacked; of one beyond ``LONGEST_REPLY`` only a little more than that."""
    body = bytearray()
    async with aclosing(response.aiter_raw()) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > LONGEST_REPLY:
                break
    return bytes(body)


def reply_in(body: bytes) -> Reply:
    """Return the reply that a body has; not all servers follow the protocol.

    Raises:
        Failed: it has none.
    """
    if len(body) > LONGEST_REPLY:
        raise Failed(f"a reply of more than {LONGEST_REPLY >> 20} MB", repeat=True)
    try:
        content = json.loads(body)
        choice = content["choices"][0]
        message, finish = choice["message"], choice.get("finish_reason")
        text = message["content"]
        usage = content.get("usage")
    except (ValueError, RecursionError, LookupError, TypeError, AttributeError) as error:
        raise Failed("a reply that can't be read", repeat=True) from error
    if finish == "content_filter":
        raise Failed("cut by the server's content filter", repeat=True, fresh_seed=True)
    if not isinstance(text, str) or not text.strip():
        raise Failed("an empty reply", repeat=True, fresh_seed=True)
    tokens = usage.get("completion_tokens") if isinstance(usage, dict) else None
    counted = type(tokens) is int and 0 <= tokens <= MOST_TOKENS
    ended = "length" if finish == "length" else "stop"
    return Reply(_whole(text), ended, tokens if counted else None, _thoughts(message))


def _thoughts(message: dict[str, Any]) -> str | None:
    """Return the reasoning that a server sends beside the text: vLLM, SGLang and DeepSeek differ in its name."""
    sent = (message.get(name) for name in ("reasoning_content", "reasoning"))
    return next((_whole(thoughts) for thoughts in sent if isinstance(thoughts, str) and thoughts.strip()), None)


def _whole(text: str) -> str:
    """Return a text without halves of surrogate pairs, which can't be written."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
