"""Prompts from files and data sets of the hub (``data_files.py``).

A row has ``prompt``, a text, or ``messages``, a conversation whose last turn is the user's; and optionally ``id``,
``domain``, ``reference`` (the right answer) and ``tests`` (programs that an answer's code has to pass). Columns with
other names are mapped. Columns that ``keep`` names stay with the prompt, for scorers that are functions. A wrong row is
reported with its place and left out.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Literal, NamedTuple

from pydantic import Field
from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers.data_files import Data, rows_of
from mergekit_lite.answers.rows import Message, Prompt
from mergekit_lite.errors import UsageError, nearest, shortened

Column = Literal["id", "prompt", "messages", "domain", "reference", "tests"]
COLUMNS: tuple[Column, ...] = ("id", "prompt", "messages", "domain", "reference", "tests")
ROLES = ("system", "user", "assistant")


class Prompts(Data):
    """A source of prompts."""

    domain: str = ""  # of prompts without one
    columns: dict[Column, str] = Field(default={})  # ours: theirs
    keep: tuple[str, ...] | Literal["all"] = ()  # further columns, which a function that scores gets


@dataclass
class LoadedPrompts:
    """The prompts of some sources."""

    prompts: list[Prompt] = field(default_factory=list)  # the sound ones, each once, in the order of the data
    problems: list[str] = field(default_factory=list)  # of the rows that were left out, with their places
    repeated: int = 0  # how many rows were left out because an earlier row has the same conversation
    places: dict[str, str] = field(default_factory=dict)  # of each id
    _asked: set[str] = field(default_factory=set)  # digests of the conversations

    def read(self, source: Prompts) -> None:
        """Add the prompts of a source.

        Raises:
            UsageError: a file or data set can't be read, or has no column with prompts.
        """
        for values, kept, place in _rows(source, self.problems):
            try:
                self.add(_prompt(values, kept, source.domain), place)
            except ValueError as error:
                self.problems.append(f"{place}: {error}")

    def add(self, prompt: Prompt, place: str) -> None:
        """Add a prompt, unless its conversation was there before or its id is that of another one."""
        digest = digest_of(prompt.messages)
        if digest in self._asked:
            self.repeated += 1
        elif prompt.id in self.places:
            self.problems.append(
                f"{place}: the id {shortened(prompt.id, 60)!r} is that of another prompt at {self.places[prompt.id]}"
            )
        else:
            self._asked.add(digest)
            self.places[prompt.id] = place
            self.prompts.append(prompt)


def load(sources: Iterable[Prompts]) -> LoadedPrompts:
    """Read the prompts of all sources. Raises as ``LoadedPrompts.read``."""
    loaded = LoadedPrompts()
    for source in sources:
        loaded.read(source)
    return loaded


def digest_of(messages: Sequence[Message]) -> str:
    """Return a digest of a conversation; different conversations have different ones, in practice."""
    return xxh3_64_hexdigest(json.dumps([[m["role"], m["content"]] for m in messages]).encode())


def as_row(prompt: Prompt) -> dict[str, Any]:
    """Return a prompt as a row of a JSON Lines file; without a question, or an opponent, it has no such field."""
    row = asdict(prompt)
    for name in ("question", "opponent"):
        if not row[name]:
            del row[name]
    return row


def from_row(row: Mapping[str, Any]) -> Prompt:
    """Return the prompt of a row that ``as_row`` made."""
    return Prompt(
        id=row["id"],
        messages=tuple(row["messages"]),
        domain=row["domain"],
        reference=row["reference"],
        tests=tuple(row["tests"]),
        plain=row.get("plain", False),
        columns=row.get("columns", {}),
        question=row.get("question", ""),
    )


class _Row(NamedTuple):
    values: Mapping[Column, Any]  # by our names
    kept: Mapping[str, Any]  # other columns, by their own names
    place: str  # file and line


def _rows(source: Prompts, problems: list[str]) -> Iterator[_Row]:
    """Yield the rows of a source.

    Raises:
        UsageError: no row has a column that is to be kept.
    """
    names: dict[Column, str] = {column: source.columns.get(column, column) for column in COLUMNS}
    needed = (names["prompt"], names["messages"])
    columns = () if source.keep else tuple(names.values())
    seen: set[str] = set()
    for row, place in rows_of(source, problems, columns, needed):
        seen.update(row)
        ours = {column: row[name] for column, name in names.items() if row.get(name) is not None}
        keep = [name for name in row if name not in names.values()] if source.keep == "all" else source.keep
        yield _Row(ours, {name: row.get(name) for name in keep}, place)
    if seen:
        _hold_kept(source, sorted(seen))


def _hold_kept(source: Prompts, columns: Sequence[str]) -> None:
    for name in source.keep if source.keep != "all" else ():
        if name not in columns:
            where = f"{source.path or source.dataset} has no column {name!r} to keep"
            raise UsageError(f"{where}; it has {', '.join(columns)}.{nearest(name, columns)}")


def _prompt(values: Mapping[Column, Any], kept: Mapping[str, Any], domain: str) -> Prompt:
    messages = _messages(values)
    return Prompt(
        id=_plain_text(values, "id") or digest_of(messages),
        messages=messages,
        domain=_plain_text(values, "domain") or domain,
        reference=_plain_text(values, "reference"),
        tests=_tests(values.get("tests", ())),
        plain=isinstance(values.get("messages", values.get("prompt")), str),
        columns=_as_json(kept),
    )


def _as_json(kept: Mapping[str, Any]) -> Mapping[str, Any]:
    for name, value in kept.items():
        try:
            json.dumps(value, allow_nan=False)
        except (TypeError, ValueError) as error:
            raise ValueError(
                f"the column {name!r} has a value that JSON can't hold, and can't be kept: {error}"
            ) from error
    return kept


def _messages(values: Mapping[Column, Any]) -> tuple[Message, ...]:
    given = values.get("messages", values.get("prompt"))
    if given is None:
        raise ValueError("no 'prompt' and no 'messages'")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    if not isinstance(given, list) or not given:
        raise ValueError(f"expected a text or a list of messages, got {shortened(given, 60)!r}")
    messages = tuple(message_of(number, message) for number, message in enumerate(given, 1))
    if messages[-1]["role"] != "user":
        raise ValueError(f"the last message is of the role {messages[-1]['role']!r}, expected 'user': who is answered")
    return messages


def message_of(number: int, given: object) -> Message:
    """Return a message with a role and a text. Raises ValueError, which names it by its number."""
    if not isinstance(given, dict):
        raise ValueError(f"message {number}: expected {{role, content}}, got {shortened(given, 60)!r}")
    role, content = given.get("role"), given.get("content")
    if role not in ROLES:
        raise ValueError(f"message {number}: the role is {shortened(role, 60)!r}, expected one of {', '.join(ROLES)}")
    if not isinstance(content, str) or not content.strip():
        raise ValueError(f"message {number}: the content is {shortened(content, 60)!r}, expected a text")
    if any("\ud800" <= character <= "\udfff" for character in content):
        raise ValueError(f"message {number}: the content has half a surrogate pair, which no UTF-8 can tell")
    return Message(role=role, content=content)


def _plain_text(values: Mapping[Column, Any], column: Column) -> str | None:
    value = values.get(column)
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, int | float) and not isinstance(value, bool):
        return str(value)
    raise ValueError(f"{column!r} is {shortened(value, 60)!r}, expected a text")


def _tests(given: Any) -> tuple[str, ...]:
    tests = (given,) if isinstance(given, str) else tuple(given) if isinstance(given, list | tuple) else (None,)
    if not all(isinstance(test, str) for test in tests):
        raise ValueError(f"'tests' is {shortened(given, 60)!r}, expected a list of texts")
    return tests
