"""The rows of SFT with what teachers say of their responses: matched by key, cut into groups, weighed.

A teacher's distributions are read from its file when a batch is laid out; what stays in memory of a row are the groups
of its tokens and the teacher's, four bytes a token each.
"""

from __future__ import annotations

from array import array
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
from torch import Tensor

from mergekit_lite.answers.template import ChatTemplate, LengthLimits
from mergekit_lite.distillation.alignment.groups import groups
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.objectives.distances import combined_weights
from mergekit_lite.distillation.objectives.targets import Targets
from mergekit_lite.distillation.recipe.schema import RecipeTeacher
from mergekit_lite.distillation.teaching.files import TaughtFile
from mergekit_lite.distillation.teaching.rows import TaughtRow, row_key
from mergekit_lite.distillation.training.rows import (
    Lesson,
    Part,
    TaughtSftRow,
    TokenRows,
    TrainingRow,
    UnfittedRow,
    messages_of,
    read,
)
from mergekit_lite.errors import UsageError, counted, listing

Combine = Literal["sum", "min_ce", "avg_ce"]


class TaughtBy(NamedTuple):
    """A teacher, and the file of what it says."""

    teacher: RecipeTeacher
    file: TaughtFile


def taught_rows(
    path: Path,
    template: ChatTemplate,
    limits: LengthLimits,
    teachers: Sequence[TaughtBy],
    combine: Combine,
    by_token: bool = False,
) -> TokenRows:
    """Return the rows of ``pairs/sft.jsonl`` that teachers teach, as tokens, each with its lesson.

    A row whose tokens can't be placed in its text, or that no teacher has, is left out and counted; one that a teacher
    of its domain lacks is told. ``by_token``: see ``Part``.

    Raises:
        UsageError: the file can't be read, or none of its rows can be trained on.
    """
    unplaced: Counter[str] = Counter()

    def tokenise(line: dict[str, Any]) -> list[UnfittedRow]:
        row = TaughtSftRow.model_validate(line)
        messages = messages_of(row.messages)
        tokens = template.tokens(messages, row.response, cut=row.cut)
        ends = response_ends(template.tokenizer, tokens.response, row.response, reasons=unplaced)
        if ends is None:
            return []
        lesson = Lesson(row_key(messages, row.response, cut=row.cut), row.domain, ends)
        return [UnfittedRow((tokens,), ("source",), lesson=lesson)]

    tokens = read(path, tokenise, template, limits)
    lacking: Counter[str] = Counter()
    taught = (_taught(each, teachers, combine, by_token, lacking) for each in tokens.rows)
    found = [row for row in taught if row is not None]
    tokens.counts["not aligned"] = unplaced.total()
    tokens.notes += [f"{counted(number, 'row')} not aligned: {why}." for why, number in unplaced.most_common()]
    tokens.counts["not taught"] = len(tokens.rows) - len(found)
    tokens.counts["kept"] = len(found)
    tokens.notes += [f"{each.teacher.name}: {note}." for each in teachers for note in each.file.notes]
    for name, number in lacking.items():
        missing = f"{name} has not scored {counted(number, 'row')} of its domains"
        tokens.notes.append(f"{missing}: such rows learn from the others alone.")
    if not found:
        names = ", ".join(each.teacher.name for each in teachers)
        reasons = [f"{counted(len(tokens.rows), 'row')} that {names} taught nothing of", "run the stage `teach` first"]
        raise UsageError(listing(f"No row of {path} can be trained on", reasons))
    tokens.rows = found
    return tokens


def _taught(
    row: TrainingRow, teachers: Sequence[TaughtBy], combine: Combine, by_token: bool, lacking: Counter[str]
) -> TrainingRow | None:
    """Return a row with the parts of those who teach it; None where nobody does."""
    lesson = row.lesson
    assert lesson is not None
    ends = lesson.ends[: len(row.answers[0])]  # a response may be cut by now
    there: list[tuple[int, TaughtRow]] = []
    for number, (teacher, file) in enumerate(teachers):
        if teacher.teaches(lesson.domain):
            said = file.get(lesson.key, likeliest=False)
            if said is None:
                lacking[teacher.name] += 1
            else:
                there.append((number, said))
    if not there:
        return None
    entropies = torch.tensor([[said.cross_entropy for _, said in there]], dtype=torch.float64)
    weights = combined_weights(entropies, combine)[0].tolist()
    parts = []
    for (number, said), weight in zip(there, weights, strict=True):
        if weight > 0:
            cut = groups(ends, said.ends)
            if not row.prompt:
                cut.student[:1] = -1  # nothing predicts the first token of a sequence
            parts.append(Part(number, _array(cut.student), _array(cut.teacher), cut.count, weight, by_token))
    if not any(part.groups for part in parts):
        return None
    return replace(row, lesson=replace(lesson, ends=array("i"), parts=tuple(parts)))


def _array(values: Any) -> array[int]:
    return array("i", np.asarray(values, np.int32).tobytes())


class LaidOut(NamedTuple):
    """What one teacher says of a batch, with the weight of each group (G,) float32."""

    teacher: int
    targets: Targets
    weights: Tensor


def laid_out(rows: Sequence[TrainingRow], teachers: Sequence[TaughtBy]) -> list[LaidOut]:
    """Return what each teacher that has a say in these rows says of them.

    The student's positions are in the order of a batch's ``states``: row by row, token by token, padded or packed.
    """
    found = (_of_teacher(rows, number, each.file) for number, each in enumerate(teachers))
    return [each for each in found if each is not None]


def _of_teacher(rows: Sequence[TrainingRow], teacher: int, file: TaughtFile) -> LaidOut | None:
    students: list[np.ndarray[Any, Any]] = []
    theirs: list[np.ndarray[Any, Any]] = []
    said: list[TaughtRow] = []
    weights: list[np.ndarray[Any, Any]] = []
    count = 0
    for row in rows:
        assert row.lesson is not None
        first = 0 if row.prompt else 1  # which has no position
        part = next((part for part in row.lesson.parts if part.teacher == teacher), None)
        if part is None:
            students.append(np.full(len(row.answers[0]) - first, -1, np.int64))
            continue
        students.append(_shifted(part.student_groups, count)[first:])
        theirs.append(_shifted(part.teacher_groups, count))
        weights.append(part.weight * part.counts)
        count += part.groups
        distributions = file.get(row.lesson.key)
        assert distributions is not None  # it was there when the row was loaded
        said.append(distributions)
    if not count:
        return None
    targets = Targets(
        student_groups=torch.from_numpy(np.concatenate(students)),
        teacher_groups=torch.from_numpy(np.concatenate(theirs)),
        tokens=_joined([row.tokens for row in said], np.int64),
        log_probs=_joined([row.log_probs for row in said], np.float32),
        top_ids=_joined([row.top_ids for row in said], np.int64),
        top_log_probs=_joined([row.top_log_probs for row in said], np.float32),
        groups=count,
    )
    return LaidOut(teacher, targets, _joined(weights, np.float32))


def _shifted(numbers: array[int], by: int) -> np.ndarray[Any, Any]:
    """Return the groups of a row as those of a batch that has ``by`` groups before it."""
    own = np.frombuffer(numbers, np.int32).astype(np.int64)
    return np.where(own < 0, -1, own + by)


def _joined(parts: Sequence[np.ndarray[Any, Any]], dtype: Any) -> Tensor:
    return torch.from_numpy(np.concatenate(parts).astype(dtype, copy=False))
