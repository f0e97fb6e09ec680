"""What is kept while searching, so that a killed search goes on and measures nothing twice.

    study.json                  what the rows depend on: models, data, scorers, sampling, the order of the items
    candidates/NAME.jsonl       a ledger of rows (``candidate.Row``); NAME.partial.jsonl while items are missing
    candidates/NAME.json        {numbers, facts, seconds}
    study.db                    Optuna's, where it searches

What rows don't depend on may change from run to run: search, limits, confidence. A grid can be tried after a bracket,
and what both ask for is measured once.
"""

from __future__ import annotations

import fcntl
import json
import random
import re
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from itertools import chain
from pathlib import Path
from typing import IO, Any, cast

import xxhash

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import write_text
from mergekit_lite.boosting.candidates.candidate import Bench, Numbers, Row, label, subject
from mergekit_lite.errors import UsageError, listing, shortened

VERSION = 2
LONGEST_NAME = 80  # of a file, without its endings


class Study:
    """The candidates of one search and their rows, in a folder that one process at a time works in: use it in ``with``.

    Attributes:
        subjects: the items of each subject, shuffled by the seed: any first part of them is a fair sample.
        items: all items in this order.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], items: Sequence[str], seed: int = 0):
        """Begin a study, or go on with the one that is there.

        Args:
            folder: of everything; made where it is missing.
            identity: all that a row depends on, as JSON may hold it.
            items: of all candidates.
            seed: of their order.

        Raises:
            UsageError: the folder holds a study of something else (every difference is told), or no study, or another
                process is at work in it.
        """
        self.folder = folder
        by_subject: dict[str, list[str]] = {}
        for item in items:
            by_subject.setdefault(subject(item), []).append(item)
        self.subjects = list(by_subject.values())
        random.Random(seed).shuffle(self.subjects)
        self.items = list(chain.from_iterable(self.subjects))
        self._ledgers: dict[str, Ledger[str]] = {}
        self._rows: dict[str, dict[str, Row]] = {}  # by candidate and item
        order = xxhash.xxh3_128_hexdigest("\n".join(self.items).encode())
        self._lock = _locked(folder)
        try:
            self._check({"version": VERSION, **identity, "items": {"number": len(self.items), "order": order}})
        except UsageError:
            self._lock.close()
            raise

    def __enter__(self) -> Study:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def measured(self, numbers: Numbers, items: Sequence[str], bench: Bench) -> dict[str, Row]:
        """The rows of these items, in their order; the bench is asked for those that aren't there."""
        ledger = self._ledger(numbers)
        wanted = frozenset(item for item in items if item not in ledger)
        if wanted:
            self._measure(numbers, wanted, bench, ledger)
        missing = [item for item in items if item not in ledger]
        if missing:
            raise RuntimeError(f"{label(numbers)}: no row came for {missing[:3]}")
        return self.rows(numbers, items)

    def rows(self, numbers: Numbers, items: Sequence[str]) -> dict[str, Row]:
        """Those rows of these items that are there, in their order."""
        self._ledger(numbers)
        rows = self._rows[label(numbers)]
        return {item: rows[item] for item in items if item in rows}

    def about(self, numbers: Numbers) -> dict[str, Any]:
        """``facts`` and ``seconds`` of a candidate; empty and 0 before it is measured."""
        path = self._path(numbers, "json")
        kept: dict[str, Any] = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}
        return {"facts": kept.get("facts", {}), "seconds": kept.get("seconds", 0.0)}

    def _measure(self, numbers: Numbers, wanted: frozenset[str], bench: Bench, ledger: Ledger[str]) -> None:
        started, before = time.monotonic(), self.about(numbers)["seconds"]
        with closing(ledger):
            for row in bench.measure(numbers, self.items, wanted):
                ledger.append([cast(dict[str, Any], row)])
                self._rows[label(numbers)].setdefault(row["item"], row)
        seconds = before + time.monotonic() - started
        about = {"numbers": dict(numbers), "facts": bench.facts(numbers), "seconds": seconds}
        _write(self._path(numbers, "json"), about)
        if not ledger.missing:
            ledger.finish()

    def _ledger(self, numbers: Numbers) -> Ledger[str]:
        name = label(numbers)
        if name not in self._ledgers:
            path = self._path(numbers, "jsonl")
            self._ledgers[name] = ledger = Ledger(path, self.items, lambda row: str(row["item"]))
            self._rows[name] = {row["item"]: cast(Row, row) for row in ledger.rows()}
        return self._ledgers[name]

    def _path(self, numbers: Numbers, kind: str) -> Path:
        name = label(numbers)
        safe = re.sub(r"[^\w.=,+-]", "_", name)[:LONGEST_NAME]
        if safe != name:
            safe += f"-{xxhash.xxh3_64_hexdigest(name.encode())}"
        return self.folder / "candidates" / f"{safe}.{kind}"

    def _check(self, identity: Mapping[str, Any]) -> None:
        identity = json.loads(json.dumps(identity))  # as it will be read
        path = self.folder / "study.json"
        if not path.exists():
            if any(one.name != "lock" for one in self.folder.iterdir()):
                raise UsageError(
                    f"{self.folder}: expected a search or nothing, and found other files. Give another -o."
                )
            _write(path, identity)
            return
        before, now = (dict(_leaves(one)) for one in (json.loads(path.read_text(encoding="utf-8")), identity))
        differ = [
            f"{name}: {shortened(before.get(name, 'nothing'), 80)} then, {shortened(now.get(name, 'nothing'), 80)} now"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if differ:
            title = f"{self.folder} holds a search of something else; give another -o, or remove it. What differs"
            raise UsageError(listing(title, differ))


def _locked(folder: Path) -> IO[str]:
    """The lock of a folder that is made where it is missing; closing it lets others in."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = (folder / "lock").open("w")
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        lock.close()
        raise UsageError(f"{folder}: another search is at work in it. Wait for it, or give another -o.") from error
    return lock


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    """The values of nested JSON by their dotted names."""
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
