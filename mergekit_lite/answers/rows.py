"""The rows that go from stage to stage, and their JSON Lines files."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple, TypedDict

from xxhash import xxh3_64_intdigest

from mergekit_lite.errors import RunError, UnreadableError, UsageError, counted
from mergekit_lite.input_files import MAX_BYTES, opened, parse_json


class Message(TypedDict):
    """One turn of a conversation, as chat templates take it."""

    role: str
    content: str


@dataclass(frozen=True)
class Prompt:
    """A conversation for a model to answer."""

    id: str  # unique among the prompts; a digest of the messages where the data have no id
    messages: tuple[Message, ...]  # the conversation so far; the last one is the user's
    domain: str = ""  # chooses rules and scorers: ``instruction``, ``maths``, ``code``; empty where the data have none
    reference: str | None = None  # the right answer, if it is known
    tests: tuple[str, ...] = ()  # Python programs that an answer's code has to pass
    plain: bool = False  # whether the data have it as a text, not as messages
    columns: Mapping[str, Any] = field(default_factory=dict)  # kept of the data's other columns, for functions
    opponent: str | None = None  # the answer that others are compared with, where somebody was asked for it
    question: str = ""  # the prompt's id, where this is one of several that ask it under different system messages


class Key(NamedTuple):
    """The key of a source's answer: the ``number``-th, from 0, to a prompt."""

    prompt: str
    number: int


@dataclass(frozen=True)
class Answer:
    """One answer of a source."""

    prompt: str  # the prompt's id
    source: str  # the source's name
    index: int  # among its answers to this prompt, from 0
    text: str  # without special tokens
    finish: str  # ``stop`` where the model ended by itself, ``length`` where the limit cut it
    tokens: int | None = None  # their number, if the source reports it
    thoughts: str | None = None  # what a server sent apart from the text as the model's reasoning

    @property
    def key(self) -> Key:
        """Its key among the answers of its source."""
        return Key(self.prompt, self.index)

    def as_row(self) -> dict[str, Any]:
        """Return the row of its file; without thoughts it has no such field."""
        row = asdict(self)
        if self.thoughts is None:
            del row["thoughts"]
        return row


def seed_of(*parts: object) -> int:
    """Return a seed of 31 bits that depends on the parts alone: the same in any order of work and any run."""
    return xxh3_64_intdigest("\x1f".join(map(str, parts)).encode()) >> 33


Fields = Mapping[str, type | UnionType]  # what a row has at least, and of which type
ANSWER: Fields = {"prompt": str, "index": int, "text": str}
VERDICT: Fields = {"prompt": str, "index": int, "score": int | float | None}


class Line(NamedTuple):
    """A row of a file, and its place."""

    number: int  # from 1
    row: dict[str, Any]
    start: int  # of the line, in bytes


def read_rows(path: Path, problems: list[str], fields: Fields | None = None) -> Iterator[Line]:
    """Yield the rows of a JSON Lines file.

    Args:
        path: the file.
        problems: gets a message, with file and line, for each line that is no such row; these lines are skipped.
            A line of more than ``MAX_BYTES`` is taken for several.
        fields: what each row has to have, and of which type it is.

    Raises:
        UsageError: the file can't be read.
    """
    end = 0
    try:
        with opened(path) as file:
            for number, line in enumerate(iter(lambda: file.readline(MAX_BYTES), b""), 1):
                start, end = end, end + len(line)
                if not line.strip():
                    continue
                try:
                    row = parse_json(line.decode("utf-8"))
                except ValueError as error:  # of JSON or UTF-8
                    problems.append(f"{path}:{number}: not JSON: {error}")
                    continue
                if not isinstance(row, dict):
                    problems.append(f"{path}:{number}: expected a JSON object, got {type(row).__name__}")
                    continue
                wrong = [name for name, kind in (fields or {}).items() if not isinstance(row.get(name, ...), kind)]
                if wrong:
                    problems.append(f"{path}:{number}: no {', '.join(map(repr, wrong))} of the right type")
                else:
                    yield Line(number, row, start)
    except UnreadableError as error:
        raise UsageError(f"Can't read {path}: {error.reason}.") from error
    except OSError as error:
        raise UsageError(f"Can't read {path}: {error.strerror or error}.") from error


def write_rows(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    """Write a JSON Lines file atomically: a reader sees the file before or all the rows."""
    write_lines(path, (as_line(row).encode() for row in rows))


def write_text(path: Path, text: str) -> None:
    """Write a text atomically, in UTF-8.

    Raises:
        RunError: the file can't be written.
    """
    write_lines(path, [text.encode()])


def write_lines(path: Path, lines: Iterable[bytes]) -> None:
    """Write lines atomically; each has its line end.

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
    """Return the error of a file that can't be written."""
    return RunError(f"Can't write {path}: {error.strerror or error}. Once there is room, the same command goes on.")


def as_line(row: dict[str, Any]) -> str:
    """Return a row as a line of JSON with its line end."""
    return json.dumps(row, ensure_ascii=False, allow_nan=False) + "\n"


def with_system(messages: Sequence[Message], system: str | None) -> tuple[Message, ...]:
    """Return the messages after a system message, unless they begin with one of their own or the text is empty or None.

    So ``system`` is the default: what a prompt says of itself takes its place, as in LLaMA-Factory. Most chat templates
    have no place for two; some raise, some leave one out.
    """
    before = (Message(role="system", content=system),) if system and not _has_system(messages) else ()
    return (*before, *messages)


def given_text(messages: Sequence[Message]) -> str:
    """Return the beginning of the answer, where a conversation ends with it: its answer goes on from there. Else ""."""
    return messages[-1]["content"] if messages and messages[-1]["role"] == "assistant" else ""


def _has_system(messages: Sequence[Message]) -> bool:
    return bool(messages) and messages[0]["role"] == "system"


def own_systems(prompts: Sequence[Prompt], system: str | None) -> str | None:
    """Say that prompts have system messages of their own, which take the place of ``system``; None where none has."""
    number = sum(_has_system(prompt.messages) for prompt in prompts) if system else 0
    have = "has a system message of its" if number == 1 else "have system messages of their"
    return f"{number:,} of {counted(len(prompts), 'prompt')} {have} own, in place of `system`" if number else None


def user_text(messages: Sequence[Message]) -> str:
    """Return the user's last message, or an empty text."""
    return next((message["content"] for message in reversed(messages) if message["role"] == "user"), "")
