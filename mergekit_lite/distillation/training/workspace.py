"""The folder of an unfinished training, and its publication under the final name."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from mergekit_lite.answers.rows import write_text
from mergekit_lite.errors import UsageError, listing
from mergekit_lite.input_files import opened

SETTINGS = "training.json"
LOG = "log.jsonl"
TENSORBOARD = "runs"
_ABSENT = object()
WEIGHTS = ("*.safetensors", "*.bin")  # files of a model's folder
WINDOWS, WINDOW = 16, 1 << 16  # parts of a file that its identity reads, and their bytes


class Workspace:
    """``train/STAGE.partial/``, from which ``train/STAGE/`` is published."""

    def __init__(self, final: Path):
        self.final = final  # the folder of the finished model
        self.root = final.with_name(f"{final.name}.partial")
        self.model = self.root / "model"  # written here before it is published
        self.log = self.root / LOG

    def check(self, settings: Mapping[str, Any]) -> None:
        """Refuse other settings than those that the existing folder, finished or not, was made with.

        Raises:
            UsageError: the settings differ, or the folder has no settings.
        """
        folder = next((folder for folder in (self.final, self.root) if folder.exists()), None)
        if folder is None:
            return
        try:
            saved = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["settings"]
        except FileNotFoundError as error:
            if folder == self.root:  # killed before anything was trained
                return
            message = f"{folder} is in the way: it has no {SETTINGS}. Move it or name another folder."
            raise UsageError(message) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder / SETTINGS} can't be read ({error}). Delete {folder} to train anew.") from error
        differences = [
            f"{key}: {_shown(saved, key)} there, {_shown(settings, key)} now"
            for key in sorted({*saved, *settings})
            if saved.get(key, _ABSENT) != settings.get(key, _ABSENT)
        ]
        if differences:
            what = "was trained" if folder == self.final else "was begun"
            advice = f"Set the recipe back, or move {folder} away (or delete it) to train anew."
            raise UsageError(listing(f"{folder} {what} with other settings", differences) + f"\n{advice}")

    def begin(self, record: Mapping[str, Any], step: int) -> None:
        """Create the folder, write its ``training.json``, and delete what is beyond the step to resume from.

        These are incomplete checkpoints, a half-written model, and rows of the log.
        """
        self._write(record, self.root)
        for folder in self.root.glob("checkpoint-*"):
            if self._step(folder) is None:
                shutil.rmtree(folder)
        for folder in (self.model, self.root / "trained"):
            shutil.rmtree(folder, ignore_errors=True)
        if self.log.exists():
            lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            lines = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            self.log.write_text("".join(lines), encoding="utf-8", newline="\n")

    def note(self, record: Mapping[str, Any]) -> None:
        """Create the folder, and write its ``training.json``."""
        self._write(record, self.root)

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """Return step and folder of the last complete checkpoint."""
        return max(self.checkpoints().items(), default=None)

    def checkpoints(self) -> dict[int, Path]:
        """Return the folders of the complete checkpoints by step."""
        checkpoints = ((self._step(folder), folder) for folder in self.root.glob("checkpoint-*"))
        return {step: folder for step, folder in checkpoints if step is not None}

    @property
    def is_checked(self) -> bool:
        """Whether the finished model was checked before it was published."""
        return "checked" in json.loads((self.final / SETTINGS).read_text(encoding="utf-8"))

    def publish(self, record: Mapping[str, Any]) -> None:
        """Write the complete model's ``training.json``, give it its final name, and delete the rest."""
        self._write(record, self.model)
        if self.log.exists():
            shutil.copy(self.log, self.model / LOG)
        if (self.root / TENSORBOARD).exists():
            shutil.copytree(self.root / TENSORBOARD, self.model / TENSORBOARD)
        self.model.rename(self.final)
        self.tidy()

    @staticmethod
    def _write(record: Mapping[str, Any], folder: Path) -> None:
        write_text(folder / SETTINGS, json.dumps(record, indent=2, ensure_ascii=False) + "\n")

    def tidy(self) -> None:
        """Delete the folder of a finished training."""
        shutil.rmtree(self.root, ignore_errors=True)

    @staticmethod
    def _step(folder: Path) -> int | None:
        """Return the step of a checkpoint, or None if it is incomplete: the trainer writes its state last."""
        name = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return int(name[1]) if name and state.get("global_step") == int(name[1]) else None


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], ensure_ascii=False) if key in settings else "nothing"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return ``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return leaves


def identity(model: str, patterns: Sequence[str] = WEIGHTS) -> str:
    """Return a digest that changes with a folder's weights, from sizes and samples of its files.

    A name on the hub is returned as it is. Other ``patterns`` are of other files.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = xxh3_128()
    for file in sorted(file for pattern in patterns for file in folder.glob(pattern) if file.is_file()):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode(errors="surrogateescape"))
        with opened(file) as content:
            for number in range(WINDOWS):  # spread evenly from the first byte to the last
                content.seek(max(0, (size - WINDOW) * number // (WINDOWS - 1)))
                digest.update(content.read(WINDOW))
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """Return a digest of a file's content."""
    digest = xxh3_128()
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
