"""A source's missing answers as a file of requests for an OpenAI-compatible batch service, and its results read back.

A line asks ``{custom_id, method, url, body}`` and is answered ``{custom_id, response: {status_code, body}, error}``, in
any order. The ``custom_id`` is ``PROMPT/INDEX``.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from mergekit_lite.answers.replies import Failed, reply_in
from mergekit_lite.answers.requests import RequestBody
from mergekit_lite.answers.rows import Answer, Key, read_rows, with_system, write_rows
from mergekit_lite.distillation.prompts import settled
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.distillation.remarks import remarks
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rounds import take_over
from mergekit_lite.distillation.sample import hold_source, plan, tell_systems
from mergekit_lite.distillation.tasks import SourceTasks
from mergekit_lite.errors import UsageError, counted, listing, shortened

ADDRESS = "/v1/chat/completions"
MOST_REQUESTS = 50_000  # that OpenAI takes in a file


def write_batch(recipe: Recipe, name: str | None, path: Path, reporter: Reporter) -> None:
    """Write a request for each answer that the source lacks.

    Raises:
        UsageError: there is no such source, it has no server, its answers were drawn with other settings, or the file
            exists.
    """
    asked = _source(recipe, name, reporter)
    if path.exists():
        raise UsageError(f"{path} exists already: name another file, or delete it.")
    tell_systems(asked, reporter)
    body, missing = RequestBody(asked.source.model, asked.source.sampling), frozenset(asked.ledger.missing)
    tasks = [task for task in asked.tasks if task.key in missing]
    write_rows(
        path,
        (
            {
                "custom_id": f"{task.prompt.id}/{task.index}",
                "method": "POST",
                "url": ADDRESS,
                "body": body.of(with_system(task.prompt.messages, asked.source.system), task.seed),
            }
            for task in tasks
        ),
    )
    reporter.line(f"{asked.source.name}: {counted(len(tasks), 'request')} in {path}")
    if len(tasks) > MOST_REQUESTS:
        reporter.warn(
            f"OpenAI takes {MOST_REQUESTS:,} requests in a file: split it by lines (split -l {MOST_REQUESTS})"
        )


def read_batch(recipe: Recipe, name: str | None, path: Path, reporter: Reporter) -> None:
    """Read the results of such requests into the source's answers. Lines that are none are counted and left out.

    Raises:
        UsageError: as ``write_batch`` does; or the file can't be read.
    """
    asked = _source(recipe, name, reporter)
    problems: list[str] = []
    refused: Counter[str] = Counter()
    before = len(asked.ledger.missing)
    try:
        asked.ledger.append(answer.as_row() for answer in _answers(asked, path, problems, refused))
    finally:
        asked.ledger.close()
    if problems:
        reporter.warn(listing(f"Lines of {path} that are no results", problems))
    for why, count in refused.most_common():
        reporter.warn(f"{asked.source.name}: {counted(count, 'line')} without an answer that is wanted: {why}")
    left = len(asked.ledger.missing)
    if not left:
        asked.ledger.finish()
    reporter.line(f"{asked.source.name}: {counted(before - left, 'answer')} read, {left:,} still missing")
    for remark in remarks(asked.source, asked.ledger.rows()):
        reporter.warn(remark)


def _source(recipe: Recipe, name: str | None, reporter: Reporter) -> SourceTasks:
    """Return the tasks of the source with this name; of the only served one, where none is given."""
    prompts = settled(recipe, reporter)
    take_over(recipe)
    planned = {each.source.name: each for each in plan(recipe, prompts) if each.source.is_served}
    if name is None and len(planned) == 1:
        (name,) = planned
    if name not in planned:
        listed = f"There are: {', '.join(planned)}." if planned else "The recipe has none that can be asked now."
        wanted = "Name one source with --source." if name is None else f"No source with a server is named {name!r}."
        raise UsageError(f"{wanted} {listed}")
    asked = planned[name]
    if asked.source.one_request:
        raise UsageError(f"{name}: a batch has one answer a request: take `one_request` out.")
    if asked.source.continues is not None:
        raise UsageError(f"{name}: batch services don't go on from the beginning of an answer: serve it here.")
    if asked.source.in_context is not None:
        raise UsageError(
            f"{name}: a batch asks for turns of a chat, `in_context` for the end of a text: serve it here."
        )
    hold_source(recipe, asked.source)
    return asked


def _answers(asked: SourceTasks, path: Path, problems: list[str], refused: Counter[str]) -> Iterator[Answer]:
    tasks = {f"{task.prompt.id}/{task.index}": task.key for task in asked.tasks}
    wanted = set(asked.ledger.missing)
    for line in read_rows(path, problems, {"custom_id": str}):
        key = tasks.get(line.row["custom_id"])
        if key is None:
            refused["it answers no request of this source"] += 1
        elif key not in wanted:
            refused["the answer is there already"] += 1
        elif isinstance(found := _answer(asked.source.name, key, line.row), Answer):
            wanted.discard(key)
            yield found
        else:
            refused[found] += 1


def _answer(source: str, key: Key, row: dict[str, Any]) -> Answer | str:
    """Return the answer that a line has, or why it has none."""
    response = row.get("response")
    if not isinstance(response, dict) or row.get("error"):
        return _said(row.get("error"))
    status = response.get("status_code", 200)
    body = response.get("body")
    if status != 200:
        return f"HTTP {shortened(status, 20)}: {_said(body.get('error') if isinstance(body, dict) else body)}"
    try:
        return Answer(key.prompt, source, key.number, *reply_in(json.dumps(body).encode()))
    except Failed as failed:
        return str(failed)


def _said(error: Any) -> str:
    said = error.get("message", error.get("code")) if isinstance(error, dict) else error
    return shortened(said, 100) if said else "no reply"
