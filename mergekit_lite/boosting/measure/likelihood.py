"""Candidates measured without answers: by how likely they find texts and the two responses of preference pairs.

Rows of pairs have ``chosen`` and ``rejected``, each a text or a conversation that ends with the answer, and ``prompt``
or ``messages`` where these are not conversations. Texts are rows with ``text``, or the paragraphs of a ``.txt`` file.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers.likelihood import Pair, text_log_probs
from mergekit_lite.answers.rows import Message, read_rows
from mergekit_lite.answers.template import Tokens
from mergekit_lite.boosting.candidates.candidate import NONE, ItemRow, Params, Rivals
from mergekit_lite.boosting.measure.resident_model import ResidentModel
from mergekit_lite.boosting.measure.scores import NLL, PAIRS
from mergekit_lite.errors import UnreadableError, UsageError, listing, shortened
from mergekit_lite.input_files import read_text

MARGIN = f"{PAIRS}.margin"
ITEMS_AT_ONCE = 64  # items that are read before their rows are yielded
MAX_TEXT_BYTES = 2_000_000_000  # of a .txt file, which is read whole
WINDOW = 2048  # tokens of a text that are read at once, or as many as the model takes


@dataclass(frozen=True)
class PreferenceAccuracy:
    """Accuracy of a candidate on preference pairs, by length-normalised log-probability.

    ``pairs`` is 1 where the chosen response is likelier, ½ where both are equally likely; ``pairs.margin`` is the
    difference in nats a token. The margin grows with alpha by itself; so the accuracy decides.
    """

    resident: ResidentModel
    pairs: Mapping[str, Pair]  # by item
    batch_size: int
    names: ClassVar = (PAIRS, MARGIN)
    at_once: ClassVar = ITEMS_AT_ONCE
    asked: ClassVar[Mapping[str, str]] = {}

    @property
    def items(self) -> list[str]:
        """One item for each pair."""
        return list(self.pairs)

    def rows(
        self, params: Params, items: Sequence[str], wanted: frozenset[str], rivals: Rivals = NONE
    ) -> Iterator[ItemRow]:
        """Yield the rows of the wanted pairs. A pair that the template refuses, or that is too long, has no score."""
        for chunk in _chunks(items, wanted):
            self.resident.load(params)
            sides = {item: self._sides(self.pairs[item]) for item in chunk}
            rows = [side for both in sides.values() if both is not None for side in both]
            read = iter(self.resident.log_probs(rows, self.batch_size))
            for item in chunk:
                values: dict[str, float | None] = dict.fromkeys(self.names)
                if sides[item] is not None:
                    margin = next(read).mean - next(read).mean
                    if math.isfinite(margin):
                        values = {PAIRS: 0.5 if margin == 0 else float(margin > 0), MARGIN: margin}
                yield ItemRow(item=item, values=values)

    def _sides(self, pair: Pair) -> tuple[Tokens, Tokens] | None:
        chosen, rejected = (self.resident.tokens(pair.messages, text) for text in (pair.chosen, pair.rejected))
        return None if chosen is None or rejected is None else (chosen, rejected)


@dataclass(frozen=True)
class TextLikelihood:
    """The mean log-probability of a token of texts under a candidate, which is −NLL."""

    resident: ResidentModel
    texts: Mapping[str, str]  # by item
    batch_size: int
    names: ClassVar = (NLL,)
    at_once: ClassVar = ITEMS_AT_ONCE
    asked: ClassVar[Mapping[str, str]] = {}

    @property
    def items(self) -> list[str]:
        """One item for each text."""
        return list(self.texts)

    def rows(
        self, params: Params, items: Sequence[str], wanted: frozenset[str], rivals: Rivals = NONE
    ) -> Iterator[ItemRow]:
        """Yield the rows of the wanted texts."""
        for chunk in _chunks(items, wanted):
            self.resident.load(params)
            window = min(WINDOW, self.resident.context or WINDOW)
            texts = [self.texts[item] for item in chunk]
            read = text_log_probs(self.resident.model, self.resident.tokenizer, texts, window, self.batch_size)
            for item, likelihood in zip(chunk, read, strict=True):
                known = likelihood.tokens and likelihood.is_finite
                yield ItemRow(item=item, values={NLL: likelihood.mean if known else None})


def _chunks(items: Sequence[str], wanted: frozenset[str]) -> Iterator[list[str]]:
    """Yield the wanted items of each chunk; chunks are cut from all items, so a batch doesn't depend on the wanted."""
    for start in range(0, len(items), ITEMS_AT_ONCE):
        if chunk := [item for item in items[start : start + ITEMS_AT_ONCE] if item in wanted]:
            yield chunk


def read_pairs(path: Path, limit: int | None = None) -> dict[str, Pair]:
    """Read the preference pairs of a JSON Lines file, by item.

    Raises:
        UsageError: it can't be read, has no pairs, or some are wrong; the message has each of them.
    """
    pairs: dict[str, Pair] = {}
    problems: list[str] = []
    for number, row, _ in read_rows(path, problems):
        try:
            pair = _pair(row)
        except ValueError as error:
            problems.append(f"{path}:{number}: {error}")
            continue
        pairs.setdefault(_item("pair", row.get("id"), pair), pair)
    return _first(path, "preference pairs", pairs, problems, limit)


def read_texts(path: Path, limit: int | None = None) -> dict[str, str]:
    """Read the texts of a file, by item.

    Raises:
        UsageError: it can't be read, has no texts, or some rows are wrong; the message has each of them.
    """
    problems: list[str] = []
    texts: list[str] = []
    if path.suffix == ".txt":
        try:
            whole = read_text(path, MAX_TEXT_BYTES)
        except UnreadableError as error:
            raise UsageError(f"Can't read {path}: {error.reason}.") from error
        texts = [text.strip() for text in whole.split("\n\n") if text.strip()]
    else:
        for number, row, _ in read_rows(path, problems):
            if isinstance(row.get("text"), str) and row["text"].strip():
                texts.append(row["text"])
            else:
                problems.append(f"{path}:{number}: no 'text'")
    return _first(path, "texts", {_item("text", None, text): text for text in texts}, problems, limit)


def _item(kind: str, given: object, content: object) -> str:
    return f"{kind}:{given if isinstance(given, str | int) else xxh3_64_hexdigest(repr(content).encode())}"


def _first(path: Path, what: str, rows: dict[str, Any], problems: Sequence[str], limit: int | None) -> dict[str, Any]:
    if problems:
        raise UsageError(listing(f"{path} has rows that are no {what}", problems))
    if not rows:
        raise UsageError(f"{path}: has no {what}.")
    return dict(list(rows.items())[:limit])


def _pair(row: Mapping[str, Any]) -> Pair:
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
