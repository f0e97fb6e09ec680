"""What a distance to a teacher is: a function of a few figures of the student's distributions, and its registration.

A distance never needs all logits at once. It is a generator: it yields what it asks of the student's distributions at
each of R positions (``Ask``), is sent the answer (``Student``), and returns the loss of each of G groups. Who drives it
computes the answer: ``Distance.__call__`` from logits, by plain operations in their dtype; ``training/distances.py``
chunk by chunk, by one pass over the logits.

p(v) is the teacher's distribution, q(v) the student's, both at positions where they have read the same bytes. A group
holds the student's tokens r₁ … r_n and the teacher's t₁ … t_m of the same bytes; both distributions at r₁ and t₁ are of
what follows the same text, so distances that compare distributions compare those, or chains of them that say so. The
loss of a group without anything to compare is 0. The published losses are means over the groups; FuseLLM's is
one over the student's tokens (``by_token``).
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any, Literal

import torch
from torch import Tensor

from mergekit_lite.answers.logprobs import PARTS
from mergekit_lite.distillation.objectives.options import checked, defaults
from mergekit_lite.distillation.objectives.targets import Targets


@dataclass(frozen=True)
class Columns:
    """A sparse matrix A, tokens of the student × columns, as its n entries.

    Attributes:
        tokens: (n,) int64; the student's tokens.
        columns: (n,) int64.
        weights: (n,) floating.
        count: C, the number of columns.
        temperature: T; the columns are of softmax(z / T), z the student's logits.
    """

    tokens: Tensor
    columns: Tensor
    weights: Tensor
    count: int
    temperature: float = 1.0

    @cached_property
    def used(self) -> Tensor:
        """(n',) int64, ascending; the tokens that have an entry."""
        found: Tensor = torch.unique(self.tokens)
        return found

    def product(self, q: Tensor) -> Tensor:
        """Return q A (R, C) of probabilities (R, n') of the tokens in ``used``."""
        if self.count == 1:  # a sum of probabilities
            return q @ self._dense.to(q.dtype)
        columns: Tensor = torch.sparse.mm(self._matrices[0].to(q.dtype), q.T)
        return columns.T

    def turned_product(self, gradient: Tensor) -> Tensor:
        """Return g Aᵀ (R, n') of a gradient (R, C)."""
        if self.count == 1:
            return gradient @ self._dense.T.to(gradient.dtype)
        rows: Tensor = torch.sparse.mm(self._matrices[1].to(gradient.dtype), gradient.T.contiguous())
        return rows.T

    @cached_property
    def _dense(self) -> Tensor:
        return self._matrices[1].to_dense()

    @cached_property
    def _matrices(self) -> tuple[Tensor, Tensor]:
        """Aᵀ and A of the tokens in ``used``, in compressed rows."""
        places = torch.stack([self.columns, torch.searchsorted(self.used, self.tokens)])
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse", UserWarning)  # "in beta state": what is used of it is tested
            turned = torch.sparse_coo_tensor(places, self.weights, (self.count, len(self.used))).coalesce()
            return turned.to_sparse_csr(), turned.T.coalesce().to_sparse_csr()


@dataclass(frozen=True)
class Ask:
    """What a distance asks of the student's distributions at each of R positions.

    Attributes:
        ids: (R, K) int64; tokens whose log q is wanted, distinct in a row; −1 for none.
        largest: k, the number of the student's likeliest tokens whose log q is wanted.
        among: (V,) bool; the tokens that these are of; all by default. None of them may be in ``ids``.
        columns: A, for q A.
    """

    ids: Tensor | None = None
    largest: int = 0
    among: Tensor | None = None
    columns: Columns | None = None


@dataclass(frozen=True)
class Student:
    """The answer to an ``Ask``.

    Attributes:
        tokens: (R,) int64; the text in the student's tokens.
        log_probs: (R,); log q of these tokens.
        at: (R, K); log q of ``Ask.ids``, −inf at −1.
        rest: (R,); the log of the mass of all tokens that are neither in ``ids`` nor among the largest; −inf for none.
        largest: (R, k); log q, the likeliest first.
        columns: (R, C); q A.
    """

    tokens: Tensor
    log_probs: Tensor
    at: Tensor
    rest: Tensor
    largest: Tensor
    columns: Tensor


Steps = Generator[Ask, Student, Tensor]  # of a distance; it yields once
Vocabulary = Literal["same", "map", "projection", "any"]


@dataclass(frozen=True)
class Distance:
    """A distance by its name in recipes."""

    name: str  # of the function
    function: Callable[..., Steps]  # of Targets, what ``prepare`` returned, and keyword arguments
    formula: str  # the loss of a group
    source: str  # the paper, or what the formula is taken from
    when: str  # the case that the distance is good for
    vocabulary: Vocabulary  # same: the teacher's must be the student's; map: VocabularyMap, None if same; projection
    top: bool = True  # whether it needs the teacher's likeliest tokens, or only log p of the text
    # Makes, once for a batch, what the function takes for a vocabulary: of that, all of the batch's targets, the
    # student's number of tokens, and the options.
    prepare: Callable[..., Any] | None = None
    width: Callable[[Any], int] = lambda _: 0  # of that, the numbers at once of each position beside its logits
    # Of the options: whether a group counts in the mean as often as it has tokens of the student, instead of once.
    by_token: Callable[[Mapping[str, Any]], bool] = lambda _: False

    @property
    def defaults(self) -> dict[str, Any]:
        """The default values of the options."""
        return defaults(self.function)

    def options(self, given: Mapping[str, Any], problems: list[str]) -> dict[str, Any]:
        """Return all keyword arguments of ``function``; wrong names and values become ``problems``."""
        return checked(f"objective {self.name}", self.function, given, problems)

    def prepared(self, vocabulary: Any, targets: Targets, size: int, options: Mapping[str, Any]) -> Any:
        """Return what ``function`` takes for a vocabulary: the same for all parts of a batch.

        Args:
            vocabulary: a ``VocabularyMap``, a ``Projection`` or None, as ``vocabulary`` of this distance says.
            targets: of the whole batch.
            size: V, the number of the student's logits.
            options: of the function.

        Raises:
            ValueError: the distance needs the teacher's likeliest tokens, and there are none; or it needs another
                vocabulary.
        """
        if self.top and not targets.top_ids.shape[1]:
            raise ValueError(f"{self.name} needs the teacher's likeliest tokens, and the targets have none")
        if self.vocabulary == "projection" and vocabulary is None:
            raise ValueError(f"{self.name} needs a projection between the vocabularies")
        if self.vocabulary == "same" and vocabulary is not None:
            raise ValueError(f"{self.name} needs a teacher with the student's own vocabulary")
        return self.prepare(vocabulary, targets, size, **options) if self.prepare else vocabulary

    def __call__(
        self, logits: Tensor, tokens: Tensor, targets: Targets, vocabulary: Any = None, **options: Any
    ) -> Tensor:
        """Return the loss (G,) of each group, from all logits at once.

        Args:
            logits: (R, V) floating; of the student, those that predict its tokens.
            tokens: (R,) int64.
            targets: of a teacher.
            vocabulary: as of ``prepared``.
            options: of the function.

        Raises:
            ValueError: as of ``prepared``.
        """
        prepared = self.prepared(vocabulary, targets, logits.shape[1], self.defaults | options)
        steps = self.function(targets, prepared, **options)
        return finish(steps, answered(next(steps), logits, tokens))


REGISTERED: dict[str, Distance] = {}  # ``distances.py`` shows it, when all families are there


def distance(
    formula: str, source: str, when: str, vocabulary: Vocabulary, **more: Any
) -> Callable[[Callable[..., Steps]], Callable[..., Steps]]:
    """Register a distance under its function's name; all arguments are attributes of ``Distance``."""

    def register(function: Callable[..., Steps]) -> Callable[..., Steps]:
        name = function.__name__
        REGISTERED[name] = Distance(name, function, formula, source, when, vocabulary, **more)
        return function

    return register


def finish(steps: Steps, student: Student) -> Tensor:
    """Send the answer to a distance that has asked, and return its losses (G,)."""
    try:
        steps.send(student)
    except StopIteration as end:
        losses: Tensor = end.value
        return losses
    raise AssertionError("a distance asks once")


def answered(ask: Ask, logits: Tensor, tokens: Tensor) -> Student:
    """Return the answer to a distance from logits (R, V), in their dtype and with gradients."""
    log_q = logits.log_softmax(1)
    nothing = log_q[:, :0]
    listed = torch.zeros_like(logits, dtype=torch.bool)
    at = largest = columns = nothing
    if ask.ids is not None:
        at = picked(log_q, ask.ids)
        rows = (ask.ids >= 0).nonzero(as_tuple=True)
        listed[rows[0], ask.ids[rows]] = True
    if ask.largest:
        ids = likeliest(log_q.detach(), ask)
        largest = picked(log_q, ids)
        listed.scatter_(1, ids, True)
    if ask.columns is not None:
        q = (logits / ask.columns.temperature).softmax(1)
        entries = q[:, ask.columns.tokens] * ask.columns.weights.to(q.dtype)
        columns = q.new_zeros(len(q), ask.columns.count).index_add(1, ask.columns.columns, entries)
    rest = log_q.masked_fill(listed, -torch.inf).logsumexp(1)
    return Student(tokens, log_q.gather(1, tokens[:, None])[:, 0], at, rest, largest, columns)


def picked(log_q: Tensor, ids: Tensor) -> Tensor:
    """Return log q (R, K) of tokens, −inf where the id is −1."""
    return log_q.gather(1, ids.clamp(min=0)).masked_fill(ids < 0, -torch.inf)


def likeliest(scores: Tensor, ask: Ask) -> Tensor:
    """Return the ids (R, k) of the largest scores (R, V), which may be logits, of the tokens that are asked for."""
    if ask.among is None:
        return scores.topk(min(ask.largest, scores.shape[1]), dim=1).indices
    ids = ask.among.nonzero()[:, 0]
    found = [
        ids[part.index_select(1, ids).topk(min(ask.largest, len(ids)), dim=1).indices] for part in scores.chunk(PARTS)
    ]
    return torch.cat(found)
