"""Candidates measured by what they answer: every candidate is asked the same prompts with the same seeds.

Answers are scored a chunk at a time. Then the baseline is loaded to compute how likely it finds some of them, and the
model before alignment where the log-ratio is a score; then the candidate is loaded again and goes on. So a killed
search loses no more than a chunk, and there is never a second model in memory.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.likelihood import LogProb
from mergekit_lite.answers.rows import Answer, Key, Prompt, seed_of, user_text
from mergekit_lite.answers.scoring.scorer import Judged, Scorer
from mergekit_lite.answers.template import Tokens
from mergekit_lite.answers.thoughts import parts_of
from mergekit_lite.boosting.candidates.candidate import NONE, ItemRow, Params, Rivals
from mergekit_lite.boosting.measure.generators import LocalGenerator, ServerGenerator
from mergekit_lite.boosting.measure.resident_model import ResidentModel
from mergekit_lite.boosting.measure.scores import LOG_RATIO
from mergekit_lite.errors import RunError

ANSWERS_AT_ONCE = 64  # answers; swapping weights twice costs little next to generating them
AT_ONCE = 32  # answers in a batch that is read, at most: larger batches are no faster, and mix lengths
SAMPLE = 128  # answers that give a candidate's distance from the baseline to about a tenth of it


@dataclass(frozen=True)
class Likelihoods:
    """Computes how likely candidate, baseline and the model before alignment find answers."""

    resident: ResidentModel  # the model
    batch_size: int = 8  # answers that are read at once
    weak: Params | None = None  # params of the model before alignment, where the log-ratio to it is a score
    sample: int = SAMPLE  # answers compared with the baseline: the first in the common, random order

    def of(
        self, params: Params, judged: Sequence[Judged], whole: Sequence[bool], sampled: Sequence[bool]
    ) -> list[ItemRow]:
        """Return rows with ``log_prob``, ``aligned_log_prob`` and the log-ratio of each answer, where they are known.

        The candidate is in the model before and after.

        Args:
            params: the candidate's.
            judged: its answers.
            whole: which answers the model ended by itself.
            sampled: which answers are compared with the baseline.
        """
        baseline, none = self.resident.family.baseline, [None] * len(judged)
        compared = [chosen and params != baseline for chosen in sampled]
        if self.weak is None and not any(compared):
            return [ItemRow() for _ in judged]
        tokens = [
            self.resident.tokens(each.prompt.messages, each.answer, ended) if chosen or self.weak is not None else None
            for each, ended, chosen in zip(judged, whole, compared, strict=True)
        ]
        few = [row if chosen else None for row, chosen in zip(tokens, compared, strict=True)]
        own = self._under(params, params, few)
        aligned = self._under(baseline, params, tokens)
        weak = none if self.weak is None else self._under(self.weak, params, tokens)
        self.resident.load(params, params)
        return [self._row(*each) for each in zip(own, aligned, weak, strict=True)]

    def _row(self, own: LogProb | None, aligned: LogProb | None, weak: LogProb | None) -> ItemRow:
        row = ItemRow()
        if own is not None and aligned is not None and own.is_finite and aligned.is_finite:
            row["log_prob"], row["aligned_log_prob"] = own.total, aligned.total
        if self.weak is not None:
            row["values"] = {LOG_RATIO: None}
            if aligned is not None and weak is not None and aligned.is_finite and weak.is_finite:
                row["values"] = {LOG_RATIO: aligned.total - weak.total}
        return row

    def _under(self, params: Params, purpose: Params, tokens: Sequence[Tokens | None]) -> list[LogProb | None]:
        self.resident.load(params, purpose)
        read = iter(self.resident.log_probs([row for row in tokens if row is not None], min(self.batch_size, AT_ONCE)))
        return [next(read) if row is not None else None for row in tokens]


@dataclass
class Answering:
    """Measures candidates by their answers."""

    prompts: Sequence[Prompt]  # what is asked
    samples: int  # answers to each
    seed: int  # of the draws
    generator: LocalGenerator | ServerGenerator  # of the answers
    scorers: Sequence[Scorer]  # of the answers
    likelihoods: Likelihoods | None = None  # of the answers; None where no model is in this process
    chunk: int = ANSWERS_AT_ONCE  # answers that are scored at once, no fewer than are generated at once
    at_once: int | None = None  # answers that one worker is asked for at once; None for all
    baseline: Params | None = None  # whose answers a score compares with; None where none does

    @property
    def items(self) -> list[str]:
        """One item for each answer to ask for."""
        return list(self._tasks)

    @property
    def asked(self) -> dict[str, str]:
        """The user's last message, by item."""
        return {item: user_text(task.prompt.messages) for item, task in self._tasks.items()}

    @property
    def names(self) -> list[str]:
        """The scores that each answer gets."""
        ratio = [LOG_RATIO] if self.likelihoods is not None and self.likelihoods.weak is not None else []
        return [scorer.name for scorer in self.scorers] + ratio

    @cached_property
    def _tasks(self) -> dict[str, Task]:
        tasks = [
            Task(prompt, index, seed_of(self.seed, prompt.id, index))
            for prompt in self.prompts
            for index in range(self.samples)
        ]
        return {task.prompt.id if self.samples == 1 else f"{task.prompt.id}#{task.index}": task for task in tasks}

    def rows(
        self, params: Params, items: Sequence[str], wanted: frozenset[str], rivals: Rivals = NONE
    ) -> Iterator[ItemRow]:
        """Yield the rows of the wanted items; a row without an answer has no scores.

        Raises:
            RunError: the candidate has stopped answering.
        """
        tasks = [self._tasks[item] for item in items]
        item_of = {self._tasks[item].key: item for item in items}
        respondent = self.generator.for_candidate(params)
        missing = set(wanted)
        keys = frozenset(self._tasks[item].key for item in wanted)
        sampled = frozenset(items[: self.likelihoods.sample]) if self.likelihoods is not None else frozenset()
        with closing(respondent.answers(tasks, keys)) as answers:  # type: ignore[type-var]  # a generator: see it end
            while chunk := list(islice(answers, self.chunk)):
                for row in self._rows(params, chunk, item_of, sampled, rivals):
                    missing.discard(row["item"])
                    yield row
        if missing and respondent.failures.stopped:
            raise RunError(f"The candidate was asked no more. {respondent.failures.stopped}")
        for item in sorted(missing):
            yield ItemRow(item=item, values=dict.fromkeys(self.names))

    def _rows(
        self,
        params: Params,
        answers: Sequence[Answer],
        item_of: dict[Key, str],
        sampled: frozenset[str],
        rivals: Rivals,
    ) -> Iterator[ItemRow]:
        items = [item_of[answer.key] for answer in answers]
        judged = [Judged(self._tasks[item].prompt, answer.text) for item, answer in zip(items, answers, strict=True)]
        without = [
            self._to_score(params, item, parts_of(answer.as_row()).answer, rivals)
            for item, answer in zip(items, answers, strict=True)
        ]
        scores = {scorer.name: scorer.score(without) for scorer in self.scorers}
        likely = [ItemRow() for _ in answers]
        if self.likelihoods is not None:
            whole = [answer.finish == "stop" for answer in answers]
            likely = self.likelihoods.of(params, judged, whole, [item in sampled for item in items])
        for place, (item, answer, row) in enumerate(zip(items, answers, likely, strict=True)):
            values = {name: given[place].value for name, given in scores.items()} | row.get("values", {})
            row |= ItemRow(item=item, values=values, text=_whole(answer), finish=answer.finish)
            if answer.tokens is not None:
                row["tokens"] = answer.tokens
            yield row

    def _to_score(self, params: Params, item: str, text: str, rivals: Rivals) -> Judged:
        """Return an answer as scorers get it. Where one compares with the baseline's, that is its own rival too."""
        prompt = self._tasks[item].prompt
        if self.baseline is None:
            return Judged(prompt, text)
        met = text if params == self.baseline else rivals.get(item)
        return Judged(prompt, text, () if met is None else (met,))


def _whole(answer: Answer) -> str:
    """Return all that the model wrote: thoughts that a server sent apart stand before the text, as in this process."""
    return answer.text if answer.thoughts is None else parts_of(answer.as_row()).whole
