"""Candidates measured by what they answer: every candidate is asked the same prompts with the same seeds.

Answers come in batches. After each chunk of them they are scored. Then the baseline is put into the model to say how
likely it finds some of them, and the model before alignment where their log-ratio is a score; and the candidate is put
back and goes on. So a killed search loses no more than a chunk, and no second model lies in memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Protocol

from mergekit_lite.answers.asking import Respondent, Task
from mergekit_lite.answers.likelihood import LogProb
from mergekit_lite.answers.rows import Answer, Key, Prompt, seed_of, user_text
from mergekit_lite.answers.scoring.contract import Judged, Scorer
from mergekit_lite.answers.template import TemplateError, Tokens
from mergekit_lite.boosting.candidates.candidate import Numbers, Row
from mergekit_lite.boosting.measure.resident_model import Stand
from mergekit_lite.boosting.measure.scores import LOG_RATIO
from mergekit_lite.errors import RunError

CHUNK = 64  # answers: setting weights twice takes no share of making so many
AT_ONCE = 32  # answers read side by side, at most: as fast as more of them, and of like length
SAMPLE = 128  # answers that tell a candidate's distance from the baseline, to about a tenth of it


class Voice(Protocol):
    """Lets candidates speak."""

    def speaking(self, numbers: Numbers) -> Respondent:
        """What answers for a candidate until another one is asked for."""


@dataclass(frozen=True)
class Likelihoods:
    """How likely the model on the stand finds answers.

    Attributes:
        stand: the model.
        batch_size: answers that are read at once.
        weak: the model before alignment, where the log-ratio to it is a score.
        sample: so many of a candidate's answers, the first in the common order, are compared with the baseline. The
            order is drawn by chance, so they stand for all; and they are the same items for all candidates.
    """

    stand: Stand
    batch_size: int = 8
    weak: Numbers | None = None
    sample: int = SAMPLE

    def of(
        self, numbers: Numbers, judged: Sequence[Judged], whole: Sequence[bool], sampled: Sequence[bool]
    ) -> list[Row]:
        """Of each answer ``log_prob`` and ``aligned_log_prob``, and the value of the log-ratio; where there are any.

        ``whole`` tells which answers the model ended by itself, ``sampled`` which are compared with the baseline. The
        candidate is on the stand before and after.
        """
        baseline, none = self.stand.family.baseline, [None] * len(judged)
        compared = [chosen and numbers != baseline for chosen in sampled]
        if self.weak is None and not any(compared):
            return [Row() for _ in judged]
        tokens = [
            self._tokens(each, ended) if chosen or self.weak is not None else None
            for each, ended, chosen in zip(judged, whole, compared, strict=True)
        ]
        few = [row if chosen else None for row, chosen in zip(tokens, compared, strict=True)]
        own = self._under(numbers, numbers, few)
        aligned = self._under(baseline, numbers, tokens)
        weak = none if self.weak is None else self._under(self.weak, numbers, tokens)
        self.stand.put(numbers, numbers)
        return [self._row(*each) for each in zip(own, aligned, weak, strict=True)]

    def _row(self, own: LogProb | None, aligned: LogProb | None, weak: LogProb | None) -> Row:
        row = Row()
        if own is not None and aligned is not None and _finite(own) and _finite(aligned):
            row["log_prob"], row["aligned_log_prob"] = own.total, aligned.total
        if self.weak is not None:
            known = aligned is not None and weak is not None and _finite(aligned) and _finite(weak)
            row["values"] = {LOG_RATIO: aligned.total - weak.total if known and aligned and weak else None}
        return row

    def _under(self, numbers: Numbers, purpose: Numbers, tokens: Sequence[Tokens | None]) -> list[LogProb | None]:
        self.stand.put(numbers, purpose)
        found = iter(self.stand.log_probs([row for row in tokens if row is not None], min(self.batch_size, AT_ONCE)))
        return [next(found) if row is not None else None for row in tokens]

    def _tokens(self, judged: Judged, ended: bool) -> Tokens | None:
        try:
            prompt, response = self.stand.template.tokens(judged.prompt.messages, judged.answer)
        except TemplateError:
            return None
        response = response if ended else response[:-1]  # an answer that was cut has not ended its turn
        most = self.stand.context
        fits = most is None or len(prompt) + len(response) <= most
        return Tokens(prompt, response) if response and fits else None


@dataclass
class Answering:
    """Measures candidates by their answers.

    Attributes:
        prompts: what is asked.
        samples: answers to each.
        seed: of what is drawn.
        voice: who answers.
        scorers: of the answers.
        likelihoods: of the answers under candidate and baseline; None where no model is in this process.
        chunk: answers that are scored at once, no fewer than are made at once.
    """

    prompts: Sequence[Prompt]
    samples: int
    seed: int
    voice: Voice
    scorers: Sequence[Scorer]
    likelihoods: Likelihoods | None = None
    chunk: int = CHUNK

    @property
    def items(self) -> list[str]:
        """One for each answer that is asked for."""
        return list(self._tasks)

    @property
    def asked(self) -> dict[str, str]:
        """What the user said last, by item."""
        return {item: user_text(task.prompt.messages) for item, task in self._tasks.items()}

    @property
    def names(self) -> list[str]:
        """Of the scores that each answer gets."""
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

    def rows(self, numbers: Numbers, items: Sequence[str], wanted: frozenset[str]) -> Iterator[Row]:
        """The rows of the wanted items; one without an answer has no verdicts.

        Raises:
            RunError: the candidate can't be asked any more.
        """
        tasks = [self._tasks[item] for item in items]
        item_of = {self._tasks[item].key: item for item in items}
        respondent = self.voice.speaking(numbers)
        missing = set(wanted)
        keys = frozenset(self._tasks[item].key for item in wanted)
        sampled = frozenset(items[: self.likelihoods.sample]) if self.likelihoods is not None else frozenset()
        with closing(respondent.answers(tasks, keys)) as answers:  # type: ignore[type-var]  # a generator: see it end
            while chunk := list(islice(answers, self.chunk)):
                for row in self._rows(numbers, chunk, item_of, sampled):
                    missing.discard(row["item"])
                    yield row
        if missing and respondent.troubles.stopped:
            raise RunError(f"The candidate was asked no more. {respondent.troubles.stopped}")
        for item in sorted(missing):
            yield Row(item=item, values=dict.fromkeys(self.names))

    def _rows(
        self, numbers: Numbers, answers: Sequence[Answer], item_of: dict[Key, str], sampled: frozenset[str]
    ) -> Iterator[Row]:
        items = [item_of[answer.key] for answer in answers]
        judged = [Judged(self._tasks[item].prompt, answer.text) for item, answer in zip(items, answers, strict=True)]
        scores = {scorer.name: scorer.score(judged) for scorer in self.scorers}
        likely = [Row() for _ in answers]
        if self.likelihoods is not None:
            whole = [answer.finish == "stop" for answer in answers]
            likely = self.likelihoods.of(numbers, judged, whole, [item in sampled for item in items])
        for place, (item, answer, row) in enumerate(zip(items, answers, likely, strict=True)):
            values = {name: found[place].value for name, found in scores.items()} | row.get("values", {})
            row |= Row(item=item, values=values, text=answer.text, finish=answer.finish)
            if answer.tokens is not None:
                row["tokens"] = answer.tokens
            yield row


def _finite(found: LogProb) -> bool:
    return math.isfinite(found.total)
