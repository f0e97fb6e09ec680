"""The folder of a stage while it is trained, and its publication."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from xxhash import xxh3_128

from mergekit_lite.answers.rows import write_text
from mergekit_lite.errors import UsageError, listing

SETTINGS = "training.json"
LOG = "log.jsonl"
TENSORBOARD = "runs"
_ABSENT = object()
WINDOWS, WINDOW = 16, 1 << 16  # of a file's content that its identity is made of


class Workspace:
    """``train/STAGE.partial/``, which becomes ``train/STAGE/``.

    Attributes:
        final: where the finished model lies.
        root: the folder of the unfinished stage.
        model: where the model is put together before it is published.
    """

    def __init__(self, final: Path):
        self.final = final
        self.root = final.with_name(f"{final.name}.partial")
        self.model = self.root / "model"

    @property
    def done(self) -> bool:
        """Whether the stage is finished."""
        return self.final.exists()

    @property
    def log(self) -> Path:
        """The rows of the report, while it is trained."""
        return self.root / LOG

    def check(self, settings: Mapping[str, Any]) -> None:
        """Hold what is there, finished or not, to the settings it was made with.

        Raises:
            UsageError: they differ, or the folder is none of ours.
        """
        folder = next((folder for folder in (self.final, self.root) if folder.exists()), None)
        if folder is None:
            return
        try:
            made = json.loads((folder / SETTINGS).read_text(encoding="utf-8"))["settings"]
        except FileNotFoundError as error:
            if folder == self.root:  # killed before anything was trained
                return
            raise UsageError(
                f"{folder} is in the way: it has no {SETTINGS}. Move it or name another folder."
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UsageError(f"{folder / SETTINGS} can't be read ({error}). Delete {folder} to train anew.") from error
        differences = [
            f"{key}: {_shown(made, key)} there, {_shown(settings, key)} now"
            for key in sorted({*made, *settings})
            if made.get(key, _ABSENT) != settings.get(key, _ABSENT)
        ]
        if differences:
            what = "was trained" if folder == self.final else "was begun"
            advice = f"Set the recipe back, or move {folder} away (or delete it) to train anew."
            raise UsageError(listing(f"{folder} {what} with other settings", differences) + f"\n{advice}")

    def begin(self, record: Mapping[str, Any], step: int) -> None:
        """Make the folder, write down what is trained in it, and drop what lies beyond the step to go on from."""
        write_text(self.root / SETTINGS, json.dumps(record, indent=2, ensure_ascii=False) + "\n")
        self._clear(step)

    def last_checkpoint(self) -> tuple[int, Path] | None:
        """Step and folder of the last checkpoint that was written to its end."""
        complete = ((self._step(folder), folder) for folder in self.root.glob("checkpoint-*"))
        return max(((step, folder) for step, folder in complete if step is not None), default=None)

    def _clear(self, step: int) -> None:
        """Drop torn checkpoints, a model half put together, and rows of the log beyond a step."""
        for folder in self.root.glob("checkpoint-*"):
            if self._step(folder) is None:
                shutil.rmtree(folder)
        for folder in (self.model, self.root / "trained"):
            shutil.rmtree(folder, ignore_errors=True)
        if self.log.exists():
            lines = self.log.read_text(encoding="utf-8").splitlines(keepends=True)
            kept = [line for line in lines if line.endswith("\n") and json.loads(line)["step"] <= step]
            self.log.write_text("".join(kept), encoding="utf-8")

    def publish(self) -> None:
        """Give the complete model its name, and drop the rest."""
        for name in (SETTINGS, LOG):
            shutil.copy(self.root / name, self.model / name)
        if (self.root / TENSORBOARD).exists():
            shutil.copytree(self.root / TENSORBOARD, self.model / TENSORBOARD)
        self.model.rename(self.final)
        self.tidy()

    def tidy(self) -> None:
        """Drop what is left of a finished stage's making."""
        shutil.rmtree(self.root, ignore_errors=True)

    @staticmethod
    def _step(folder: Path) -> int | None:
        """The step of a complete checkpoint: the trainer writes its state last."""
        found = re.fullmatch(r"checkpoint-(\d+)", folder.name)
        try:
            state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
        except (OSError, ValueError):
            return None
        return int(found[1]) if found and state.get("global_step") == int(found[1]) else None


def _shown(settings: Mapping[str, Any], key: str) -> str:
    return json.dumps(settings[key], ensure_ascii=False) if key in settings else "nothing"


def flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """``{"a": {"b": 1}}`` as ``{"a.b": 1}``."""
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        name = f"{prefix}{key}"
        leaves |= flat(value, f"{name}.") if isinstance(value, Mapping) and value else {name: value}
    return leaves


def identity(model: str) -> str:
    """A digest that tells whether a folder's weights are still the same: of the sizes and samples of its files.

    A name on the hub stands for itself.
    """
    folder = Path(model)
    if not folder.is_dir():
        return model
    digest = xxh3_128()
    for file in sorted([*folder.glob("*.safetensors"), *folder.glob("*.bin")]):
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as content:
            for place in range(WINDOWS):
                content.seek(max(0, (size - WINDOW) * place // (WINDOWS - 1)))
                digest.update(content.read(WINDOW))
    return digest.hexdigest()


def digest_of(path: Path) -> str:
    """A digest of a file's content."""
    digest = xxh3_128()
    with path.open("rb") as content:
        while block := content.read(1 << 20):
            digest.update(block)
    return digest.hexdigest()
