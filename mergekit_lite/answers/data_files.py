"""Rows of data that somebody else may have written: JSON, JSON Lines and Parquet files, data sets of the hub.

A row comes with its place, file and line, for messages. A line that is no row is a problem, and the others are read.
"""

from __future__ import annotations

import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Annotated, Any

from pydantic import BaseModel, ConfigDict, Field

from mergekit_lite.answers.rows import read_rows
from mergekit_lite.errors import UnreadableError, UsageError, nearest
from mergekit_lite.input_files import parse_json, read_text

JSON_LINES = (".jsonl", ".ndjson")
PARQUET = (".parquet", ".pq")
MOST_JSON = 4_000_000_000  # bytes of a JSON file, which is read as a whole
BLANK = re.compile(r"[\s,]*")

Rows = Iterator[tuple[Mapping[str, Any], str]]  # each with its place


class Data(BaseModel):
    """A JSON, JSON Lines or Parquet file, or a data set of the hub."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    path: Path | None = None
    dataset: str | None = None  # org/name on the hub, org/name@revision
    config: str | None = None  # of the data set
    split: str = "train"
    limit: Annotated[int, Field(ge=1)] | None = None  # rows, from the first


def rows_of(data: Data, problems: list[str], columns: Collection[str] = (), needed: Sequence[str] = ()) -> Rows:
    """Yield the rows, each with its place.

    Args:
        data: the file or data set.
        problems: gets a message with the place for each line that is no row.
        columns: of which Parquet and the hub need no others; all where none are given.
        needed: columns of which one has to be there, where that shows before the rows are read.

    Raises:
        UsageError: the file or data set can't be read, or has none of the needed columns.
    """
    rows = _of_file(data.path, columns, needed, problems) if data.path else _of_dataset(data, columns, needed)
    return islice(rows, data.limit)


def _of_file(path: Path, columns: Collection[str], needed: Sequence[str], problems: list[str]) -> Rows:
    if path.suffix in JSON_LINES:
        return ((line.row, f"{path}:{line.number}") for line in read_rows(path, problems))
    if path.suffix == ".json":
        return _of_json(path, problems)
    if path.suffix in PARQUET:
        return _of_parquet(path, columns, needed)
    raise UsageError(
        f"{path}: data are read from {', '.join(('.json', *JSON_LINES, *PARQUET))} files, told by their ending. "
        "Write one JSON object a line, for instance."
    )


def _of_json(path: Path, problems: list[str]) -> Rows:
    """Yield the objects of a list; or of lines, which some name so too."""
    try:
        text = read_text(path, MOST_JSON)
    except UnreadableError as error:
        raise UsageError(f"Can't read {path}: {error.reason}.") from error
    at = _after_blank(text, 0)
    if text.startswith("{", at):
        yield from ((line.row, f"{path}:{line.number}") for line in read_rows(path, problems))
        return
    if not text.startswith("[", at):
        raise UsageError(f"{path} is no list of JSON objects.")
    decoder, line, counted_to = json.JSONDecoder(), 1, 0
    at = _after_blank(text, at + 1)
    while not text.startswith("]", at):
        line, counted_to = line + text.count("\n", counted_to, at), at
        try:
            _, end = decoder.raw_decode(text, at)
            row = parse_json(text[at:end])
        except (ValueError, RecursionError) as error:  # nothing tells where the next object begins
            raise UsageError(f"{path}:{line}: not JSON: {error}.") from error
        if isinstance(row, dict):
            yield row, f"{path}:{line}"
        else:
            problems.append(f"{path}:{line}: expected a JSON object, got {type(row).__name__}")
        at = _after_blank(text, end)


def _after_blank(text: str, at: int) -> int:
    match = BLANK.match(text, at)
    assert match is not None  # it matches nothing, too
    return match.end()


def _of_parquet(path: Path, columns: Collection[str], needed: Sequence[str]) -> Rows:
    import pyarrow as pa
    from pyarrow import parquet

    try:
        with parquet.ParquetFile(path) as file:
            wanted = _readable(file.schema_arrow.names, columns, needed, str(path))
            number = 0
            for batch in file.iter_batches(columns=wanted):
                for row in batch.to_pylist():
                    number += 1
                    yield row, f"{path}: row {number:,}"
    except (OSError, pa.ArrowException) as error:
        raise UsageError(f"Can't read {path}: {error}.") from error


def _of_dataset(source: Data, columns: Collection[str], needed: Sequence[str]) -> Rows:
    from datasets import load_dataset

    name, _, revision = str(source.dataset).partition("@")
    try:
        # A data set that comes as code is refused by the library.
        data = load_dataset(name, source.config, split=source.split, revision=revision or None)
    except Exception as error:  # any of the library's parts may raise
        raise UsageError(f"Can't load the data set {source.dataset}, split {source.split}: {error}") from error
    data = data.select_columns(_readable(data.column_names, columns, needed, str(source.dataset)))
    for number, row in enumerate(data, 1):
        yield row, f"{source.dataset} ({source.split}): row {number:,}"


def _readable(there: Sequence[str], columns: Collection[str], needed: Sequence[str], where: str) -> list[str]:
    if needed and not {*needed} & {*there}:
        hint = next(filter(None, (nearest(name, there) for name in needed)), "")
        raise UsageError(
            f"{where} has no column {' or '.join(map(repr, needed))}; it has {', '.join(there)}.{hint} "
            f"Map it with `columns: {{prompt: THEIRS}}`, or {{messages: THEIRS}}."
        )
    return [name for name in there if not columns or name in columns]
