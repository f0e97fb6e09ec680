"""Models of the hub: what their downloads would take, and the downloads, one after the other, by the user's word."""

from __future__ import annotations

import json
import os
import subprocess
import threading
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from mergekit_lite.commands.app.places import WEIGHTS, Places
from mergekit_lite.commands.app.programs import program
from mergekit_lite.commands.app.runs import Runs, State, apart
from mergekit_lite.errors import RunError, UsageError
from mergekit_lite.input_files import read_json
from mergekit_lite.plain_text import plain

PROGRAM = program("needed")
DOWNLOAD = apart("download", "download.lock")
NEEDED = "download.needed.json"  # what the latest download takes
PATIENCE = 120  # seconds in which the hub has to tell


@dataclass(frozen=True)
class Needed:
    """What a model's download takes: its commit, and its files with their bytes. Or why that can't be told."""

    name: str
    commit: str = ""
    files: Mapping[str, int] | None = None
    error: str = ""

    @property
    def nbytes(self) -> int:
        """All bytes, those that the cache has already too."""
        return sum((self.files or {}).values())

    @property
    def small(self) -> int:
        """The bytes of what are no weights: those are read in any case."""
        files = self.files or {}
        return sum(size for name, size in files.items() if not name.endswith((*WEIGHTS, ".bin", ".pt", ".pth")))

    @property
    def weights(self) -> int:
        """The bytes of the weights."""
        return self.nbytes - self.small

    @property
    def command(self) -> list[str]:
        """The command that downloads the model: it needs a look at it."""
        return ["inspect", self.name]


class Downloads:
    """Downloads into the hub's cache."""

    def __init__(self, places: Places, environment: Mapping[str, str]) -> None:
        """Ask the hub with some variables before this process's own."""
        self.places = places
        self.environment = environment
        self._runs = Runs(places.root, DOWNLOAD, online=environment)
        self._models: list[Needed] = []

    def needed(self, names: Sequence[str]) -> list[Needed]:
        """Ask the hub what models need. Raises RunError where it doesn't answer."""
        try:
            done = subprocess.run(
                [*PROGRAM, *names], cwd=self.places.root, env=os.environ | self.environment, timeout=PATIENCE,
                stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            raise RunError(f"The hub did not answer within {PATIENCE} s.") from None
        if done.returncode:
            raise RunError(f"The hub could not be asked:\n{plain(done.stderr)[-2000:]}")
        return [Needed(name, **told) for name, told in json.loads(done.stdout).items()]

    def start(self, models: Sequence[Needed]) -> None:
        """Download models, one after the other. Raises UsageError where others are on their way."""
        if self.goes_on:
            raise UsageError("There is a download already: wait for its end, or stop it.")
        self._launch(models[0])
        self._models = list(models)
        threading.Thread(target=self._follow, daemon=True).start()

    def stop(self) -> None:
        """Interrupt the download; a later one goes on with what is there."""
        del self._models[1:]
        self._runs.stop()

    @property
    def goes_on(self) -> bool:
        """Whether a download is on its way, or waits for its turn."""
        return bool(self._models) or self._runs.state().kind == "running"

    def state(self) -> tuple[State, Needed | None, int]:
        """Return how the latest download stands, of which model, and how many of its bytes are here."""
        state = self._runs.state()
        path = self._runs.folder / NEEDED
        if state.kind == "none" or not path.exists():
            return state, None, 0
        model = Needed(**read_json(path))
        return state, model, self._here(model)

    def _launch(self, model: Needed) -> None:
        self._runs.launch(model.command, model.name, {NEEDED: json.dumps(asdict(model))})

    def _follow(self) -> None:
        """Begin with the next model as long as the one before came."""
        try:
            while True:
                self._runs.wait()
                del self._models[0]
                if not self._models or self._runs.state().kind != "done":
                    return
                self._launch(self._models[0])
        finally:
            self._models = []

    def _here(self, model: Needed) -> int:
        """Return how many bytes of a model the cache has: of files that are whole, and of those on their way."""
        folder = self.places.cache / f"models--{model.name.partition('@')[0].replace('/', '--')}"
        whole = sum(size for name, size in (model.files or {}).items() if _is_there(folder, model.commit, name))
        return min(model.nbytes, whole + sum(path.stat().st_size for path in folder.glob("blobs/*.incomplete")))


def _is_there(folder: Path, commit: str, name: str) -> bool:
    return (folder / "snapshots" / commit / name).exists()
