"""What an aggregate would ask, without asking: calls and tokens of each model.

Every answer is walked through with the replies that are there; where one is missing, with a text as long as it may
become. So the numbers are the most there can be, but for what is asked for again: judgements that can't be read, and
replies that say nothing.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from mergekit_lite.answers.aggregating.calls import Item, digests
from mergekit_lite.answers.aggregating.recipe import Aggregate
from mergekit_lite.answers.aggregating.running import is_mute, ledger_of, reply_of, says_otherwise
from mergekit_lite.answers.aggregating.steps import TRIES, Call, Conversation, Lost, layer, said_in
from mergekit_lite.answers.asked_model import AskedModel
from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.replies import Reply

CHARACTERS = 4  # of a token, where texts are estimated


class ModelCalls(NamedTuple):
    """The calls of one model, and the most tokens that those to come read and write, estimated by characters."""

    name: str
    model: str
    where: str
    calls: int
    done: int
    reads: int  # tokens
    writes: int  # tokens


@dataclass
class _Count:
    before: int  # characters that the model reads before each conversation
    calls: int = 0
    done: int = 0
    reads: int = 0
    writes: int = 0


def dry_run(aggregate: Aggregate, tasks: Iterable[Task], path: Path) -> list[ModelCalls]:
    """Count the calls of each model; ``path`` is the ledger of replies."""
    counts = {model.name: _Count(len(model.system or "") + len(model.examples() or "")) for model in aggregate.models}
    models, ledger = digests(aggregate, path.parent), ledger_of(path)
    for task in tasks:
        _walk(aggregate, Item(task, models), ledger, counts)
    return [
        ModelCalls(model.name, model.model, model.where, each.calls, each.done, each.reads, each.writes)
        for model in aggregate.models
        for each in [counts[model.name]]
    ]


def _walk(aggregate: Aggregate, item: Item, ledger: Ledger[str], counts: Mapping[str, _Count]) -> None:
    by_name, asked = (
        aggregate.by_name,
        Conversation(item.task.prompt.messages, aggregate.systems, item.task.prompt.reference),
    )
    for steps in aggregate.layers:
        running = layer(steps, asked, item.drafts)
        try:
            calls = next(running)
            while True:
                calls = running.send(_replies(item, calls, by_name, ledger, counts))
        except StopIteration as done:
            item.drafts = done.value
        except Lost:
            return


def _replies(
    item: Item,
    calls: Sequence[Call],
    models: Mapping[str, AskedModel],
    ledger: Ledger[str],
    counts: Mapping[str, _Count],
) -> list[Reply | None]:
    """Return the replies to calls, or what stands in for them; None for one that says nothing, however often."""

    def reply(call: Call) -> Reply:
        return _reply(item, call, models[call.model], ledger, counts[call.model])

    replies = [reply(call) for call in calls]
    for _ in range(TRIES - 1):
        for place, call in enumerate(calls):
            if is_mute(replies[place]) and says_otherwise(models[call.model]):
                replies[place] = reply(call)
    return [each if said_in(each).strip() else None for each in replies]


def _reply(item: Item, call: Call, model: AskedModel, ledger: Ledger[str], count: _Count) -> Reply:
    """Count a call, and return its reply or what stands in for it."""
    key = item.task_of(call).prompt.id
    count.calls += 1
    if key in ledger:
        count.done += 1
        (row,) = ledger.rows([key])
        return reply_of(row)
    read = count.before + sum(len(message["content"]) for message in call.messages)
    count.reads += -(-read // CHARACTERS)
    count.writes += model.sampling.max_tokens
    return Reply(call.stands_in or "x" * (CHARACTERS * model.sampling.max_tokens), "stop", None)
