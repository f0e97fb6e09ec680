"""The files of the demo's folder."""

from dataclasses import dataclass
from pathlib import Path

ROADS = ("dpo", "wrpo", "fusechat3")
LEARNT = {  # by each model, before anything is distilled
    "llama": ("add", "sort"),
    "gpt2": ("add",),
    "qwen2": ("reverse", "sort"),
    "target": ("add", "sort", "reverse"),
}
CAREFUL = 0.4  # the share of people whom the target has learnt from that are careful; the sources had no others
ALPHAS = (0.25, 0.5, 1, 2, 4)
MERGES = ("linear", "sce")


@dataclass(frozen=True)
class Size:
    """The size of a run: numbers of prompts for each skill, of seeds, and so on."""

    steps: dict[str, int]  # that each model is taught, before anything is distilled
    prompts: int  # to train on
    choosing: int  # to choose alphas by
    held_out: int  # to judge by
    batch: int  # pairs in a step of preference training
    correct: str  # the verifier; null takes any answer, for models that know nothing yet
    seeds: int


FULL = Size(
    {"llama": 700, "gpt2": 500, "qwen2": 550, "target": 900},
    prompts=2000,
    choosing=150,
    held_out=400,
    batch=64,
    correct="right",
    seeds=3,
)
QUICK = Size(dict.fromkeys(LEARNT, 40), prompts=20, choosing=3, held_out=6, batch=4, correct="null", seeds=1)


@dataclass(frozen=True)
class Out:
    """The demo's folder, and the seeds the roads are gone with."""

    root: Path
    seeds: tuple[int, ...]

    @property
    def logs(self) -> Path:
        return self.root / "logs"

    def model(self, name: str) -> Path:
        """One of the four that are there before anything is distilled."""
        return self.root / "models" / name

    def prompts(self, name: str) -> Path:
        """``train``, ``choosing`` or ``held-out``."""
        return self.root / "prompts" / f"{name}.jsonl"

    def recipe(self, seed: int, road: str) -> Path:
        return self.root / "recipes" / f"{seed}-{road}.yaml"

    def run(self, seed: int, road: str) -> Path:
        """Return the folder of one recipe."""
        return self.root / "runs" / f"{seed}-{road}"

    def trained(self, seed: int, road: str, stage: str) -> Path:
        """``sft`` or ``preference``."""
        return self.run(seed, road) / "train" / stage

    def expo(self, seed: int, road: str, alpha: str) -> Path:
        """Past the end of a road."""
        return self.root / "expo" / f"{seed}-{road}-{alpha}"

    def merged(self, seed: int, method: str) -> Path:
        """Return the folder of the merge of the three roads' trained models."""
        return self.root / "merged" / f"{seed}-{method}"

    def results(self, prompts: str, part: int) -> Path:
        return self.root / "results" / f"{prompts}-{part}.json"
