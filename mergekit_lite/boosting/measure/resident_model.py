"""The one model in this process, and the candidate whose weights are in it."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergekit_lite.answers.likelihood import LogProb, log_probs
from mergekit_lite.answers.template import ChatTemplate, Tokens
from mergekit_lite.boosting.candidates.candidate import Numbers, label
from mergekit_lite.boosting.candidates.family import Family
from mergekit_lite.errors import NonFiniteError, counted

if TYPE_CHECKING:
    from mergekit_lite.boosting.measure.model import Built
    from mergekit_lite.boosting.measure.weights import Rewritten, Weights


@dataclass
class Stand:
    """Builds the model when it is first needed, and rewrites its weights from candidate to candidate.

    Attributes:
        family: of all candidates.
        device: of the model and of the arithmetic that sets its weights.
        threads: of that arithmetic; one for each core by default.
        seconds: spent on setting weights, by the name of the candidate they were set for.
        rewritten: what setting them did, likewise.
    """

    family: Family
    device: str
    threads: int | None = None

    def __post_init__(self) -> None:
        """No candidate is on the stand."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.rewritten: dict[str, Rewritten] = {}
        self._there = ""

    def put(self, numbers: Numbers, purpose: Numbers | None = None) -> None:
        """Make the model this candidate, if it isn't.

        Args:
            numbers: the candidate.
            purpose: the candidate it is needed for, where that is another one.

        Raises:
            NonFiniteError: some of its weights are NaN or infinite.
        """
        name = label(numbers)
        if name != self._there:
            weights, self._there = self._weights, ""
            started = time.monotonic()
            self.rewritten[name] = weights.set(self.family.plan(numbers))
            self._there = name
            self.seconds[label(purpose or numbers)] += time.monotonic() - started
        bad = self.rewritten[name].nonfinite
        if bad:
            raise NonFiniteError(f"{name}: NaN or infinity in {counted(len(bad), 'tensor')}, first in {bad[0]}.")

    def log_probs(self, rows: Sequence[Tokens], batch_size: int) -> list[LogProb]:
        """Of each response, under the candidate that is on the stand."""
        self._checked  # noqa: B018  (once, with sound weights in the model)
        return log_probs(self.model, rows, batch_size)

    def facts(self, numbers: Numbers) -> Mapping[str, Any]:
        """What became of a candidate's weights: alpha asked for and effective, and the time it took to set them."""
        found = self.rewritten.get(label(numbers))
        if found is None:
            return {}
        told = {"asked": found.report.asked, "effective": found.report.effective, "nonfinite": list(found.nonfinite)}
        kept = {name: value for name, value in told.items() if value is not None and value != []}
        return {**kept, "setting_seconds": round(self.seconds[label(numbers)], 3)}

    @property
    def model(self) -> Any:
        """The model, of transformers."""
        return self._built.model

    @cached_property
    def tokenizer(self) -> Any:
        """The tokenizer that the output gets."""
        from mergekit_lite.boosting.measure.model import tokenizer_of

        return tokenizer_of(self.family.plan(self.family.baseline))

    @cached_property
    def template(self) -> ChatTemplate:
        """The chat template that the output gets."""
        return ChatTemplate(self.tokenizer)

    @cached_property
    def context(self) -> int | None:
        """How many tokens the model takes, where it tells."""
        from mergekit_lite.answers.loading import context_of

        return context_of(self.model)

    @cached_property
    def _built(self) -> Built:
        from mergekit_lite.boosting.measure.model import build

        return build(self.family.plan(self.family.baseline), self.device)

    @cached_property
    def _weights(self) -> Weights:
        from mergekit_lite.boosting.measure.weights import Weights

        return Weights(self._built, self.device, self.threads)

    @cached_property
    def _checked(self) -> bool:
        from mergekit_lite.answers.logprobs import check_head

        check_head(self.model)
        return True
