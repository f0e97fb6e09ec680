"""The one model in this process, and the candidate whose weights it has."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

from mergekit_lite.answers.likelihood import LogProb, log_probs
from mergekit_lite.answers.rows import Message
from mergekit_lite.answers.template import ChatTemplate, TemplateError, Tokens
from mergekit_lite.boosting.candidates.candidate import Params, label
from mergekit_lite.boosting.candidates.family import Family
from mergekit_lite.errors import NonFiniteError, counted

if TYPE_CHECKING:
    from mergekit_lite.resident.weights import Rewritten, Weights


@dataclass
class ResidentModel:
    """Builds the model when it is first needed, and rewrites its weights from candidate to candidate."""

    family: Family  # of all candidates
    device: str  # of the model and of the arithmetic that sets its weights
    threads: int | None = None  # of that arithmetic; one for each core by default
    # By the name of a candidate: the seconds spent on setting weights for it, and the result of setting its own.
    seconds: defaultdict[str, float] = field(default_factory=lambda: defaultdict(float), init=False)
    rewritten: dict[str, Rewritten] = field(default_factory=dict, init=False)
    _loaded: str = field(default="", init=False)

    def load(self, params: Params, purpose: Params | None = None) -> None:
        """Set the weights to a candidate's, unless they are.

        Args:
            params: the candidate.
            purpose: the candidate that the time is counted for; by default itself.

        Raises:
            NonFiniteError: some of its weights are NaN or infinite.
        """
        name = label(params)
        if name != self._loaded:
            weights, self._loaded = self._weights, ""
            started = time.monotonic()
            self.rewritten[name] = weights.set(self.family.plan(params))
            self._loaded = name
            self.seconds[label(purpose or params)] += time.monotonic() - started
        bad = self.rewritten[name].nonfinite
        if bad:
            raise NonFiniteError(f"{name}: NaN or infinity in {counted(len(bad), 'tensor')}, first in {bad[0]}.")

    def tokens(self, messages: Sequence[Message], response: str, ended: bool = True) -> Tokens | None:
        """Return a conversation and the answer to it as tokens, or None where they can't be read.

        The chat template refuses them, they are longer than the model takes, or the answer has no tokens. One that was
        cut, not ``ended``, has no end of turn.
        """
        try:
            prompt, tokens = self.template.tokens(messages, response)
        except TemplateError:
            return None
        tokens = tokens if ended else tokens[:-1]
        fits = self.context is None or len(prompt) + len(tokens) <= self.context
        return Tokens(prompt, tokens) if tokens and fits else None

    def log_probs(self, rows: Sequence[Tokens], batch_size: int) -> list[LogProb]:
        """Return the log-probability of each response under the loaded candidate."""
        self._checked  # noqa: B018  (once, with sound weights in the model)
        return log_probs(self.model, rows, batch_size)

    def facts(self, params: Params) -> Mapping[str, Any]:
        """Return a candidate's alpha as asked for and as effective, and the time it took to set its weights."""
        result = self.rewritten.get(label(params))
        if result is None:
            return {}
        report = result.report
        facts = {"asked": report.asked, "effective": report.effective, "nonfinite": list(result.nonfinite)}
        known = {name: value for name, value in facts.items() if value is not None and value != []}
        return {**known, "setting_seconds": round(self.seconds[label(params)], 3)}

    @property
    def model(self) -> Any:
        """The model, of transformers."""
        return self._weights.built.model

    @cached_property
    def tokenizer(self) -> Any:
        """The output's tokenizer."""
        from mergekit_lite.resident.model import tokenizer_of

        return tokenizer_of(self.family.plan(self.family.baseline))

    @cached_property
    def template(self) -> ChatTemplate:
        """The output's chat template."""
        return ChatTemplate(self.tokenizer)

    @cached_property
    def context(self) -> int | None:
        """The longest sequence that the model takes, in tokens; None where its config doesn't say."""
        from mergekit_lite.answers.loading import context_of

        return context_of(self.model)

    @cached_property
    def _weights(self) -> Weights:
        from mergekit_lite.resident.model import build
        from mergekit_lite.resident.weights import Weights

        return Weights(build(self.family.plan(self.family.baseline), self.device), self.device, self.threads)

    @cached_property
    def _checked(self) -> bool:
        from mergekit_lite.answers.logprobs import check_head

        check_head(self.model)
        return True
