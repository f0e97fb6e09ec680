"""Candidates measured by tasks of the lm-evaluation-harness (``lm_eval``), where it is installed.

The harness gets the model in this process. The documents of a task, or of all tasks of a group, are the items; the
value is one of the task's metrics, with the other sign where the task says that lower is better.
"""

from __future__ import annotations

import io
import logging
import math
import random
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from functools import cached_property
from types import MappingProxyType
from typing import Any

from mergekit_lite.boosting.candidates.candidate import NONE, ItemRow, Params, Rivals
from mergekit_lite.boosting.measure.resident_model import ResidentModel
from mergekit_lite.boosting.measure.scores import ScoreSpec
from mergekit_lite.errors import UsageError, nearest


class Harness:
    """One task of the harness, or a group of them."""

    asked: Mapping[str, str] = MappingProxyType({})
    at_once: None = None  # a call of the harness costs much, and draws its examples anew

    def __init__(self, resident: ResidentModel, score: ScoreSpec, seed: int = 0, batch_size: int = 8) -> None:
        """Load the documents.

        Args:
            resident: the model.
            score: the task or group, and its settings: ``metric`` (by default each task's first one), ``minimise``
                (whether lower is better; by default as the task says), ``include`` (a folder with tasks of the user's
                own), ``limit`` (the number of documents of each task, from the first), ``shots`` (worked examples
                before each question; by default as the task says) and ``chat`` (whether questions are asked under the
                chat template; they are by default).
            seed: of examples and draws.
            batch_size: of the model.

        Raises:
            UsageError: the harness has no such task or metric, or doesn't say which way the metric is better.
        """
        self.resident = resident
        self.name = score.name
        self.task = score.target
        self.settings = dict(score.settings)
        self.seed = seed
        self.batch_size = batch_size
        self._places: dict[str, tuple[str, int]] = {}  # task and document of each item
        for task, loaded in self._tasks.items():
            count = min(len(loaded.eval_docs), self.settings.get("limit") or sys.maxsize)
            within = f"{self.name}:" if len(self._tasks) == 1 else f"{self.name}:{task}:"
            self._places |= {f"{within}{number}": (task, number) for number in range(count)}
        self.items, self.names = list(self._places), (self.name,)
        self.minimised = self._minimised()

    def rows(
        self, params: Params, items: Sequence[str], wanted: frozenset[str], rivals: Rivals = NONE
    ) -> Iterator[ItemRow]:
        """Yield the rows of the wanted documents."""
        from lm_eval import evaluate
        from lm_eval.models.huggingface import HFLM

        self.resident.load(params)
        documents: dict[str, list[int]] = {}
        for item in sorted(wanted, key=self._places.__getitem__):
            task, number = self._places[item]
            documents.setdefault(task, []).append(number)
        self._seed()
        with _quiet():
            model = HFLM(pretrained=self.resident.model, tokenizer=self.resident.tokenizer, batch_size=self.batch_size)
            results = evaluate(
                model,
                {task: self._tasks[task] for task in documents},
                samples=documents,
                apply_chat_template=self.settings.get("chat", True) and bool(self.resident.tokenizer.chat_template),
                bootstrap_iters=0,
            )
        # Of several filters of an answer the first one counts.
        samples = {
            (task, sample["doc_id"]): sample for task in documents for sample in reversed(results["samples"][task])
        }
        for item in sorted(wanted):
            yield ItemRow(item=item, values={self.name: self._value(*self._places[item], samples)})

    def _value(self, task: str, number: int, samples: Mapping[tuple[str, int], Mapping[str, Any]]) -> float | None:
        sample = samples[task, number]
        known = list(sample["metrics"])
        name = self.settings.get("metric") or known[0]
        if name not in known:
            raise UsageError(f"lm-eval:{task} has no metric {name!r} of a document: it has {', '.join(known)}.")
        value = sample[name]
        if not isinstance(value, int | float) or not math.isfinite(value):
            return None
        return 0.0 - value if self.minimised else float(value)

    def _minimised(self) -> bool:
        """Return whether lower is better, by the setting or as all tasks say."""
        said = {task: loaded.higher_is_better() for task, loaded in self._tasks.items()}
        metrics = {task: self.settings.get("metric") or next(iter(known), "") for task, known in said.items()}
        for task, metric in metrics.items():
            if metric not in said[task]:
                raise UsageError(
                    f"lm-eval:{task} has no metric {metric!r}: it has {', '.join(said[task]) or 'none'}."
                    f"{nearest(metric, said[task])}"
                )
        if "minimise" in self.settings:
            return bool(self.settings["minimise"])
        ways = {task: said[task][metric] for task, metric in metrics.items()}
        if unsaid := [task for task, higher in ways.items() if higher is None]:
            raise UsageError(
                f"lm-eval:{unsaid[0]} doesn't say whether a higher {metrics[unsaid[0]]} is better: add minimise=true "
                "or minimise=false to the --score."
            )
        if len({*ways.values()}) > 1:
            listed = ", ".join(f"{metrics[task]} of {task} {_words(higher)}" for task, higher in ways.items())
            raise UsageError(f"lm-eval:{self.task} has no one direction: {listed}. Name one metric=, or one task.")
        return not all(ways.values())

    def _seed(self) -> None:
        import numpy as np
        import torch

        random.seed(self.seed)
        np.random.seed(self.seed)
        torch.manual_seed(self.seed)

    @cached_property
    def _tasks(self) -> dict[str, Any]:
        """The task, or all tasks of the group, by name."""
        with _quiet():
            from lm_eval.tasks import TaskManager

            manager = TaskManager(include_path=self.settings.get("include"))
            known = [*manager.all_subtasks, *manager.all_groups, *manager.all_tags]
            if self.task not in known:
                raise UsageError(f"lm_eval has no task, group or tag {self.task!r}.{nearest(self.task, known)}")
            tasks = _loaded(manager, self.task)
            for loaded in tasks.values():
                usual = loaded.get_config("num_fewshot")
                if (shots := self.settings.get("shots")) is None:
                    shots = usual or 0
                if usual != 0:  # a task that asks for none has no examples to give
                    loaded.set_config(key="num_fewshot", value=shots)
                loaded.set_fewshot_seed(seed=self.seed)
        return tasks


def _loaded(manager: Any, name: str) -> dict[str, Any]:
    """Return a task, or all tasks of a group or tag, by name."""
    if hasattr(manager, "load"):  # since 0.4.12
        return dict(manager.load([name])["tasks"])
    from lm_eval.tasks import get_task_dict

    return dict(_flat(get_task_dict([name], manager)))


def _flat(tasks: Mapping[Any, Any]) -> Iterator[tuple[str, Any]]:
    """Yield the tasks of groups in groups, by name."""
    for name, task in tasks.items():
        if isinstance(task, Mapping):
            yield from _flat(task)
        else:
            yield name, task


def _words(higher: bool) -> str:
    return "is better higher" if higher else "is better lower"


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the harness's progress bars and remarks from the screen; what goes wrong is raised."""
    logger = logging.getLogger("lm_eval")
    before = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        logger.setLevel(before)
