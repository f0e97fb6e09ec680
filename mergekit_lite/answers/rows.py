"""The rows that go from stage to stage, and the JSON Lines files they lie in."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple, TypedDict

from xxhash import xxh3_64_intdigest

from mergekit_lite.errors import RunError, UsageError


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """What a model is asked.

    Attributes:
        id: unique among the prompts; a digest of the messages where the data have none.
        messages: the conversation so far; the last one is the user's.
        domain: what rules and scorers are chosen by: ``instruction``, ``maths``, ``code``; empty where nothing is told.
        reference: the right answer, where there is one.
        tests: Python programs that an answer's code has to pass.
    """

    id: str
    messages: tuple[Message, ...]
    domain: str = ""
    reference: str | None = None
    tests: tuple[str, ...] = ()


class Key(NamedTuple):
    """Which of a source's answers: the ``number``-th, from 0, to a prompt."""

    prompt: str
    number: int


@dataclass(frozen=True)
class Answer:
    """What a source answered.

    Attributes:
        prompt: the prompt's id.
        source: the source's name.
        index: which of its answers to this prompt, from 0.
        text: without special tokens.
        finish: ``stop`` where the model ended by itself, ``length`` where the limit cut it.
        tokens: how many the answer has, where the source tells.
    """

    prompt: str
    source: str
    index: int
    text: str
    finish: str
    tokens: int | None = None

    @property
    def key(self) -> Key:
        """Its place among the answers of its source."""
        return Key(self.prompt, self.index)


def seed_of(*parts: object) -> int:
    """A seed of 31 bits for what is drawn for these parts: the same in any order of work and any run."""
    return xxh3_64_intdigest("\x1f".join(map(str, parts)).encode()) >> 33


class Line(NamedTuple):
    """A row of a file, and where it stands."""

    number: int  # from 1
    row: dict[str, Any]
    start: int  # of the line, in bytes


def read_rows(path: Path, problems: list[str]) -> Iterator[Line]:
    """The rows of a JSON Lines file.

    Args:
        path: the file.
        problems: takes a message, with file and line, for each line that is no JSON object; the others go on.

    Raises:
        UsageError: the file can't be read.
    """
    end = 0
    try:
        with path.open("rb") as file:
            for number, line in enumerate(file, 1):
                start, end = end, end + len(line)
                if not line.strip():
                    continue
                try:
                    row = json.loads(line)
                except ValueError as error:  # of JSON or UTF-8
                    problems.append(f"{path}:{number}: not JSON: {error}")
                    continue
                if isinstance(row, dict):
                    yield Line(number, row, start)
                else:
                    problems.append(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
    except OSError as error:
        raise UsageError(f"Can't read {path}: {error.strerror or error}.") from error


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file whole: under its name there is either what was there before or all the rows."""
    write_lines(path, (as_line(row).encode() for row in rows))


def write_text(path: Path, text: str) -> None:
    """The same of a whole text, in UTF-8.

    Raises:
        RunError: the file can't be written.
    """
    write_lines(path, [text.encode()])


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """The same of lines, with their ends.

    Raises:
        RunError: the file can't be written.
    """
    partial = path.with_name(f"{path.name}.writing")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with partial.open("wb") as file:
            file.writelines(lines)
        partial.replace(path)
    except OSError as error:
        raise not_written(path, error) from error


def not_written(path: Path, error: OSError) -> RunError:
    """What to say where a file can't be written."""
    return RunError(f"Can't write {path}: {error.strerror or error}. Once there is room, the same command goes on.")


def as_line(row: dict[str, Any]) -> str:
    """A row as a line of JSON with its end."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def user_text(messages: Sequence[Message]) -> str:
    """The last thing the user said."""
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
