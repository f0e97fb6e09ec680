"""Embeddings of texts by a model in this process: the mean of its last hidden states over a text's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lite.answers.loading import Dtype, context_of, free_memory, model_of, placed, tokenizer_of
from mergekit_lite.errors import CheckpointError, RunError, listing, shortened

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

EXPECTED = "a model with hidden states"
OWN_CODE = "embed the texts yourself, and name the `column` that has the embeddings."


@dataclass
class Embedder:
    """A model that embeds texts, loaded when it is first needed.

    Of a model with an encoder and a decoder it is the encoder, as of T5 in data-efficient finetuning (Ivison et al.
    2023, arXiv 2212.00196). No chat template is applied.
    """

    path: str  # a folder, or org/name on the hub. Code in it is never run.
    max_length: int = 512  # tokens that are read of a text; no more than the model takes
    batch_size: int = 16
    device: str | None = None
    dtype: Dtype | None = None
    cut: int = field(default=0, init=False)  # texts that were longer

    def embed(self, texts: Sequence[str]) -> np.ndarray:
        """Return an embedding a row (texts × dimensions, float32). The same texts together have the same bits.

        Raises:
            CheckpointError: the model can't be loaded.
            RunError: a batch doesn't fit into memory, or an embedding is not finite.
        """
        rows = [self._tokens(text) for text in texts]
        order = sorted(range(len(rows)), key=lambda place: -len(rows[place]))
        batches = [order[start : start + self.batch_size] for start in range(0, len(rows), self.batch_size)]
        found = {place: vector for batch in batches for place, vector in self._batch(rows, batch)}
        vectors = np.stack([found[place] for place in range(len(rows))])
        if not np.isfinite(vectors).all():
            wrong = texts[int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])]
            raise RunError(f"{self.path}: the embedding of {shortened(wrong, 60)!r} is not finite. Try dtype float32.")
        return vectors

    def close(self) -> None:
        """Return the memory of the model, if it was loaded."""
        if self.__dict__.pop("model", None) is not None:
            free_memory()

    def _tokens(self, text: str) -> list[int]:
        tokens: list[int] = self.tokenizer(text)["input_ids"]
        if not tokens:
            raise RunError(f"{self.path}: its tokenizer makes no token of {shortened(text, 60)!r}")
        self.cut += len(tokens) > self.most
        return tokens[: self.most]

    def _batch(self, rows: Sequence[Sequence[int]], places: Sequence[int]) -> list[tuple[int, np.ndarray]]:
        import torch

        longest = max(len(rows[place]) for place in places)
        ids = torch.zeros((len(places), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for number, place in enumerate(places):
            ids[number, : len(rows[place])] = torch.tensor(rows[place])
            mask[number, : len(rows[place])] = 1
        mask = mask.to(self.model.device)
        try:
            with torch.inference_mode():
                states = self.model(input_ids=ids.to(self.model.device), attention_mask=mask).last_hidden_state.float()
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(
                f"{self.path}: {len(places)} texts of up to {longest:,} tokens at once don't fit into the memory of "
                f"{self.model.device}. Lower `batch_size`."
            ) from error
        sums = states.masked_fill(mask[..., None] == 0, 0).sum(1)
        means = (sums / mask.sum(1, keepdim=True)).cpu().numpy()
        return list(zip(places, means, strict=True))

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return tokenizer_of(self.path, OWN_CODE)

    @cached_property
    def model(self) -> Any:
        """The model, or its encoder."""
        from transformers import AutoModel
        from transformers.utils import logging

        untyped: Any = logging
        verbosity = untyped.get_verbosity()
        untyped.set_verbosity_error()  # it would list the head, which a model of hidden states has no use for
        try:
            model, missing, _ = model_of(AutoModel, self.path, EXPECTED, placed(self.device, self.dtype), OWN_CODE)
        finally:
            untyped.set_verbosity(verbosity)
        if lacking := [name for name in missing if not name.startswith("pooler.")]:  # which isn't used
            raise CheckpointError(listing(f"{self.path} lacks weights", [f"no {name}" for name in lacking]))
        return model.get_encoder() if model.config.is_encoder_decoder else model

    @cached_property
    def most(self) -> int:
        """The tokens that are read of a text at most."""
        return min(self.max_length, self.tokenizer.model_max_length, context_of(self.model) or self.max_length)
