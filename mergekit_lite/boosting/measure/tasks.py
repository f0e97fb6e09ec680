"""Candidates measured by tasks of the lm-evaluation-harness (``lm_eval``), where it is installed.

The harness gets the model in this process. A task's documents are the items; the value is one of its metrics.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from mergekit_lite.boosting.candidates.candidate import ItemRow, Params
from mergekit_lite.boosting.measure.resident_model import ResidentModel
from mergekit_lite.boosting.measure.scores import ScoreSpec
from mergekit_lite.errors import UsageError, nearest


class Harness:
    """One task of the harness."""

    asked: Mapping[str, str] = MappingProxyType({})

    def __init__(self, resident: ResidentModel, score: ScoreSpec, seed: int = 0, batch_size: int = 8) -> None:
        """Load the task's documents.

        Args:
            resident: the model.
            score: the task, which is no group, and its settings: ``metric`` (by default the task's first one),
                ``include`` (a folder with tasks of the user's own), ``limit`` (the number of documents, from the
                first), ``shots`` (worked examples before each question; by default as the task says) and ``chat``
                (whether questions are asked under the chat template; they are by default).
            seed: of examples and draws.
            batch_size: of the model.

        Raises:
            UsageError: the harness has no such task.
        """
        self.resident = resident
        self.name = score.name
        self.task = score.target
        self.settings = dict(score.settings)
        self.seed = seed
        self.batch_size = batch_size
        count = min(len(self._documents), self.settings.get("limit") or sys.maxsize)
        self._numbers = {f"{self.name}:{number}": number for number in range(count)}
        self.items, self.names = list(self._numbers), (self.name,)

    def rows(self, params: Params, items: Sequence[str], wanted: frozenset[str]) -> Iterator[ItemRow]:
        """Yield the rows of the wanted documents."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        self.resident.load(params)
        model = HFLM(pretrained=self.resident.model, tokenizer=self.resident.tokenizer, batch_size=self.batch_size)
        results = simple_evaluate(
            model,
            tasks=[self.task],
            num_fewshot=self.settings.get("shots"),
            samples={self.task: sorted(self._numbers[item] for item in wanted)},
            apply_chat_template=self.settings.get("chat", True) and bool(self.resident.tokenizer.chat_template),
            bootstrap_iters=0,
            task_manager=self._manager,
            random_seed=self.seed,
            numpy_random_seed=self.seed,
            torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
        )
        # Of several filters of an answer the first one counts.
        samples = {sample["doc_id"]: sample for sample in reversed(results["samples"][self.task])}
        for item in sorted(wanted):
            yield ItemRow(item=item, values={self.name: self._value(samples[self._numbers[item]])})

    def _value(self, sample: Mapping[str, Any]) -> float | None:
        known = list(sample["metrics"])
        name = self.settings.get("metric") or known[0]
        if name not in known:
            raise UsageError(f"lm-eval:{self.task} has no metric {name!r}: it has {', '.join(known)}.")
        value = sample[name]
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    @cached_property
    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.settings.get("include"))

    @cached_property
    def _documents(self) -> Sequence[Any]:
        from lm_eval.tasks import get_task_dict

        known = self._manager.all_subtasks
        if self.task not in known:
            raise UsageError(f"lm_eval has no task {self.task!r} (groups are no task).{nearest(self.task, known)}")
        documents: Sequence[Any] = get_task_dict([self.task], self._manager)[self.task].eval_docs
        return documents
