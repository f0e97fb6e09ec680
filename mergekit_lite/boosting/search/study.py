"""The study: a folder with all rows of a search, so that a killed search goes on and measures nothing twice.

    study.json                  the identity, which all rows depend on: models, data, scorers, sampling, order of items
    candidates/NAME.jsonl       a ledger of rows (``candidate.Row``); NAME.partial.jsonl while items are missing
    candidates/NAME.json        {numbers, facts, seconds}
    study.db                    Optuna's, where it searches
    items.jsonl                 the items in their order, with their questions; so_far.json, boost.json (``record.py``)
    opponent/                   answers that candidates are compared with, and the replies they are made of

Search, limits and confidence aren't in the identity and may change from run to run: a grid can follow a bracket, and
a candidate of both is measured once.
"""

from __future__ import annotations

import json
import random
import re
from collections.abc import Iterator, Mapping, Sequence
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import xxhash

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.rows import write_text
from mergekit_lite.boosting.candidates.candidate import ItemRow, Params, Piece, cluster_of, label
from mergekit_lite.errors import UsageError, listing, shortened
from mergekit_lite.input_files import read_json
from mergekit_lite.locks import lock_file

VERSION = 2
OPPONENT = "opponent"
LONGEST_NAME = 80  # of a file, without its endings


class Study:
    """The candidates of one search and their rows, in a folder that one process at a time works in: use it in ``with``.

    Attributes:
        clusters: the items of each cluster, shuffled by the seed, so that any first part of them is a fair sample.
        items: all items in this order.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any], items: Sequence[str], seed: int = 0):
        """Begin a study, or go on with the one in the folder.

        Args:
            folder: of the study; made where it is missing.
            identity: all that a row depends on, as JSON can hold it.
            items: of all candidates.
            seed: of their order.

        Raises:
            UsageError: the folder has a study of another identity (the message has every difference) or other files,
                or another process works in it.
        """
        self.folder = folder
        clusters: dict[str, list[str]] = {}
        for item in items:
            clusters.setdefault(cluster_of(item), []).append(item)
        self.clusters = list(clusters.values())
        random.Random(seed).shuffle(self.clusters)
        self.items = list(chain.from_iterable(self.clusters))
        self._ledgers: dict[str, Ledger[str]] = {}
        self._rows: dict[str, dict[str, ItemRow]] = {}  # by candidate and item
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
        for ledger in self._ledgers.values():
            ledger.close()
        self._lock.close()

    def missing(self, params: Params, items: Sequence[str]) -> list[str]:
        """Return those of the items that a candidate has no row of yet, in order."""
        ledger = self._ledger(params)
        return [item for item in items if item not in ledger]

    def record(self, params: Params, piece: Piece) -> None:
        """Store what a worker sent; when this returns, a kill of the process doesn't lose it.

        Facts come before the rows they are about: so a candidate with all its rows has them.
        """
        ledger = self._ledger(params)
        if piece.facts is not None:
            seconds = self.about(params)["seconds"] + piece.seconds
            about = {"numbers": dict(params), "facts": dict(piece.facts), "seconds": seconds}
            _write(self._path(params, "json"), about)
        ledger.append([cast(dict[str, Any], row) for row in piece.rows])
        for row in piece.rows:
            self._rows[label(params)].setdefault(row["item"], row)
        if piece.ended:
            ledger.close()
            if not ledger.missing:
                ledger.finish()

    def rows(self, params: Params, items: Sequence[str]) -> dict[str, ItemRow]:
        """Return the stored rows of these items, in their order."""
        self._ledger(params)
        rows = self._rows[label(params)]
        return {item: rows[item] for item in items if item in rows}

    def about(self, params: Params) -> dict[str, Any]:
        """Return ``facts`` and ``seconds`` of a candidate; empty and 0 before it is measured."""
        path = self._path(params, "json")
        stored: dict[str, Any] = read_json(path) if path.exists() else {}
        return {"facts": stored.get("facts", {}), "seconds": stored.get("seconds", 0.0)}

    def _ledger(self, params: Params) -> Ledger[str]:
        name = label(params)
        if name not in self._ledgers:
            path = self._path(params, "jsonl")
            self._ledgers[name] = ledger = Ledger(path, self.items, lambda row: str(row["item"]))
            self._rows[name] = {row["item"]: cast(ItemRow, row) for row in ledger.rows()}
            if not ledger.missing and not ledger.is_finished:  # the process was killed just before
                ledger.finish()
        return self._ledgers[name]

    def _path(self, params: Params, kind: str) -> Path:
        return candidate_file(self.folder, params, kind)

    def _check(self, identity: Mapping[str, Any]) -> None:
        identity = json.loads(json.dumps(identity))  # as it will be read
        path = self.folder / "study.json"
        if not path.exists():
            check_folder(self.folder)
            _write(path, identity)
            return
        before, now = (dict(_leaves(one)) for one in (read_json(path), identity))
        differ = [
            f"{name}: {shortened(before.get(name, 'nothing'), 80)} then, {shortened(now.get(name, 'nothing'), 80)} now"
            for name in sorted({*before, *now})
            if before.get(name) != now.get(name)
        ]
        if differ:
            title = f"{self.folder} holds a search of something else; give another -o, or remove it. What differs"
            if '"minimise"' in str(now.get("scores")) and '"minimise"' not in str(before.get("scores")):
                title = (
                    f"{self.folder} was begun by an older version, which could not minimise a score; finish it with "
                    "that version, give another -o, or remove it. What differs"
                )
            raise UsageError(listing(title, differ))


def candidate_file(folder: Path, params: Params, kind: str) -> Path:
    """Return the path of a candidate's file in the folder of a study: ``jsonl`` for its rows, ``json`` for facts."""
    name = label(params)
    safe = re.sub(r"[^\w.=,+-]", "_", name)[:LONGEST_NAME]
    if safe != name:
        safe += f"-{xxhash.xxh3_64_hexdigest(name.encode())}"
    return folder / "candidates" / f"{safe}.{kind}"


def _locked(folder: Path) -> BinaryIO:
    """Lock a folder, which is made where it is missing; closing the file unlocks it."""
    folder.mkdir(parents=True, exist_ok=True)
    lock = lock_file(folder / "lock")
    if lock is None:
        raise UsageError(f"{folder}: another search is at work in it. Wait for it, or give another -o.")
    return lock


def _leaves(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, dict):
        for key, inner in value.items():
            yield from _leaves(inner, f"{name}.{key}" if name else key)
    else:
        yield name, value


def check_folder(folder: Path) -> None:
    """Raise UsageError where a folder holds files of others. An opponent answers before there is a study."""
    if not folder.exists() or (folder / "study.json").exists():
        return
    if any(one.name not in ("lock", OPPONENT) for one in folder.iterdir()):
        raise UsageError(f"{folder}: expected a search or nothing, and found other files. Give another -o.")


def _write(path: Path, content: Mapping[str, Any]) -> None:
    write_text(path, json.dumps(content, indent=1, ensure_ascii=False) + "\n")
