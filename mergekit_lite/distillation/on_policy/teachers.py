"""Teachers scoring the student's answers: its very tokens, or the same text in tokens of their own.

A teacher has the student's tokens where both vocabularies are the same but for added tokens, and both templates open
thoughts alike. It then reads the drawn tokens after its own prompt (its template, its ``system``); where its turns end
with another token than the student's, that token ends the answer. Any other teacher reads the text as its template
writes it, and its log-probabilities are summed over the groups of tokens that consume the same bytes
(``alignment/groups.py``); the ends of the turn meet as one group, and tokens of no group learn nothing.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

import numpy as np

from mergekit_lite.answers.likelihood import batches
from mergekit_lite.answers.loading import causal_model, context_of, placed
from mergekit_lite.answers.rows import Prompt, with_system
from mergekit_lite.answers.template import PROBE, QUESTION, ChatTemplate, TemplateError, Tokens
from mergekit_lite.distillation.alignment.groups import groups
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.on_policy.answers import OwnAnswer, rounded
from mergekit_lite.distillation.recipe.schema import RecipeTeacher
from mergekit_lite.distillation.training.model import tokenizer_of

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

    from mergekit_lite.distillation.reporter import Advance

UNKNOWN = "−∞ or NaN for a token"


class Reading(NamedTuple):
    """What a teacher reads of an answer: its tokens, and how they meet the student's."""

    tokens: Tokens
    student: tuple[int, ...] | None = None  # the group of each of the student's tokens; None: they are the same tokens
    teacher: npt.NDArray[np.int64] | None = None  # of each of the teacher's
    groups: int = 0


class Scorer(Protocol):
    """Gives log-probabilities of given tokens."""

    def why_not(self, row: Tokens) -> str | None:
        """Return why a row can't be scored; None where it can."""

    def score(self, rows: Sequence[Tokens]) -> Iterator[list[tuple[int, Sequence[float]]]]:
        """Yield the places of rows with the log p of each token of their responses, as they come.

        Raises:
            RunError: some can't be had; those that came before are good.
        """


@dataclass(frozen=True)
class Teacher:
    """A teacher, and how it reads what the student says."""

    settings: RecipeTeacher
    template: ChatTemplate
    student: ChatTemplate
    scorer: Scorer

    @property
    def name(self) -> str:
        """Its name in the recipe."""
        return self.settings.name

    def scored(self, answers: Sequence[tuple[Prompt, OwnAnswer]], advance: Advance) -> Iterator[list[dict[str, Any]]]:
        """Yield the rows of answers, as they come: scored, or with the reason why not.

        Raises:
            RunError: the scores can't be had.
        """
        readings: list[tuple[OwnAnswer, Reading]] = []
        refused = []
        for prompt, answer in answers:
            reading = self.reading(prompt, answer)
            why = reading if isinstance(reading, str) else self.scorer.why_not(reading.tokens)
            if why is None and isinstance(reading, Reading):
                readings.append((answer, reading))
            else:
                refused.append({**_keyed(answer), "why": why})
        yield refused
        advance(len(refused))
        for scores in self.scorer.score([reading.tokens for _, reading in readings]):
            yield [_row(*readings[place], log_probs) for place, log_probs in scores]
            advance(len(scores))

    def reading(self, prompt: Prompt, answer: OwnAnswer) -> Reading | str:
        """Return what the teacher reads of an answer, or why it can't."""
        messages = with_system(prompt.messages, self.settings.system)
        if not answer.tokens:
            return "it is empty"
        try:
            if self.shares_tokens and self._shared.issuperset(answer.tokens):
                return Reading(Tokens(self.template.prompt(messages), self._ended(answer.tokens)))
            tokens = self.template.tokens(messages, answer.text, cut=answer.cut)
        except TemplateError as error:
            return str(error)
        reasons: Counter[str] = Counter()
        ends = [
            response_ends(template.tokenizer, ids, answer.text, reasons=reasons)
            for template, ids in ((self.student, answer.tokens), (self.template, tokens.response))
        ]
        if ends[0] is None or ends[1] is None:
            return next(iter(reasons))
        met = groups(ends[0], ends[1])
        if not met.count:
            return "it has no text in common with the teacher's"
        return Reading(tokens, tuple(met.student.tolist()), met.teacher, met.count)

    @cached_property
    def shares_tokens(self) -> bool:
        """Whether the student's tokens are the teacher's, but for added ones."""
        own = frozenset(self.student.tokenizer.get_vocab().values())
        return (
            own - self._shared <= added_ids(self.student.tokenizer)
            and self.student.opens_thoughts == self.template.opens_thoughts
        )

    @cached_property
    def _shared(self) -> frozenset[int]:
        """The ids that are the same token in both, and the student's end of turn, which is made the teacher's."""
        other = self.template.tokenizer.get_vocab()
        same = (number for token, number in self.student.tokenizer.get_vocab().items() if other.get(token) == number)
        return frozenset({*same, self._ends[0]})

    @cached_property
    def _ends(self) -> tuple[int, int]:
        """The tokens that end the student's turn and the teacher's."""
        student, teacher = (each.tokens(QUESTION, PROBE).response[-1] for each in (self.student, self.template))
        return student, teacher

    def _ended(self, tokens: tuple[int, ...]) -> tuple[int, ...]:
        student, teacher = self._ends
        return (*tokens[:-1], teacher) if tokens[-1] == student else tokens


@dataclass(frozen=True)
class LocalScorer:
    """A teacher in this process. Its model is loaded when it is first needed, and stays."""

    settings: RecipeTeacher

    @cached_property
    def model(self) -> Any:
        """The model, in evaluation mode on its device."""
        from mergekit_lite.answers.logprobs import check_head

        model = causal_model(self.settings.model, placed(self.settings.device, self.settings.dtype))
        check_head(model)
        return model

    def why_not(self, row: Tokens) -> str | None:
        """Return why a row can't be scored: it is longer than the model takes."""
        most = context_of(self.model)
        size = len(row.prompt) + len(row.response)
        return f"it takes {most:,} tokens" if most is not None and size > most else None

    def score(self, rows: Sequence[Tokens]) -> Iterator[list[tuple[int, Sequence[float]]]]:
        """Yield the log-probabilities batch by batch, the longest rows first."""
        import torch

        from mergekit_lite.answers.logprobs import padded, response_log_probs

        for places in batches(rows, self.settings.batch_size):
            batch = padded([rows[place] for place in places], device=self.model.device)
            with torch.inference_mode():
                found = response_log_probs(self.model, batch)
            each = torch.split(found.tokens.cpu(), found.lengths.tolist())
            yield [(place, values.tolist()) for place, values in zip(places, each, strict=True)]


def teachers_of(settings: Sequence[RecipeTeacher], student: ChatTemplate) -> list[Teacher]:
    """Return the teachers of a recipe, for a student with this template."""
    return [Teacher(each, ChatTemplate(tokenizer_of(each.model)), student, scorer_of(each)) for each in settings]


def scorer_of(settings: RecipeTeacher) -> Scorer:
    """Return what scores for a teacher."""
    return LocalScorer(settings)


def added_ids(tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the ids of tokens that were added to a vocabulary: special ones, mostly."""
    return frozenset({*tokenizer.all_special_ids, *tokenizer.added_tokens_decoder})


def _keyed(answer: OwnAnswer) -> dict[str, Any]:
    return {"prompt": answer.key.prompt, "index": answer.key.number}


def _row(answer: OwnAnswer, reading: Reading, log_probs: Sequence[float]) -> dict[str, Any]:
    """Return the row of a scored answer: log p of its tokens, or of their groups."""
    row = _keyed(answer)
    if not all(map(math.isfinite, log_probs)):
        return {**row, "why": UNKNOWN}
    if reading.student is None or reading.teacher is None:
        return {**row, "log_probs": rounded(log_probs)}
    inside = reading.teacher >= 0
    sums = np.bincount(reading.teacher[inside], np.asarray(log_probs)[inside], minlength=reading.groups)
    return {**row, "log_probs": rounded(sums), "groups": list(reading.student)}
