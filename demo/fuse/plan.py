"""The roads, the models, and the files of the demo's folder."""

from dataclasses import dataclass
from pathlib import Path

from demo.distill.plan import Out

ROADS = {  # their trainings' names: the last one is what a road leads to
    "sft": ("sft",),
    "uld": ("fuse",),
    "mince": ("fuse",),
    "alm": ("fuse",),
    "pkl": ("fuse",),
    "onpolicy": ("sft", "on_policy"),
    "fusechat": ("fuse",),
}
TITLES = {
    "sft": "SFT alone",
    "uld": "ULD",
    "mince": "MinCE",
    "alm": "ALM",
    "pkl": "P-KL",
    "onpolicy": "on-policy",
    "fusechat": "FuseChat: pairwise, merged",
}
TEACHERS = {"llama": ("add", "sort"), "gemma": ("sort", "reverse"), "neox": ("add", "reverse")}  # what each has learnt
STUDENT = ("add", "sort", "reverse")
CAREFUL = 0.4  # the share of careful people among those whom the student has learnt from, and who wrote the rows


@dataclass(frozen=True)
class Size:
    """The size of a run."""

    steps: dict[str, int]  # that each model is taught, before anything is fused
    rows: int  # to train on, of each skill and seed
    asked: int  # questions of a round of on-policy training, see ``recipes/onpolicy.yaml``
    held_out: int  # questions of each skill to judge by
    batch: int  # rows of a step
    seeds: int


FULL = Size(
    {"llama": 1200, "gemma": 1600, "neox": 1700, "student": 900}, rows=300, asked=112, held_out=300, batch=16, seeds=3
)
QUICK = Size({**dict.fromkeys(TEACHERS, 30), "student": 120}, rows=12, asked=6, held_out=4, batch=6, seeds=1)


@dataclass(frozen=True)
class Files(Out):
    """The demo's folder."""

    def rows(self, seed: int | str) -> Path:
        """Return the file of a seed's rows; of all seeds' with ``all``."""
        return self.root / "rows" / f"{seed}.jsonl"

    @property
    def teaching(self) -> Path:
        """The recipe by which teachers score the rows of all seeds, once."""
        return self.root / "recipes" / "teach.yaml"

    @property
    def taught(self) -> Path:
        """Return what the teachers said."""
        return self.root / "runs" / "teach" / "teach"

    def end(self, seed: int, road: str) -> Path:
        """Return the model that a road leads to."""
        return self.trained(seed, road, ROADS[road][-1])

    def pairwise(self, seed: int, teacher: str) -> Path:
        """Return FuseChat's student of one teacher, before the merge."""
        return self.trained(seed, "fusechat", f"fuse-{teacher}")
