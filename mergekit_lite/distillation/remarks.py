"""What is told of a source's answers: that they are all alike, cut, or thoughts alone."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from itertools import groupby
from typing import Any

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.rows import Answer, Key
from mergekit_lite.answers.thoughts import is_cut, parts_of
from mergekit_lite.distillation.recipe.schema import RecipeSource
from mergekit_lite.errors import counted

ENOUGH = 20  # prompts, of which nearly all have equal answers: then it is told
FEW = 3  # prompts that tell something at the end
NEARLY_ALL = 0.9
HINT = (
    "the server may ignore `temperature` or draw with one seed (transformers serve needs `do_sample: true` in the "
    "model's generation_config.json)"
)


class Likeness:
    """How alike a source's answers to a prompt are, as they come. Memory has digests of the prompts in work."""

    def __init__(self, source: RecipeSource, tasks: Sequence[Task], missing: Iterable[Key]):
        """Prompts are counted whose answers are all still ``missing`` at the start."""
        self.source = source
        wanted = Counter(key.prompt for key in missing)
        numbers = Counter(task.prompt.id for task in tasks)
        self._left = {prompt: number for prompt, number in wanted.items() if number == numbers[prompt] > 1}
        self._texts: dict[str, set[int]] = {}
        self.complete = self.alike = 0  # prompts
        self._told = source.sampling.temperature == 0

    def remark(self, answer: Answer) -> str | None:
        """Take an answer; return what is to be told now, once."""
        prompt = answer.prompt
        if self._told or prompt not in self._left:
            return None
        self._texts.setdefault(prompt, set()).add(hash(parts_of(answer.as_row()).whole))
        self._left[prompt] -= 1
        if self._left[prompt]:
            return None
        self.complete += 1
        self.alike += len(self._texts.pop(prompt)) == 1
        if self.complete < ENOUGH or self.alike < NEARLY_ALL * self.complete:
            return None
        self._told = True
        return _alike(self.source, self.alike, self.complete)


def remarks(source: RecipeSource, rows: Iterable[Mapping[str, Any]]) -> Iterator[str]:
    """Yield what is to be told of all answers of a source; the rows of a prompt are neighbours."""
    answers = thoughts = cut = complete = alike = 0
    for _, group in groupby(rows, lambda row: row["prompt"]):
        said: list[str] = []
        for row in group:
            parts = parts_of(row)
            was_cut = is_cut(row)
            spent = was_cut and not parts.text.strip()
            thoughts, cut = thoughts + spent, cut + (was_cut and not spent)
            answers += 1
            said += [parts.whole] if parts.text.strip() else []  # thoughts that differ are drawn, too
        complete += len(said) > 1
        alike += len(said) > 1 and len(set(said)) == 1
    limit = (
        f"max_tokens ({source.sampling.max_tokens:,})" if source.aggregate is None else "the last model's max_tokens"
    )
    if thoughts:
        spent_on = f"{counted(thoughts, 'answer')} of {answers:,} spent all tokens on thoughts and said nothing"
        yield f"{source.name}: {spent_on}: raise {limit}, or turn thinking off"
    if cut:
        yield f"{source.name}: {counted(cut, 'answer')} of {answers:,} cut at {limit}"
    draws = source.aggregate is None and source.sampling.temperature > 0
    if draws and complete >= FEW and alike >= NEARLY_ALL * complete:
        yield _alike(source, alike, complete)


def _alike(source: RecipeSource, alike: int, complete: int) -> str:
    hint = f": {HINT}" if source.is_served else ""
    prompts = f"{alike:,} of {counted(complete, 'prompt')}"
    return f"{source.name}: {prompts} got identical answers at temperature {source.sampling.temperature:g}{hint}"
