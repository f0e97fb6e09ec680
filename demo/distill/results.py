"""The models' results on the prompts: sources, stages of a road, extrapolated and merged models."""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from statistics import fmean

from demo.distill.comparison import Table
from demo.distill.jobs import AT_ONCE, Job, python, run
from demo.distill.plan import ALPHAS, LEARNT, MERGES, ROADS, Out
from mergekit_lite.errors import counted

TITLES = {"dpo": "DPO", "wrpo": "WRPO", "fusechat3": "FuseChat-3.0"}
MERGE_TITLES = {"linear": "mean", "sce": "SCE"}


@dataclass(frozen=True)
class Measured:
    """A kind of model on all prompts: a row for each seed, or one row where it was made once."""

    key: str
    name: str
    right: Table  # of answers drawn at temperature 1
    greedy: Table
    length: Table

    def share(self) -> float:
        """Return the share of right answers."""
        return fmean(map(fmean, self.right))

    def on(self, prompts: Sequence[int]) -> Table:
        """``right`` on some of the prompts."""
        return [[row[prompt] for prompt in prompts] for row in self.right]


class Results:
    """The results on one file of prompts."""

    def __init__(self, out: Out, prompts: str):
        self.out = out
        self.domains = [json.loads(line)["domain"] for line in out.prompts(prompts).read_text().splitlines()]
        self.scores: dict[str, dict[str, list[float]]] = {}
        for path in sorted(out.results(prompts, 0).parent.glob(f"{prompts}-*.json")):
            self.scores |= json.loads(path.read_text())

    def once(self, key: str, name: str, model: Path) -> Measured:
        """Return the results of a model that all seeds share."""
        return self._measured(key, name, [model])

    def by_seed(self, key: str, name: str, model: Callable[[int], Path]) -> Measured:
        """Return the results of a model that each seed has trained again."""
        return self._measured(key, name, [model(seed) for seed in self.out.seeds])

    def stage(self, road: str, stage: str) -> Measured:
        """Return the results of a road's ``sft`` or ``preference`` model."""
        name = f"{TITLES[road]} {stage}"
        return self.by_seed(f"{road}-{stage}", name, lambda seed: self.out.trained(seed, road, stage))

    def expo(self, road: str, alpha: float) -> Measured:
        """Past a road's end."""
        name = f"{TITLES[road]}, then ExPO with alpha {alpha:g}"
        return self.by_seed(f"expo-{road}", name, lambda seed: self.out.expo(seed, road, f"{alpha:g}"))

    def _measured(self, key: str, name: str, models: Sequence[Path]) -> Measured:
        found = [self.scores[str(model)] for model in models]
        return Measured(key, name, *([one[figure] for one in found] for figure in ("right", "greedy", "length")))


def score(out: Out, prompts: str, models: Sequence[Path]) -> None:
    """Let the models that have no results on these prompts yet answer, in as many processes as run at once."""
    there = Results(out, prompts).scores
    missing = [model for model in models if str(model) not in there]
    first = len(list(out.results(prompts, 0).parent.glob(f"{prompts}-*.json")))
    jobs = []
    for part in range(min(AT_ONCE, len(missing))):
        some = missing[part::AT_ONCE]
        path = out.results(prompts, first + part)
        path.parent.mkdir(exist_ok=True)
        command = python("demo.distill.evaluation", out.prompts(prompts), path, *some)
        jobs.append(Job(f"{counted(len(some), 'model')} on the {prompts} prompts, part {first + part}", command))
    run(jobs, out.logs)


def best_alpha(choosing: Results, road: str) -> float:
    """Return the alpha with the most right answers over all seeds, on prompts that are used for nothing else."""
    return max(ALPHAS, key=lambda alpha: choosing.expo(road, alpha).share())


def all_measured(judged: Results, alphas: dict[str, float]) -> list[Measured]:
    """Every kind of model, in the order of the page."""
    out = judged.out

    def trained(key: str, name: str, road: str, stage: str) -> Measured:
        return judged.by_seed(key, name, lambda seed: out.trained(seed, road, stage))

    def merged(method: str) -> Measured:
        name = f"the three merged: {MERGE_TITLES[method]}"
        return judged.by_seed(f"merged-{method}", name, lambda seed: out.merged(seed, method))

    return [
        *(judged.once(name, f"source {name}", out.model(name)) for name in LEARNT if name != "target"),
        judged.once("target", "target", out.model("target")),
        trained("sft", "SFT", "dpo", "sft"),
        trained("dpo", "SFT → DPO", "dpo", "preference"),
        trained("wrpo", "SFT → WRPO", "wrpo", "preference"),
        trained("fusechat3-sft", "FuseChat-3.0's SFT", "fusechat3", "sft"),
        trained("fusechat3", "FuseChat-3.0: SFT → dpo_norm", "fusechat3", "preference"),
        *(judged.expo(road, alphas[road]) for road in ROADS),
        *(merged(method) for method in MERGES),
    ]
