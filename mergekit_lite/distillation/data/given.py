"""Data that are given, read as examples: what the stages take from them, and what is left out and why."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from typing import NamedTuple

from mergekit_lite.answers.data_files import Data, rows_of
from mergekit_lite.answers.prompts import LoadedPrompts, digest_of
from mergekit_lite.answers.rows import Answer, Key, Prompt
from mergekit_lite.distillation.data.examples import Example, example_of
from mergekit_lite.distillation.recipe.schema import GivenAnswers, RecipeSource
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.errors import counted, listing

SHOWN = 5  # rows left out, in a warning
OTHER = "to other prompts than the recipe's"


class GivenAnswer(NamedTuple):
    """An answer of the data, with the score that they have of it."""

    answer: Answer
    score: float | None
    scorer: str | None  # takes the score


@dataclass
class Left:
    """What was left out of data, and why."""

    problems: list[str] = field(default_factory=list)  # with file and line
    counts: Counter[str] = field(default_factory=Counter)

    def tell(self, what: str, reporter: Reporter) -> None:
        """Report all of it."""
        if self.problems:
            title = f"{what}: {counted(len(self.problems), 'row')} of the data left out"
            reporter.warn(listing(title, self.problems, SHOWN))
        for why, number in self.counts.items():
            reporter.line(f"{what}: {number:,} left out: {why}")


def examples(data: Data, problems: list[str], domain: str = "") -> Iterator[tuple[Example, str]]:
    """Yield the examples of data, each with its place; rows that are none become problems.

    Raises:
        UsageError: the data can't be read.
    """
    for row, place in rows_of(data, problems):
        try:
            yield example_of(row, domain), place
        except ValueError as error:
            problems.append(f"{place}: {error}")


def add_prompts(sources: Iterable[RecipeSource], loaded: LoadedPrompts) -> None:
    """Add the prompts of all answers that are given."""
    for origin in dict.fromkeys(origin for source in sources for origin in _origins(source)):
        for example, place in examples(origin, loaded.problems, origin.domain):
            loaded.add(example.prompt, place)


def _origins(source: RecipeSource) -> Iterator[GivenAnswers]:
    """Yield where the answers come from, without what differs between the sources that share it."""
    for given in source.answers:
        yield given.model_copy(update={"model": None, "scorer": None})


def given_answers(source: RecipeSource, prompts: Iterable[Prompt], left: Left) -> Iterator[GivenAnswer]:
    """Yield the answers of a source that are given to the prompts, numbered in the order of the data."""
    by_digest = {digest_of(prompt.messages): prompt for prompt in prompts if source.answers_to(prompt.domain)}
    numbers: Counter[str] = Counter()  # of answers, by prompt
    for origin in source.answers:
        for example, _ in examples(origin, left.problems, origin.domain):
            prompt = by_digest.get(digest_of(example.prompt.messages))
            for given in example.all:
                if origin.model is not None and given.model != origin.model:
                    left.counts["of other models"] += 1
                elif prompt is None:
                    left.counts[OTHER] += 1
                else:
                    finish = "stop" if given.ended else "length"
                    answer = Answer(prompt.id, source.name, numbers[prompt.id], given.text, finish)
                    numbers[prompt.id] += 1
                    yield GivenAnswer(answer, given.score, origin.scorer)


def keys_given(source: RecipeSource, prompts: Iterable[Prompt]) -> list[Key]:
    """Return the keys of the answers that are given."""
    return [given.answer.key for given in given_answers(source, prompts, Left())]
