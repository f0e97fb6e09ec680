"""The proof that publishing destroys nothing: every call that changes the disk is hit, as SQLite's tests do.

A kill before a call leaves the disk as it is before the call, as the system keeps what a dead process wrote. So a run
is stopped before each of its calls, and what is there then is what a kill there would leave. Faults are put into the
calls one after the other, until a run makes no more calls than were hit. From each state that is left, each remedy has
to end with the right bytes.
"""

from __future__ import annotations

import errno
import hashlib
import os
import random
import shutil
import stat
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from importlib import metadata
from itertools import count
from pathlib import Path
from typing import NamedTuple

import mergekit_lite
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.output import renames
from mergekit_lite.output.working_folder import working_folder
from mergekit_lite.output.workspace import manifest_path
from tests.faults import Calls

Making = Callable[..., object]  # makes an output; takes its path, and the options of a run


class Entry(NamedTuple):
    """A file (its bytes), a folder (None), or another name of a file that was listed already (that one's name)."""

    mode: int
    content: bytes | str | None


State = dict[str, Entry]  # an output and what is beside it, by path


def extrapolated(sft: str, dpo: str, alpha: float) -> Making:
    """Return what extrapolates with an alpha."""
    return lambda output, **options: mergekit_lite.extrapolate(sft, dpo, output, alpha, threads=1, **options)


def extracted(base: str, tuned: str, **format: object) -> Making:
    """Return what extracts a vector."""
    return lambda output, **options: mergekit_lite.extract_vector(base, tuned, output, threads=1, **format, **options)


LORA = {"format": "lora", "rank": 2}
KINDS: dict[str, tuple[str, Making, Making]] = {  # the output's name, what makes it, and what makes another
    "folder": ("out", extrapolated("sft", "dpo", 0.3), extrapolated("sft", "dpo", 0.9)),
    "safetensors": ("out.safetensors", extrapolated("sft", "dpo", 0.3), extrapolated("sft", "dpo", 0.9)),
    "pt": ("out.pt", extrapolated("sft.pt", "dpo.pt", 0.3), extrapolated("sft.pt", "dpo.pt", 0.9)),
    "vector": ("out.safetensors", extracted("sft", "dpo"), extracted("dpo", "sft")),
    "lora": ("out", extracted("sft", "dpo", **LORA), extracted("dpo", "sft", **LORA)),
}
STARTS = ("nothing", "old", "unfinished")  # what is there: an old output is replaced by force, an unfinished resumed
REMEDIES = ("--resume --force", "--force", "--force, the other one")


def prove(place: str, kind: str, start: str, seed: int, ways: str = "") -> dict[str, int]:
    """Prove one kind of output from one start; return how many calls were hit, and how many states were left.

    ``ways`` may be "sync", "without renameat2", or "all remedies" where each is tried from each state.
    """
    name, make, make_other = KINDS[kind]
    proof = Proof(Path(place), name, make, make_other, random.Random(seed), ways)
    metadata.version = cache(metadata.version)  # a tenth of the time went to it
    renameat2 = renames.renameat2
    if ways == "without renameat2":
        renames.renameat2 = _refused
    try:
        return proof.run(start)
    finally:
        renames.renameat2 = renameat2


def _refused(*_: object) -> None:
    raise OSError(errno.EINVAL, "not here")


@dataclass
class Proof:
    """The proof of one kind of output."""

    place: Path
    name: str
    make: Making
    make_other: Making
    chance: random.Random
    ways: str
    known: set[str] = field(default_factory=set)  # digests of the states that were proved
    calls: Calls = field(default_factory=Calls)

    def run(self, start: str) -> dict[str, int]:
        """Hit every call from a start."""
        os.chdir(self.place)
        self.output = Path(self.name)
        self.old, self.new = (self._made(making) for making in (self.make_other, self.make))
        self.begin: State = {"nothing": {}, "old": self.old, "unfinished": self._unfinished()}[start]
        self.options = {"nothing": {}, "old": {"force": True}, "unfinished": {"resume": True}}[start]
        if self.ways == "sync":
            self.options["sync"] = True
        stops = self._stop_before_each_call()
        faults = 0
        for kinds in (("EIO", "ENOSPC"), ("short write",)):
            for at in count(1):
                if not self._fail_at(at, self.chance.choice(kinds)):
                    break
                faults += 1
        self._restore({})
        return {"stops": stops, "faults": faults, "states": len(self.known)}

    def _made(self, making: Making) -> State:
        self._restore({})
        making(self.output)
        return self._state()

    def _unfinished(self) -> State:
        """Return what a run leaves that is killed half-way."""
        self._restore({})
        states = [self._state() for _ in self.calls.stops(lambda: self.make(self.output))]
        under_way = [state for state in states if f".{self.name}.partial/journal.jsonl" in state]
        return under_way[len(under_way) // 2]

    def _stop_before_each_call(self) -> int:
        self._restore(self.begin)
        states = [self._state() for _ in self.calls.stops(lambda: self.make(self.output, **self.options))]
        assert self._standing() == _standing(self.new)
        for number, state in enumerate(states):
            self._prove(state, f"killed before call {number + 1}")
        return len(states)

    def _fail_at(self, at: int, fault: str) -> bool:
        """Hit one call, and return whether there was one to be hit."""
        self._restore(self.begin)
        where = f"{fault} at call {at}"
        message = None
        with self.calls.hit(at, fault):
            try:
                self.make(self.output, **self.options)
            except MergekitLiteError as error:
                message = str(error)
                assert error.exit_code == 1 and "\n" not in message, f"{where}: {message}"
        if self.calls.count < at:
            assert message is None, f"{where}: {message}"
            return False
        state = self._state()
        if message is None:
            assert _standing(state) == _standing(self.new), f"{where}: it was called made"
        else:
            assert fault != "short write", f"{where}: {message}"
            is_whole = _standing(state) in (_standing(self.begin), _standing(self.new))
            assert is_whole or self.ways == "without renameat2", f"{where}: neither as it was nor new: {sorted(state)}"
        self._prove(state, where)
        return True

    def _prove(self, state: State, where: str) -> None:
        """Check what a kill or a fault left, and that each remedy ends with the right bytes."""
        if (digest := hashlib.sha256(repr(sorted(state.items())).encode()).hexdigest()) in self.known:
            return
        self.known.add(digest)
        weights, manifest = (_standing(state).get(str(path)) for path in (self.output, manifest_path(self.output)))
        for path, entry in ((self.output, weights), (manifest_path(self.output), manifest)):
            ends = [_standing(end).get(str(path)) for end in (self.begin, self.new)]
            if self.ways != "without renameat2" or entry is not None:  # a folder is moved away first there
                assert entry in ends, f"{where}: {path} is neither as it was nor new"
        self._resume(state, where)
        remedies = REMEDIES if self.ways == "all remedies" else [self.chance.choice(REMEDIES)]
        for remedy in remedies:
            self._restore(state)
            making, wanted = (self.make_other, self.old) if "other" in remedy else (self.make, self.new)
            making(self.output, force=True, resume="--resume" in remedy)
            assert self._state() == wanted, f"{where}, {remedy}: other bytes, or something is left: {self._names()}"

    def _resume(self, state: State, where: str) -> None:
        self._restore(state)
        try:
            self.make(self.output, resume=True)
        except UsageError as error:  # only force replaces what was there
            assert "--force replaces it" in str(error), f"{where}, --resume: {error}"
            assert self.begin == self.old and _standing(state) == self._standing() == _standing(self.old), where
        else:
            assert self._state() == self.new, f"{where}, --resume: other bytes, or something is left: {self._names()}"

    def _paths(self) -> list[Path]:
        paths = {self.output, manifest_path(self.output), Path(working_folder(self.output).name)}
        return sorted(path for path in paths if path.parent == Path())  # a folder's manifest is in it

    def _names(self) -> list[str]:
        return sorted(self._state())

    def _standing(self) -> State:
        return _standing(self._state())

    def _state(self) -> State:
        """Return what is there."""
        state: State = {}
        by_inode: dict[int, str] = {}
        for top in self._paths():
            for path in (top, *sorted(top.rglob("*"))) if top.exists() else ():
                status = path.lstat()
                if stat.S_ISDIR(status.st_mode):
                    content = None
                elif status.st_ino in by_inode:
                    content = by_inode[status.st_ino]
                else:
                    content, by_inode[status.st_ino] = path.read_bytes(), str(path)
                state[str(path)] = Entry(stat.S_IMODE(status.st_mode), content)
        return state

    def _restore(self, state: State) -> None:
        """Put a state there, and nothing else."""
        for path in self._paths():
            with suppress(FileNotFoundError):
                shutil.rmtree(path) if path.is_dir() else path.unlink()
        for name, (mode, content) in state.items():
            path = Path(name)
            if content is None:
                path.mkdir(exist_ok=True)
            elif isinstance(content, str):
                path.hardlink_to(content)
            else:
                path.write_bytes(content)
            path.chmod(mode)


def _standing(state: State) -> State:
    """Return the part of a state that isn't in the working folder."""
    return {
        name: state[entry.content] if isinstance(entry.content, str) else entry
        for name, entry in state.items()
        if ".partial" not in name
    }
