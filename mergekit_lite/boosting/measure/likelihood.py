"""Candidates measured without an answer: by how likely they find texts and the two responses of preference pairs.

Rows of pairs have ``chosen`` and ``rejected``, each a text or a conversation that ends with the answer, and ``prompt``
or ``messages`` where these are not conversations. Texts are rows with ``text``, or the paragraphs of a ``.txt`` file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers.likelihood import LogProb, Pair, text_log_probs
from mergekit_lite.answers.rows import Message, read_rows
from mergekit_lite.answers.template import TemplateError, Tokens
from mergekit_lite.boosting.candidates.candidate import Numbers, Row
from mergekit_lite.boosting.measure.resident_model import Stand
from mergekit_lite.boosting.measure.scores import NLL, PAIRS
from mergekit_lite.errors import UsageError, listing, shortened

MARGIN = f"{PAIRS}.margin"
CHUNK = 64  # items that are read before their rows are told
WINDOW = 2048  # tokens of a text that are read at once, or as many as the model takes


class Ranking:
    """How a candidate ranks preference pairs by length-normalised log-probability.

    ``pairs`` is 1 where the chosen response is likelier, ½ where both are as likely; ``pairs.margin`` is by how many
    nats a token. The margin grows with alpha by itself; so the ranking decides.
    """

    names = (PAIRS, MARGIN)
    asked: Mapping[str, str] = MappingProxyType({})

    def __init__(self, stand: Stand, pairs: Mapping[str, Pair], batch_size: int) -> None:
        """``pairs`` by their items."""
        self.stand = stand
        self.pairs = pairs
        self.batch_size = batch_size

    @property
    def items(self) -> list[str]:
        """One for each pair."""
        return list(self.pairs)

    def rows(self, numbers: Numbers, items: Sequence[str], wanted: frozenset[str]) -> Iterator[Row]:
        """The rows of the wanted pairs. One that the template refuses, or that is too long, has no verdict."""
        for chunk in _chunks(items, wanted):
            self.stand.put(numbers)
            sides = {item: self._sides(self.pairs[item]) for item in chunk}
            rows = [side for both in sides.values() if both is not None for side in both]
            found = iter(self.stand.log_probs(rows, self.batch_size))
            for item in chunk:
                values: dict[str, float | None] = dict.fromkeys(self.names)
                if sides[item] is not None:
                    margin = next(found).mean - next(found).mean
                    if math.isfinite(margin):
                        values = {PAIRS: 0.5 if margin == 0 else float(margin > 0), MARGIN: margin}
                yield Row(item=item, values=values)

    def _sides(self, pair: Pair) -> tuple[Tokens, Tokens] | None:
        template, most = self.stand.template, self.stand.context
        try:
            chosen, rejected = (template.tokens(pair.messages, text) for text in (pair.chosen, pair.rejected))
        except TemplateError:
            return None
        longest = max(sum(map(len, side)) for side in (chosen, rejected))
        return None if most is not None and longest > most else (chosen, rejected)


class Reading:
    """How likely a candidate finds texts: the mean log-probability of a token, which is −NLL."""

    names = (NLL,)
    asked: Mapping[str, str] = MappingProxyType({})

    def __init__(self, stand: Stand, texts: Mapping[str, str], batch_size: int) -> None:
        """``texts`` by their items."""
        self.stand = stand
        self.texts = texts
        self.batch_size = batch_size

    @property
    def items(self) -> list[str]:
        """One for each text."""
        return list(self.texts)

    def rows(self, numbers: Numbers, items: Sequence[str], wanted: frozenset[str]) -> Iterator[Row]:
        """The rows of the wanted texts."""
        for chunk in _chunks(items, wanted):
            self.stand.put(numbers)
            window = min(WINDOW, self.stand.context or WINDOW)
            texts = [self.texts[item] for item in chunk]
            found = text_log_probs(self.stand.model, self.stand.tokenizer, texts, window, self.batch_size)
            for item, told in zip(chunk, found, strict=True):
                yield Row(item=item, values={NLL: _mean(told)})


def _mean(found: LogProb) -> float | None:
    return found.mean if found.tokens and math.isfinite(found.total) else None


def _chunks(items: Sequence[str], wanted: frozenset[str]) -> Iterator[list[str]]:
    """The wanted items, some at a time: what is read together is cut from all of them."""
    for start in range(0, len(items), CHUNK):
        if chunk := [item for item in items[start : start + CHUNK] if item in wanted]:
            yield chunk


def read_pairs(path: Path, limit: int | None = None) -> dict[str, Pair]:
    """The preference pairs of a JSON Lines file, by item.

    Raises:
        UsageError: it can't be read, has no pairs, or some are wrong; every one is told.
    """
    found: dict[str, Pair] = {}
    problems: list[str] = []
    for number, row, _ in read_rows(path, problems):
        try:
            pair = _pair(row)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        found.setdefault(_item("pair", row.get("id"), pair), pair)
    return _some(path, "preference pairs", found, problems, limit)


def read_texts(path: Path, limit: int | None = None) -> dict[str, str]:
    """The texts of a file, by item.

    Raises:
        UsageError: it can't be read, has no texts, or some rows are wrong; every one is told.
    """
    problems: list[str] = []
    texts: list[str] = []
    if path.suffix == ".txt":
        try:
            whole = path.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"Can't read {path}: {error}.") from error
        texts = [text.strip() for text in whole.split("\n\n") if text.strip()]
    else:
        for number, row, _ in read_rows(path, problems):
            if isinstance(row.get("text"), str) and row["text"].strip():
                texts.append(row["text"])
            else:
                problems.append(f"{path}:{number}: no 'text'")
    return _some(path, "texts", {_item("text", None, text): text for text in texts}, problems, limit)


def _item(kind: str, given: object, content: object) -> str:
    return f"{kind}:{given if isinstance(given, str | int) else xxh3_64_hexdigest(repr(content).encode())}"


def _some(path: Path, what: str, found: dict[str, Any], problems: Sequence[str], limit: int | None) -> dict[str, Any]:
    if problems:
        raise UsageError(listing(f"{path} has rows that are no {what}", problems))
    if not found:
        raise UsageError(f"{path}: has no {what}.")
    return dict(list(found.items())[:limit])


def _pair(row: Mapping[str, Any]) -> Pair:
    """Raises ValueError."""
    chosen, before = _response(row, "chosen")
    rejected, also_before = _response(row, "rejected")
    messages = _messages(row) or before
    if messages is None:
        raise ValueError("no 'prompt' and no 'messages'")
    if before is not None and also_before is not None and before != also_before:
        raise ValueError("'chosen' and 'rejected' answer different conversations")
    if chosen == rejected:
        raise ValueError("'chosen' and 'rejected' are the same")
    return Pair(messages, chosen, rejected)


def _response(row: Mapping[str, Any], key: str) -> tuple[str, tuple[Message, ...] | None]:
    """A response, and the conversation before it where it comes with one."""
    given = row.get(key)
    if isinstance(given, str) and given.strip():
        return given, None
    if isinstance(given, list) and given and _is_message(given[-1]) and given[-1]["role"] == "assistant":
        return given[-1]["content"], _conversation(given[:-1], key) if given[:-1] else None
    raise ValueError(
        f"{key!r} is {shortened(given, 60)!r}, expected a text or a conversation that ends with the answer"
    )


def _messages(row: Mapping[str, Any]) -> tuple[Message, ...] | None:
    given = row.get("messages", row.get("prompt"))
    if isinstance(given, str) and given.strip():
        return (Message(role="user", content=given),)
    return _conversation(given, "messages") if isinstance(given, list) and given else None


def _conversation(given: Sequence[Any], key: str) -> tuple[Message, ...]:
    if not all(map(_is_message, given)):
        raise ValueError(f"{key!r}: expected messages {{role, content}}, got {shortened(given, 60)!r}")
    return tuple(Message(role=each["role"], content=each["content"]) for each in given)


def _is_message(given: object) -> bool:
    return isinstance(given, dict) and isinstance(given.get("role"), str) and isinstance(given.get("content"), str)
