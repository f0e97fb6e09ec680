"""Candidates measured by tasks of the lm-evaluation-harness (``lm_eval``), where it is installed.

The harness is handed the model in this process. A task's documents are the items; the value is one of its metrics.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from functools import cached_property
from types import MappingProxyType
from typing import Any

from mergekit_lite.boosting.candidates.candidate import Numbers, Row
from mergekit_lite.boosting.measure.resident_model import Stand
from mergekit_lite.errors import UsageError, nearest


class Harness:
    """One task of the harness."""

    asked: Mapping[str, str] = MappingProxyType({})

    def __init__(
        self,
        stand: Stand,
        name: str,
        task: str,
        *,
        metric: str | None = None,
        include: str | None = None,
        limit: int | None = None,
        shots: int | None = None,
        chat: bool = True,
        seed: int = 0,
        batch_size: int = 8,
    ) -> None:
        """Load the task's documents.

        Args:
            stand: the model.
            name: of the score.
            task: its name in the harness; no group.
            metric: of the task; by default the first one that it tells.
            include: a folder with tasks of the user's own.
            limit: so many documents, from the first.
            shots: worked examples before each question; by default as the task says.
            chat: whether questions are asked under the chat template.
            seed: of examples and draws.
            batch_size: of the model.

        Raises:
            UsageError: the harness has no such task.
        """
        self.stand = stand
        self.name = name
        self.task = task
        self.metric = metric
        self.include = include
        self.shots = shots
        self.chat = chat
        self.seed = seed
        self.batch_size = batch_size
        count = len(self._documents)
        self._numbers = {f"{name}:{number}": number for number in range(min(count, limit or count))}

    @property
    def names(self) -> Sequence[str]:
        """The score's."""
        return (self.name,)

    @property
    def items(self) -> list[str]:
        """One for each document."""
        return list(self._numbers)

    def rows(self, numbers: Numbers, items: Sequence[str], wanted: frozenset[str]) -> Iterator[Row]:
        """The rows of the wanted documents."""
        from lm_eval import simple_evaluate
        from lm_eval.models.huggingface import HFLM

        self.stand.put(numbers)
        model = HFLM(pretrained=self.stand.model, tokenizer=self.stand.tokenizer, batch_size=self.batch_size)
        found = simple_evaluate(
            model,
            tasks=[self.task],
            num_fewshot=self.shots,
            samples={self.task: sorted(self._numbers[item] for item in wanted)},
            apply_chat_template=self.chat and bool(self.stand.tokenizer.chat_template),
            bootstrap_iters=0,
            task_manager=self._manager,
            random_seed=self.seed,
            numpy_random_seed=self.seed,
            torch_random_seed=self.seed,
            fewshot_random_seed=self.seed,
        )
        told = {sample["doc_id"]: sample for sample in reversed(found["samples"][self.task])}  # the first filter's
        for item in sorted(wanted):
            yield Row(item=item, values={self.name: self._value(told[self._numbers[item]])})

    def _value(self, sample: Mapping[str, Any]) -> float | None:
        known = list(sample["metrics"])
        name = self.metric or known[0]
        if name not in known:
            raise UsageError(f"lm-eval:{self.task} has no metric {name!r}: it has {', '.join(known)}.")
        value = sample[name]
        return float(value) if isinstance(value, int | float) and math.isfinite(value) else None

    @cached_property
    def _manager(self) -> Any:
        from lm_eval.tasks import TaskManager

        return TaskManager(include_path=self.include)

    @cached_property
    def _documents(self) -> Sequence[Any]:
        from lm_eval.tasks import get_task_dict

        known = self._manager.all_subtasks
        if self.task not in known:
            raise UsageError(f"lm_eval has no task {self.task!r} (groups are no task).{nearest(self.task, known)}")
        documents: Sequence[Any] = get_task_dict([self.task], self._manager)[self.task].eval_docs
        return documents
