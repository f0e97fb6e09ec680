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
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from mergekit_lite.answers.rows import Prompt, with_system
from mergekit_lite.answers.template import PROBE, QUESTION, ChatTemplate, TemplateError, Tokens
from mergekit_lite.distillation.alignment.groups import groups
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.on_policy.answers import OwnAnswer, rounded
from mergekit_lite.distillation.recipe.schema import RecipeTeacher
from mergekit_lite.distillation.teach import scorer_of
from mergekit_lite.distillation.teaching.scoring import Scorer
from mergekit_lite.distillation.training.model import tokenizer_of
from mergekit_lite.errors import RunError, counted

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
        left = len(readings)
        for place, said in self.scorer.score([reading.tokens for _, reading in readings]):
            yield [_row(*readings[place], said.log_probs.tolist())]
            left -= 1
            advance(1)
        if left:
            raise RunError(
                f"{self.name} gave no scores of {counted(left, 'answer')}: {self.scorer.why_missing}\nThe same command "
                "goes on and asks for what is missing."
            )

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


def teachers_of(settings: Sequence[RecipeTeacher], student: ChatTemplate) -> list[Teacher]:
    """Return the teachers of a recipe, for a student with this template."""
    made = []
    for each in settings:
        tokenizer = tokenizer_of(each.model)
        scorer = scorer_of(each.model_copy(update={"top": 0}), tokenizer)
        made.append(Teacher(each, ChatTemplate(tokenizer), student, scorer))
    return made


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
