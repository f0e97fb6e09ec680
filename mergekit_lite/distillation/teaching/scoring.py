"""What gives a teacher's distributions over the tokens of given responses: a model in this process, or a server."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple, Protocol

from mergekit_lite.answers.likelihood import batches
from mergekit_lite.answers.loading import causal_model, context_of, placed
from mergekit_lite.answers.template import Tokens
from mergekit_lite.distillation.recipe.schema import RecipeTeacher
from mergekit_lite.errors import RunError

if TYPE_CHECKING:
    import numpy as np
    import numpy.typing as npt
    from torch import Tensor
    from transformers import PreTrainedModel

    from mergekit_lite.answers.logprobs import Batch


class Said(NamedTuple):
    """What a teacher says of a response of P tokens; see ``TaughtRow``.

    Attributes:
        log_probs: (P,) float32.
        top_ids: (P, K) int32.
        top_log_probs: (P, K) float32; −inf where a distribution has fewer.
    """

    log_probs: npt.NDArray[np.float32]
    top_ids: npt.NDArray[np.int32]
    top_log_probs: npt.NDArray[np.float32]


class Scorer(Protocol):
    """Gives distributions over the tokens of responses."""

    def why_not(self, row: Tokens) -> str | None:
        """Return why a row can't be scored; None where it can."""

    def score(self, rows: Sequence[Tokens]) -> Iterator[tuple[int, Said]]:
        """Yield the places of rows with what is said of them, as it comes; those that get no answer are left out.

        Raises:
            RunError: no more can be had; what came before is good.
        """

    @property
    def at_once(self) -> int:
        """How many rows are best given together."""

    @property
    def notes(self) -> Sequence[str]:
        """What was found out that the user should know."""

    @property
    def why_missing(self) -> str:
        """Why rows got no answer."""


@dataclass(frozen=True)
class LocalScorer:
    """A teacher in this process. Its model is loaded when it is first needed, and stays."""

    settings: RecipeTeacher
    notes: tuple[str, ...] = ()
    why_missing: str = ""

    @property
    def at_once(self) -> int:
        """How many rows are best given together: batches are of rows of one length as far as these go."""
        return 64 * self.settings.batch_size

    @cached_property
    def model(self) -> PreTrainedModel:
        """The model, in evaluation mode on its device."""
        from mergekit_lite.answers.logprobs import check_head

        model = causal_model(self.settings.model, placed(self.settings.device, self.settings.dtype))
        check_head(model)
        return model

    def why_not(self, row: Tokens) -> str | None:
        """Return why a row can't be scored: it is longer than the model takes."""
        most = context_of(self.model)
        size = len(row.prompt) + len(row.response)
        return f"it is longer than the {most:,} tokens that the model takes" if most and size > most else None

    def score(self, rows: Sequence[Tokens]) -> Iterator[tuple[int, Said]]:
        """Yield what the model says batch by batch, the longest rows first.

        Raises:
            RunError: a batch doesn't fit into memory.
        """
        import torch

        from mergekit_lite.answers.logprobs import padded

        for places in batches(rows, self.settings.batch_size):
            try:
                found = said_of(self.model, padded([rows[place] for place in places], device=self.model.device),
                                self.settings.top)  # fmt: skip
            except torch.cuda.OutOfMemoryError as error:
                longest = max(len(rows[place].prompt) + len(rows[place].response) for place in places)
                raise RunError(
                    f"{self.settings.name}: {len(places)} rows of up to {longest:,} tokens at once don't fit into the "
                    f"memory of {self.model.device}. Lower its `batch_size`."
                ) from error
            yield from zip(places, found, strict=True)


def said_of(model: PreTrainedModel, batch: Batch, top: int) -> list[Said]:
    """Return what a model says of each response of a batch.

    The logits of a chunk of positions are in memory at a time, a part of it in float32 (``answers/logprobs.py``).

    Args:
        model: a causal language model with a head that ``check_head`` accepts.
        batch: on the model's device; each row has a prompt, for nothing predicts the first token of a sequence.
        top: how many of the likeliest tokens; as many as there are, where these are fewer.
    """
    import torch

    from mergekit_lite.answers.logprobs import LOGITS_AT_ONCE, PARTS, head_of, shape_of

    head, shape = head_of(model), shape_of(model)
    chosen: list[Tensor] = []
    ids: list[Tensor] = []
    values: list[Tensor] = []
    with torch.inference_mode():
        hidden = model.base_model(**batch.inputs, use_cache=False)[0].flatten(0, 1)
        states, targets = hidden[batch.states], batch.targets
        rows = max(1, LOGITS_AT_ONCE // head.weight.shape[0])
        for state, target in zip(torch.split(states, rows), torch.split(targets, rows), strict=True):
            for part, tokens in zip(head(state).chunk(PARTS), target.chunk(PARTS), strict=True):
                logits = shape.apply(part)
                total = logits.logsumexp(1, keepdim=True)
                chosen.append((logits.gather(1, tokens[:, None]) - total)[:, 0].clamp(max=0))
                best = logits.topk(min(top, logits.shape[1]))
                ids.append(best.indices.int())
                values.append((best.values - total).clamp(max=0))
        lengths = batch.lengths.tolist()
        parts = [torch.split(torch.cat(each).cpu(), lengths) for each in (chosen, ids, values)]
    return [Said(*(each.numpy() for each in row)) for row in zip(*parts, strict=True)]
