"""The files of one distillation. The stages know each other by these files only."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class Folder:
    """The folder of one recipe. docs/distill.md lists its files and their rows.

    With rounds each has such a folder in it, ``round-1``, ``round-2`` …, which has all but the report.

    Files in ``samples`` and ``scores`` are ledgers (``answers/ledger.py``). The folder of the report has its own
    prompts, samples and scores, of the trained models and held-out prompts.
    """

    root: Path

    @property
    def prompts(self) -> Path:
        """The prompts as they were when the sample stage first ran."""
        return self.root / "prompts.jsonl"

    @property
    def embeddings(self) -> Path:
        """The folder of the embeddings that a model makes of prompts."""
        return self.root / "embeddings"

    def drawn(self, name: str) -> Path:
        """Return the file of the prompts that a model has drawn."""
        return self.root / "magpie" / f"{name}.jsonl"

    def written(self, name: str) -> Path:
        """Return the file of the prompts that a model has written."""
        return self.root / "written" / f"{name}.jsonl"

    def samples(self, source: str) -> Path:
        """Return the file of the answers of one source."""
        return self.root / "samples" / f"{source}.jsonl"

    @property
    def has_answers(self) -> bool:
        """Whether any source has answered, in any round."""
        return any(found for pattern in ("", "round-*/") for found in self.root.glob(f"{pattern}samples/*.jsonl"))

    def steps(self, source: str) -> Path:
        """Return the file of the replies that the answers of an aggregate are made of."""
        return self.root / "steps" / f"{source}.jsonl"

    def server_log(self, source: str) -> Path:
        """Return the file that takes what a source's server prints, where this process starts it."""
        return self.root / "samples" / f"{source}.server.log"

    def scores(self, scorer: str, source: str) -> Path:
        """Return the file of one scorer's scores of the answers of one source."""
        return self.root / "scores" / scorer / f"{source}.jsonl"

    def pairs(self, name: str) -> Path:
        """Return the file of the ``sft``, ``preference``, ``dropped`` or ``target`` rows."""
        return self.root / "pairs" / f"{name}.jsonl"

    def taught(self, teacher: str) -> Path:
        """Return the folder of what one teacher says of the SFT rows."""
        return self.root / "teach" / teacher

    def trained(self, stage: str) -> Path:
        """Return the folder of the model that a training makes: ``sft``, ``fuse``, ``on_policy`` or ``preference``."""
        return self.root / "train" / stage

    @property
    def momentum(self) -> Path:
        """The folder of the step beyond the model that a round has trained."""
        return self.root / "momentum"

    @property
    def report(self) -> Path:
        """The folder of the report."""
        return self.root / "report"
