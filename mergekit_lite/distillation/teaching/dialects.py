"""How servers tell the log-probabilities of given tokens. None of the ways is a standard.

- vLLM: ``/v1/completions`` with ``prompt_logprobs`` tells ids, and the likeliest tokens up to ``--max-logprobs``, which
  is 20 unless it is set.
- SGLang: ``/generate`` with ``return_logprob``, ``logprob_start_len`` and ``top_logprobs_num``: the same, unbounded.
- Those that have OpenAI's former ``echo`` with ``logprobs`` in ``/v1/completions`` (llama-cpp-python, services) tell
  texts of tokens, which may be those of several ids: from them come only the own log-probabilities of the tokens sent.
  llama-cpp-python (0.3.36) takes texts alone, and leaves the model's first token (BOS) out of what it tells, wherever
  it is. Where a text begins with another one, its log-probabilities are those of one place later, and worth nothing.

llama.cpp's server refuses ``echo`` and tells log-probabilities of generated tokens only; so does ``transformers
serve``, and Ollama. The tokens that a server tells, or their texts, are held to those that were sent: where one adds a
token at the begin, or has another tokenizer, nothing is taken from it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import numpy as np

from mergekit_lite.answers.replies import UNREADABLE, Failed
from mergekit_lite.answers.template import Tokens
from mergekit_lite.distillation.teaching.scoring import Said

NEXT_TO_NOTHING = -9999.0  # what vLLM sends for −∞, which JSON hasn't
TOKEN_ID = "token_id:"  # before the id, where vLLM sends ids in the place of texts
BLANKS = {ord("▁"): " ", ord("Ġ"): " ", ord("Ċ"): "\n"}
OTHER_TOKENS = "its tokens are not those that were sent"
SHIFTED = (
    f"{OTHER_TOKENS}: it tells no generated one after them, as llama-cpp-python where a text doesn't begin with its "
    "model's BOS token. Its log-probabilities are then those of one place later."
)
UNSURE = "�"  # a part of a character
DIGITS = re.compile(r"[0-9]{1,10}")


class Absent(Exception):
    """A reply has no log-probabilities of the prompt in this way."""


class Dialect(Protocol):
    """A way to ask, and to read the reply."""

    name: str
    optional: tuple[str, ...]  # parameters that may be left out where a server refuses them

    def address(self, url: str) -> str:
        """Return where requests go, for the URL of a server as recipes have it."""

    def body(self, model: str, tokens: Tokens, top: int) -> dict[str, Any]:
        """Return the body of a request."""

    def said(self, content: Any, tokens: Tokens, top: int) -> Said:
        """Return what a reply says.

        Raises:
            Absent: it says nothing in this way.
            Failed: it can't be read, or tells other tokens than were sent.
        """


class PromptLogprobs:
    """vLLM's way."""

    name = "prompt_logprobs"
    optional: tuple[str, ...] = ()

    def address(self, url: str) -> str:
        """Return where requests go."""
        return f"{url.rstrip('/')}/completions"

    def body(self, model: str, tokens: Tokens, top: int) -> dict[str, Any]:
        """Return the body of a request."""
        prompt = [*tokens.prompt, *tokens.response]
        return {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 1, "prompt_logprobs": top}

    def said(self, content: Any, tokens: Tokens, top: int) -> Said:
        """Return what a reply says."""
        entries = _choice(content).get("prompt_logprobs", content.get("prompt_logprobs"))
        if not isinstance(entries, list):
            raise Absent
        sent = [*tokens.prompt, *tokens.response]
        _same_number(len(entries), len(sent))
        own: list[float] = []
        best: list[list[tuple[float, int]]] = []
        for place, (token, entry) in enumerate(zip(sent, entries, strict=True)):
            if entry is None and place == 0:
                continue
            if not isinstance(entry, dict):
                raise Failed(UNREADABLE, repeat=True)
            if str(token) not in entry:
                raise _other(f"token {place:,} is not {token} there")
            if place >= len(tokens.prompt):
                told = [(_number(each, "logprob"), _id(name)) for name, each in entry.items()]
                own.append(_number(entry[str(token)], "logprob"))
                best.append(told)
        return _said(own, best, top)


class Generate:
    """SGLang's way."""

    name = "generate"
    optional: tuple[str, ...] = ()

    def address(self, url: str) -> str:
        """Return where requests go: beside ``/v1``, not below it."""
        return f"{url.rstrip('/').removesuffix('/v1')}/generate"

    def body(self, model: str, tokens: Tokens, top: int) -> dict[str, Any]:
        """Return the body of a request."""
        return {
            "input_ids": [*tokens.prompt, *tokens.response],
            "sampling_params": {"max_new_tokens": 1, "temperature": 1},
            "return_logprob": True,
            "logprob_start_len": len(tokens.prompt) - 1,
            "top_logprobs_num": top,
        }

    def said(self, content: Any, tokens: Tokens, top: int) -> Said:
        """Return what a reply says."""
        meta = content.get("meta_info") if isinstance(content, dict) else None
        entries = meta.get("input_token_logprobs") if isinstance(meta, dict) else None
        if not isinstance(entries, list) or not isinstance(meta, dict):
            raise Absent
        number = len(tokens.response)
        own = [_pair(each) for each in entries[-number:]]
        _same_number(len(own), number)
        for place, (told, token) in enumerate(zip(own, tokens.response, strict=True)):
            if told[1] != token:
                raise _other(f"token {place:,} of the response is {told[1]} there, and {token} here")
        best: list[list[tuple[float, int]]] = [[] for _ in own]
        if top:
            likeliest = meta.get("input_top_logprobs")
            if not isinstance(likeliest, list) or len(likeliest) < number:
                raise Absent
            best = [[_pair(each) for each in _list(told)] for told in likeliest[-number:]]
        return _said([value for value, _ in own], best, top)


class Echo:
    """OpenAI's former way: the prompt comes back with the texts of its tokens, and their own log-probabilities.

    Args:
        spell: returns the text of a token.
        text: returns the text of all, for servers that take no ids; None where they do.
    """

    name = "echo"
    optional: tuple[str, ...] = ()

    def __init__(self, spell: Callable[[int], str], text: Callable[[Sequence[int]], str] | None = None):
        self.spell = spell
        self.text = text

    def address(self, url: str) -> str:
        """Return where requests go."""
        return f"{url.rstrip('/')}/completions"

    def body(self, model: str, tokens: Tokens, top: int) -> dict[str, Any]:
        """Return the body of a request; of the likeliest tokens it would get texts, which may be those of several."""
        ids = [*tokens.prompt, *tokens.response]
        prompt = ids if self.text is None else self.text(ids)
        return {"model": model, "prompt": prompt, "max_tokens": 1, "temperature": 1, "echo": True, "logprobs": 1}

    def said(self, content: Any, tokens: Tokens, top: int) -> Said:
        """Return what a reply says."""
        told = _choice(content).get("logprobs")
        texts = told.get("tokens") if isinstance(told, dict) else None
        values = told.get("token_logprobs") if isinstance(told, dict) else None
        if not isinstance(texts, list) or not isinstance(values, list) or len(texts) != len(values):
            raise Absent
        sent = [*tokens.prompt, *tokens.response]
        if len(values) <= 1:  # the one that was generated
            raise Absent
        usage = content.get("usage")
        read = usage.get("prompt_tokens") if isinstance(usage, dict) else None
        if self.text is not None and type(read) is int and read != len(sent):
            raise self._other(f"it has read {read:,} tokens of the text, which are {len(sent):,} here")
        if len(texts) == len(sent) and self._difference(texts, sent) is None:  # without the one that was generated
            raise Failed(SHIFTED, repeat=False)
        told = sent if len(texts) == len(sent) + 1 else [token for token in sent if token != sent[0]]
        if len(texts) - len(told) not in (0, 1):
            raise self._other(f"it tells {len(texts) - 1:,} tokens, and {len(sent):,} were sent")
        if (why := self._difference(texts, told)) is not None:
            raise self._other(why)
        if told is not sent and sent[0] in tokens.response:
            raise self._other(f"it leaves {self.spell(sent[0])!r} out, which is in the response")
        own = values[len(told) - len(tokens.response) : len(told)]
        return _said([_float(value) for value in own], [[] for _ in tokens.response], 0)

    def _difference(self, texts: Sequence[Any], sent: Sequence[int]) -> str | None:
        """Return where texts that are told aren't those of the tokens that were sent; None where they may be."""
        for place, (text, token) in enumerate(zip(texts, sent, strict=False)):
            if not self._is(text, token):
                return f"token {place:,} is {text!r} there, and {self.spell(token)!r} here"
        return None

    def _other(self, why: str) -> Failed:
        """Return the error of other tokens: of one row alone, where its text is sent and cut into tokens there."""
        failed = _other(why)
        failed.stop = self.text is None
        return failed

    def _is(self, text: Any, token: int) -> bool:
        """Return whether a token that is told by its text may be the one that was sent."""
        if not isinstance(text, str):
            raise Failed(UNREADABLE, repeat=True)
        if text.startswith(TOKEN_ID):
            return text == f"{TOKEN_ID}{token}"
        own = self.spell(token)
        unsure = UNSURE in own or UNSURE in text or text.startswith("bytes:")
        return unsure or not text or _bare(text) == _bare(own)  # some tell special tokens by no text at all


class Either:
    """Asks in both ways of ``/v1/completions`` at once, to find out which one a server knows."""

    name = "either"
    optional: tuple[str, ...] = ("prompt_logprobs", "echo", "logprobs")

    def __init__(self, echo: Echo):
        self.ways: tuple[Dialect, ...] = (PromptLogprobs(), echo)
        self.found: Dialect | None = None

    def address(self, url: str) -> str:
        """Return where requests go."""
        return self.ways[0].address(url)

    def body(self, model: str, tokens: Tokens, top: int) -> dict[str, Any]:
        """Return the body of a request."""
        return {key: value for way in self.ways for key, value in way.body(model, tokens, top).items()}

    def said(self, content: Any, tokens: Tokens, top: int) -> Said:
        """Return what a reply says, and note in which way."""
        for way in self.ways:
            try:
                said = way.said(content, tokens, top)
            except Absent:
                continue
            self.found = way
            return said
        raise Absent


def _said(own: Sequence[float], best: Sequence[Sequence[tuple[float, int]]], top: int) -> Said:
    """Return what is said of a response, given what is told of each position in any order.

    Raises:
        Failed: it is no distribution: a token is told twice, or the sum is above 1.
    """
    rows = [sorted(set(told), key=lambda each: -each[0])[:top] for told in best]
    if any(len({token for _, token in row}) < len(row) for row in rows):
        raise Failed("a likely token that it tells twice, with two values", repeat=False)
    width = max(map(len, rows), default=0)
    ids = np.zeros((len(own), width), np.int32)
    values = np.full((len(own), width), -np.inf, np.float32)
    for place, row in enumerate(rows):
        if row:
            values[place, : len(row)], ids[place, : len(row)] = zip(*row, strict=True)
    sums = np.exp(values.astype(np.float64)).sum(1)
    if (sums > 1.001).any():
        raise Failed(f"probabilities of {sums.max():.3f} in sum", repeat=False)
    values -= np.maximum(0, np.log(np.maximum(sums, 1e-30)))[:, None].astype(np.float32)
    return Said(np.array(own, np.float32), ids, values)


def _bare(text: str) -> str:
    """Return a token's text without blanks and the signs that stand for them in vocabularies."""
    return text.translate(BLANKS).strip()


def _choice(content: Any) -> dict[str, Any]:
    choices = content.get("choices") if isinstance(content, dict) else None
    if not isinstance(choices, list) or not choices or not isinstance(choices[0], dict):
        raise Failed(UNREADABLE, repeat=True)
    return choices[0]


def _same_number(told: int, sent: int) -> None:
    if told != sent:
        raise _other(f"it tells {told:,} tokens, and {sent:,} were sent")


def _other(why: str) -> Failed:
    return Failed(
        f"{OTHER_TOKENS}: {why}. Name the model that it serves as `model`, or serve this one.",
        repeat=False,
        stop=True,
    )


def _number(entry: Any, name: str) -> float:
    return _float(entry.get(name) if isinstance(entry, dict) else None)


def _float(value: Any) -> float:
    """Return a log-probability. Raises Failed where it is none: NaN, above 0, no number."""
    if type(value) not in (int, float) or not value <= 0.01:  # NaN is neither
        raise Failed(UNREADABLE, repeat=True)
    return -math.inf if value <= NEXT_TO_NOTHING else min(0.0, float(value))


def _id(name: Any) -> int:
    """Return the id of a token, which is a number or its digits. Raises Failed where it is none."""
    if isinstance(name, str) and DIGITS.fullmatch(name):
        name = int(name)
    if type(name) is not int or not 0 <= name < 1 << 31:
        raise Failed(UNREADABLE, repeat=True)
    return name


def _pair(told: Any) -> tuple[float, int]:
    if not isinstance(told, list) or len(told) < 2:
        raise Failed(UNREADABLE, repeat=True)
    return _float(told[0]), _id(told[1])


def _list(told: Any) -> list[Any]:
    if not isinstance(told, list):
        raise Failed(UNREADABLE, repeat=True)
    return told
