"""The ways to one model, and the files of the demo's folder."""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from demo.distill.plan import Out
from demo.distill.skills import SKILLS
from mergekit_lite.methods import METHODS, Method

LEFT_OUT = {  # and why, of methods that merge three models
    "ema": "averages checkpoints in their order",
    "schedule_average": "averages checkpoints in their order",
    "relex": "needs the steps of a run",
}
WITH_BASE = ("nuslerp",)  # where a base is optional: what each model adds to it is met, as in WARP
DENSITY = 0.5
BOOSTED: dict[str, tuple[dict[str, Any], tuple[str, ...]]] = {  # numbers to begin with, and what boost looks for
    "linear": ({}, tuple(f"models.{number}.parameters.weight=0.2:2" for number in range(len(SKILLS)))),
    "task_arithmetic": ({"lambda": 1.0}, ("parameters.lambda=0.1:1.5",)),
    "ties": ({"lambda": 1.0, "density": DENSITY}, ("parameters.lambda=0.2:2.5", "parameters.density=0.1:1")),
}
# Of adapters: the space, and the methods in it. Averages and sums are the same in both.
COMBINED = {
    "core": ("linear", "task_arithmetic", "ties", "dare_linear", "dare_ties", "sce", "tsv", "iso_c", "wudi"),
    "knots": ("ties", "dare_ties", "sce"),
}
BY_PEFT = ("linear", "ties")  # its own ``combination_type``, with weights of 1
RANK = 8  # of adapters


@dataclass(frozen=True)
class Size:
    """The size of a run: steps, questions of each skill, and so on."""

    base: int  # steps that the base is taught all skills
    tuned: int  # steps of a fine-tune or an adapter, of one skill
    choosing: int  # questions for boost
    held_out: int  # questions to judge by
    read: int  # questions that each fine-tune reads, with their answers, for methods that need statistics
    trials: int  # of boost
    seeds: int


FULL = Size(base=450, tuned=200, choosing=100, held_out=150, read=200, trials=10, seeds=3)
QUICK = Size(base=20, tuned=6, choosing=4, held_out=4, read=4, trials=2, seeds=1)


def merges() -> list[str]:
    """Return the names of the methods that make one model of three fine-tunes, the plain average first."""
    fitting = [name for name, method in METHODS.items() if method.counts(len(SKILLS)) and name not in LEFT_OUT]
    return sorted(fitting, key=lambda name: (name != "linear", name))


def weights(method: Method) -> Mapping[str, float]:
    """Return a weight of 1 for each model where a method asks for weights."""
    return {"weight": 1.0} if "weight" in method.parameters and method.parameters["weight"].required else {}


def density(method: Method) -> Mapping[str, float]:
    """Return the density of methods that trim or drop nothing by default; all else stays at its default."""
    return {"density": DENSITY} if "density" in method.parameters and method.parameters["density"].default == 1 else {}


def kind_of(method: Method) -> str:
    """Return the kind of statistics that a method needs, if any; ``plus`` of text that came through merged layers."""
    return "plus" if method.prefixed else method.statistics


@dataclass(frozen=True)
class Files(Out):
    """The demo's folder."""

    def base(self, seed: int) -> Path:
        """Return the model that has learnt a little of all skills."""
        return self.model(f"{seed}-base")

    def joint(self, seed: int) -> Path:
        """Return the base tuned on all skills at once, by as many steps as all fine-tunes together."""
        return self.model(f"{seed}-joint")

    def tuned(self, seed: int, skill: str) -> Path:
        """Return the base tuned on one skill."""
        return self.model(f"{seed}-{skill}")

    def adapter(self, seed: int, skill: str) -> Path:
        """Return an adapter tuned on one skill."""
        return self.root / "adapters" / f"{seed}-{skill}"

    def statistics(self, seed: int, skill: str, kind: str) -> Path:
        """Return what was gathered of a fine-tune on questions of its own skill: ``gram``, ``fisher`` or ``plus``."""
        return self.root / "statistics" / f"{seed}-{skill}-{kind}.safetensors"

    def combined(self, seed: int, space: str, method: str) -> Path:
        """Return the adapter made of the three."""
        return self.root / "adapters" / f"{seed}-{space}-{method}"

    def one(self, kind: str, seed: int, skill: str) -> Path:
        """Return the model of one skill: a ``fine-tune``, or the base with its ``adapter``."""
        return self.tuned(seed, skill) if kind == "fine-tune" else self.merged(seed, f"adapter-{skill}")

    def boosted(self, seed: int, method: str) -> Path:
        """Return the merge by the numbers that boost found; it isn't there where boost was sure of none."""
        return self.root / "boosted" / f"{seed}-{method}"

    def search(self, seed: int, method: str) -> Path:
        """Return boost's report, which is there when the search is over."""
        return self.root / "boosted" / f"{seed}-{method}.boost" / "boost.json"

    def found(self, seed: int, method: str) -> dict[str, float] | None:
        """Return the numbers that a search chose; None where it was sure of none."""
        chosen: dict[str, float] | None = json.loads(self.search(seed, method).read_text())["chosen"]
        return chosen

    def is_searched(self, seed: int, method: str) -> bool:
        """Return whether a search came to its end, and its model is there if it chose one."""
        if not self.search(seed, method).exists():
            return False
        return self.found(seed, method) is None or self.boosted(seed, method).exists()

    def boosted_or_merged(self, seed: int, method: str) -> Path:
        """Return the merge by the numbers that boost found, else that by defaults."""
        return self.merged(seed, method) if self.found(seed, method) is None else self.boosted(seed, method)
