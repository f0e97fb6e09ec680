"""The rows of a round's files: what the processes of a training make together, and a kill doesn't lose."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch import Tensor

from mergekit_lite.answers.rows import Fields, Key, as_line, not_written, read_rows
from mergekit_lite.distillation.training.reference import appending
from mergekit_lite.distillation.training.rows import TrainingRow

ANSWER: Fields = {"prompt": str, "index": int, "text": str, "finish": str, "tokens": list}
SCORED: Fields = {"prompt": str, "index": int}
DRAWN: Fields = {"prompt": str, "index": int, "log_probs": list}


class OwnAnswer(NamedTuple):
    """An answer that the student drew."""

    key: Key
    text: str  # without special tokens
    finish: str  # ``stop``, or ``length`` where a limit cut it
    tokens: tuple[int, ...]  # that were drawn, the end of the turn included

    @property
    def cut(self) -> bool:
        """Whether the limit of tokens cut it."""
        return self.finish == "length"

    def as_row(self) -> dict[str, Any]:
        """Return the row of its file."""
        prompt, index = self.key
        return {
            "prompt": prompt,
            "index": index,
            "text": self.text,
            "finish": self.finish,
            "tokens": list(self.tokens),
        }


def answer_of(row: dict[str, Any]) -> OwnAnswer:
    """Return the answer of a row."""
    return OwnAnswer(Key(row["prompt"], row["index"]), row["text"], row["finish"], tuple(row["tokens"]))


@dataclass(frozen=True, kw_only=True, eq=False)
class OwnRow(TrainingRow):
    """An answer of the student with T tokens, as it is trained on.

    Attributes:
        drawn: (T,) float32; log π₀ of its tokens.
        log_ratios: (T,) float32; d, the mean over the teachers; NaN where a teacher has none.
        by_teacher: that of each teacher by itself.
    """

    drawn: Tensor
    log_ratios: Tensor
    by_teacher: Mapping[str, Tensor]


@dataclass(frozen=True)
class RowFolder:
    """A folder whose files, one of each process, hold rows by key."""

    path: Path
    fields: Fields

    def read(self) -> dict[Key, dict[str, Any]]:
        """Return all rows; a line that a kill cut short is none."""
        found: dict[Key, dict[str, Any]] = {}
        for file in sorted(self.path.glob("*.jsonl")):
            for line in read_rows(file, [], self.fields):
                found.setdefault(Key(line.row["prompt"], line.row["index"]), line.row)
        return found

    @contextmanager
    def appending(self, rank: int) -> Iterator[Appender]:
        """Give what appends to the file of a process.

        Raises:
            RunError: it can't be written.
        """
        path = self.path / f"{rank}.jsonl"
        try:
            self.path.mkdir(parents=True, exist_ok=True)
            file = appending(path)
        except OSError as error:
            raise not_written(path, error) from error
        with file:
            yield Appender(path, file)


@dataclass(frozen=True)
class Appender:
    """Appends rows to a file."""

    path: Path
    file: Any

    def __call__(self, rows: Iterable[dict[str, Any]]) -> None:
        """Append rows; when this returns, a kill of the process doesn't lose them."""
        try:
            self.file.write("".join(map(as_line, rows)))
            self.file.flush()
        except OSError as error:
            raise not_written(self.path, error) from error


def rounded(values: Iterable[float]) -> list[float]:
    """Return float32 numbers as short decimals that are read as the same float32 numbers."""
    return [float(f"{value:.9g}") for value in values]
