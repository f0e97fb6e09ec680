"""The reply of a server, which may be anything: read up to a bound, and checked before it is an answer."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import aclosing
from typing import TYPE_CHECKING, Any, NamedTuple, cast

if TYPE_CHECKING:
    from httpx2 import Response

LONGEST_REPLY = 4 << 20  # bytes
MOST_TOKENS = 10**9  # a count beyond is none
UNREADABLE = "a reply that can't be read"


class Reply(NamedTuple):
    """The reply to a question; see ``rows.Answer``."""

    text: str
    finish: str
    tokens: int | None
    thoughts: str | None = None


class Failed(Exception):
    """A request got no reply.

    Attributes:
        repeat: it is worth making again.
        stop: nobody gets a reply there.
        fresh_seed: the same seed would give the same.
        wait: seconds that the server asked for.
        refused: the parameter that the server doesn't take.
    """

    def __init__(
        self,
        why: str,
        *,
        repeat: bool,
        stop: bool = False,
        fresh_seed: bool = False,
        wait: float = 0.0,
        refused: str | None = None,
    ):
        super().__init__(why)
        self.repeat = repeat
        self.stop = stop
        self.fresh_seed = fresh_seed
        self.wait = wait
        self.refused = refused


async def body_of(response: Response, longest: int = LONGEST_REPLY) -> bytes:
    """Return a body as it was sent, nothing unpacked; of one beyond ``longest`` bytes only a little more than that."""
    body = bytearray()
    async with aclosing(response.aiter_raw()) as pieces:
        async for piece in pieces:
            body += piece
            if len(body) > longest:
                break
    return bytes(body)


def replies_in(body: bytes, number: int, blank: bool = False) -> list[Reply | None]:
    """Return the replies that a body has, ``number`` at most, in the order of their ``index``.

    One that is empty, or that a filter cut, is None where several were asked for. ``blank`` says that an empty one is a
    reply: of an answer that was given whole there is nothing more to say.

    Raises:
        Failed: there is none.
    """
    if number == 1:
        return [reply_in(body, blank)]
    content = _content(body)
    choices = sorted(enumerate(content["choices"]), key=lambda choice: _place(*choice))[:number]
    found: list[Reply | None] = []
    for _, choice in choices:
        try:
            found.append(_reply(choice, None, blank))
        except Failed as failed:
            if not failed.fresh_seed:
                raise
            found.append(None)
    return found


def reply_in(body: bytes, blank: bool = False) -> Reply:
    """Return the reply that a body has, ``blank`` as in ``replies_in``; not all servers follow the protocol.

    A reply without text that was cut at the limit is one too: a model has thoughts in most of such cases, which took
    all tokens. To ask again would cost the same and end alike.

    Raises:
        Failed: it has none.
    """
    content = _content(body)
    return _reply(content["choices"][0], _count(content, "completion_tokens"), blank)


def tokens_read(body: bytes) -> int | None:
    """Return how many tokens a server says it has read; None where it says nothing of it. Raises Failed."""
    return _count(_content(body), "prompt_tokens")


def _count(content: Mapping[str, Any], of: str) -> int | None:
    usage = content.get("usage")
    tokens = usage.get(of) if isinstance(usage, dict) else None
    return tokens if type(tokens) is int and 0 <= tokens <= MOST_TOKENS else None


def _content(body: bytes) -> dict[str, Any]:
    """Return what a body says, with at least one choice."""
    if len(body) > LONGEST_REPLY:
        raise Failed(f"a reply of more than {LONGEST_REPLY >> 20} MB", repeat=True)
    try:
        content = json.loads(body)
    except (ValueError, RecursionError) as error:
        raise Failed(UNREADABLE, repeat=True) from error
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not choices:
        raise Failed(UNREADABLE, repeat=True)
    return cast("dict[str, Any]", content)


def _place(place: int, choice: Any) -> int:
    index = choice.get("index") if isinstance(choice, dict) else None
    return index if type(index) is int else place


def _reply(choice: Any, tokens: int | None, blank: bool) -> Reply:
    message = choice.get("message") if isinstance(choice, dict) else None
    if isinstance(choice, dict) and "message" not in choice and isinstance(choice.get("text"), str):
        message = {"content": choice["text"]}  # of a completion
    if not isinstance(message, dict):
        raise Failed(UNREADABLE, repeat=True)
    text, finish = message.get("content"), choice.get("finish_reason")
    if finish == "content_filter":
        raise Failed("cut by the server's content filter", repeat=True, fresh_seed=True)
    ended = "length" if finish == "length" else "stop"
    if not isinstance(text, str) or not text.strip():
        if (ended == "stop" and not blank) or not (text is None or isinstance(text, str)):
            raise Failed("an empty reply", repeat=True, fresh_seed=True)
        text = ""
    return Reply(_whole(text), ended, tokens, _thoughts(message))


def _thoughts(message: dict[str, Any]) -> str | None:
    """Return the reasoning that a server sends beside the text: vLLM, SGLang and DeepSeek differ in its name."""
    sent = (message.get(name) for name in ("reasoning_content", "reasoning"))
    return next((_whole(thoughts) for thoughts in sent if isinstance(thoughts, str) and thoughts.strip()), None)


def _whole(text: str) -> str:
    """Return a text without halves of surrogate pairs, which can't be written."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
