"""Aggregates run: the calls of all prompts at once, round by round and layer by layer, with a ledger of all replies.

Models behind servers are asked at the same time, those in this process one after the other. In a layer each round has
the calls of all prompts, so an answer of a model in this process doesn't depend on where a run was stopped. A killed
run loses the replies that were on their way. Memory has the drafts of all prompts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Generator, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol, TypeAlias

from mergekit_lite.answers.aggregating.calls import Item, digests
from mergekit_lite.answers.aggregating.recipe import Aggregate, Kind, Step
from mergekit_lite.answers.aggregating.steps import TRIES, Asking, Call, Conversation, Drafts, Lost, layer, said_in
from mergekit_lite.answers.asked_model import AskedModel
from mergekit_lite.answers.asking import Notes, Task, reasons, repeated
from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.replies import Reply
from mergekit_lite.answers.rows import Answer, Fields, Key
from mergekit_lite.answers.server import Served, answers_of
from mergekit_lite.answers.spreading import Crews
from mergekit_lite.errors import counted

REPLY: Fields = {"call": str, "text": str, "finish": str}
# Kinds of steps whose requests and replies, of their last layer, can teach a model: whether only the last reply counts,
# as those before it could not be read.
TAUGHT: Mapping[Kind, bool] = {"fuse": False, "critique": True, "refine": False}
SAID_NOTHING = "a reply that is blank, or thoughts alone: raise max_tokens, or take another seed"
Opened: TypeAlias = Callable[[AskedModel], AbstractContextManager[Served | Local]]


class Reports(Protocol):
    """Takes what is told while an aggregate runs."""

    def line(self, text: str) -> None:
        """Take a result, or that a step is done."""

    def warn(self, text: str) -> None:
        """Take what the user should look at."""

    def progress(self, what: str, total: int, done: int = 0) -> AbstractContextManager[Callable[[int], None]]:
        """Take the progress of a task: its name, its number of items, and how many of them were done before."""


@dataclass
class Aggregation:
    """What became of the answers."""

    items: list[Item]
    missing: list[str] = field(default_factory=list)  # messages: what is missing, and why
    asked: Counter[str] = field(default_factory=Counter)  # replies that were not there yet, by model
    stopped: bool = False  # before the last layer's end

    @property
    def answered(self) -> list[Item]:
        """The items that have an answer."""
        return [] if self.stopped else [item for item in self.items if not item.lost]


@dataclass
class Asked:
    """A call, whose reply an item waits for."""

    item: Item
    call: Call
    task: Task

    @property
    def key(self) -> str:
        """The call's key in the ledger."""
        return self.task.prompt.id

    def again(self) -> Asked:
        """Return the call made again, by another seed."""
        return Asked(self.item, self.call, self.item.task_of(self.call))


def run(
    aggregate: Aggregate,
    tasks: Sequence[Task],
    path: Path,
    opened: Opened,
    reports: Reports,
    *,
    name: str,
    skip_missing: bool = False,
    begin: Mapping[Key, Drafts] | None = None,
    crews: Crews,
) -> Aggregation:
    """Answer every task.

    Args:
        aggregate: models and layers.
        tasks: the prompts to answer, each with its seed.
        path: the ledger of replies; paths of models are noted as from its folder.
        opened: gives what answers for a model.
        reports: takes progress and remarks.
        name: of the aggregate, for messages.
        skip_missing: go on with the drafts that are there, and without the prompts that lack a judgement or all drafts.
            Without it the run ends with the first layer that lacks anything.
        begin: the drafts before the first layer, by the tasks' keys.
        crews: what models of this process are spread over.

    Raises:
        RunError: a server can't be started, or another process writes the ledger.
        CheckpointError: a model can't be loaded.
    """
    models = digests(aggregate, path.parent)
    found = Aggregation([Item(task, models, (begin or {}).get(task.key, ())) for task in tasks])
    ledger = ledger_of(path)
    running = _Running(aggregate, ledger, opened, reports, found, skip_missing, crews)
    try:
        for number, steps in enumerate(aggregate.layers, 1):
            running.title = f"{name}, layer {number} of {len(aggregate.layers)}"
            if not running.through(steps):
                found.stopped = True
                return found
        used = [key for item in found.items for key in item.used]
        # What another recipe, or more prompts, were asked for stays behind: it was paid for.
        ledger.expected = tuple(dict.fromkeys([*used, *ledger.keys]))
        ledger.finish(with_missing=True)
    finally:
        ledger.close()
    return found


def ledger_of(path: Path) -> Ledger[str]:
    """Return the ledger of replies, by the keys of their calls. Which ones are wanted shows as they come."""
    return Ledger(path, (), lambda row: str(row["call"]), REPLY)


@dataclass
class _Running:
    """A run, and the layer that it is at."""

    aggregate: Aggregate
    ledger: Ledger[str]
    opened: Opened
    reports: Reports
    found: Aggregation
    skip_missing: bool
    crews: Crews
    title: str = ""  # of the layer, for messages

    def through(self, steps: Sequence[Step]) -> bool:
        """Bring every item through a layer; return whether the next one may begin."""
        live = [item for item in self.found.items if not item.lost]
        systems = self.aggregate.systems
        running = {item: layer(steps, _conversation(item, systems), item.drafts) for item in live}
        for kind in {step.step for step in steps} & TAUGHT.keys():
            for item in live:
                item.taught[kind] = []
        sent: Mapping[Item, list[Reply | None] | None] = dict.fromkeys(live)
        while asked := [each for item, replies in sent.items() for each in _next(item, running[item], replies)]:
            asked, replies, lacks = self._replies(asked)
            if lacks:
                self.found.missing += lacks
                if not self.skip_missing:
                    return False
            came: dict[Item, list[Reply | None]] = {}
            for each in asked:
                reply = replies.get(each.key)
                came.setdefault(each.item, []).append(reply)
                if each.call.step in TAUGHT and reply is not None:
                    again = [] if TAUGHT[each.call.step] else each.item.taught[each.call.step]
                    each.item.taught[each.call.step] = [*again, (each.call.messages, reply)]
            sent = came
        doubted = sum(any(draft.doubted for draft in item.drafts) for item in live)
        if doubted and any(step.step == "verify" for step in steps):  # later layers hand such drafts on
            self.reports.warn(
                f"{self.title}: none of the drafts found correct for {doubted:,} of {len(live):,}: all go on"
            )
        lost = {item.task.key: item.lost for item in live if item.lost}
        if lost:
            self.found.missing.append(
                f"{self.title}: {counted(len(lost), 'answer')} of {len(live):,} can't be made: {reasons(lost)}"
            )
        return self.skip_missing or not lost

    def _replies(self, asked: list[Asked]) -> tuple[list[Asked], dict[str, Reply], list[str]]:
        """Return calls as they were made in the end, replies by key, and a message for each model that lacks any.

        A call to which a model said nothing is made again, by another seed.
        """
        lost: dict[str, dict[str, str]] = {name: {} for name in self.aggregate.by_name}
        self._fetch(asked, lost)
        for _ in range(TRIES - 1):
            mute = self._mute(asked)
            if not mute:
                break
            before = {each.key for each in asked}
            asked = [each.again() if each.key in mute else each for each in asked]
            self._fetch([each for each in asked if each.key not in before], lost)
        replies = {row["call"]: reply_of(row) for row in self.ledger.rows([each.key for each in asked])}
        said = {key: reply for key, reply in replies.items() if said_in(reply).strip()}
        calls = _by_model(asked)
        return (
            asked,
            said,
            [message for name, of in calls.items() for message in self._lacking(name, of, replies, said, lost)],
        )

    def _mute(self, asked: Sequence[Asked]) -> frozenset[str]:
        """Return the keys of calls that are worth making again."""
        drawn = {name for name, model in self.aggregate.by_name.items() if says_otherwise(model)}
        rows = self.ledger.rows([each.key for each in asked if each.call.model in drawn])
        return frozenset(row["call"] for row in rows if is_mute(reply_of(row)))

    def _fetch(self, asked: Sequence[Asked], lost: dict[str, dict[str, str]]) -> None:
        """Ask for the replies to calls that are not there; ``lost`` gets why some don't come, by model and key."""
        calls = _by_model(asked)
        wanted = {name: [each for each in of if each.key not in self.ledger] for name, of in calls.items()}
        models = [model for model in self.aggregate.models if wanted.get(model.name)]
        behind_servers = [model for model in models if model.server is not None]
        for group in (behind_servers, *([model] for model in models if model.server is None)):
            if group:
                self._ask({model.name: model for model in group}, calls, wanted, lost)

    def _ask(
        self,
        group: Mapping[str, AskedModel],
        calls: Mapping[str, Sequence[Asked]],
        wanted: Mapping[str, Sequence[Asked]],
        lost: Mapping[str, dict[str, str]],
    ) -> None:
        """Ask models at the same time for the replies that are wanted, and note what they fail to give."""
        where = {each.key: each for name in group for each in wanted[name]}
        with ExitStack() as stack:
            who = {name: stack.enter_context(self.opened(model)) for name, model in group.items()}
            advance = {}
            for name in group:
                total, missing = len(calls[name]), len(wanted[name])
                what = f"{self.title}: {calls[name][0].call.step} by {name}"
                advance[name] = stack.enter_context(self.reports.progress(what, total, total - missing))
            notes = Notes(who, self.reports.warn)
            with closing(self._answers(who, calls, wanted)) as answers:
                for answer in answers:
                    self.ledger.append([_row(where[answer.prompt], answer)])
                    self.found.asked[answer.source] += 1
                    advance[answer.source](1)
                    notes.tell()
            notes.tell()
            for name, each in who.items():
                for note in each.notes if isinstance(each, Local) else ():
                    self.reports.line(f"{name}: {note}")
                if (said := repeated(each.failures)) is not None:
                    self.reports.line(f"{name}: {said}")
                lost[name].update({key.prompt: why for key, why in each.failures.lost.items()})
                if each.failures.stopped:
                    lost[name].update(dict.fromkeys([asked.key for asked in wanted[name]], each.failures.stopped))

    def _answers(
        self,
        who: Mapping[str, Served | Local],
        calls: Mapping[str, Sequence[Asked]],
        wanted: Mapping[str, Sequence[Asked]],
    ) -> Generator[Answer]:
        """Yield replies as they come. A model in this process is given all calls, so its batches are ever the same."""
        served: list[tuple[Served, list[Task], frozenset[Key]]] = []
        for name, each in who.items():
            tasks, missing = [call.task for call in calls[name]], frozenset(call.task.key for call in wanted[name])
            if isinstance(each, Local):
                yield from self.crews.answers(each, self.aggregate.by_name[name].device, tasks, missing)
            else:
                served.append((each, tasks, missing))
        yield from answers_of(served)

    def _lacking(
        self,
        name: str,
        calls: Sequence[Asked],
        replies: Mapping[str, Reply],
        said: Mapping[str, Reply],
        lost: Mapping[str, Mapping[str, str]],
    ) -> Iterator[str]:
        why = {
            Key(each.item.task.prompt.id, number): SAID_NOTHING
            if each.key in replies
            else lost[name].get(each.key, "no reply")
            for number, each in enumerate(calls)
            if each.key not in said
        }
        if why:
            yield f"{self.title}: {name} lacks {len(why):,} of {len(calls):,} replies: {reasons(why)}"


def _conversation(item: Item, systems: Mapping[str, str | None]) -> Conversation:
    return Conversation(item.task.prompt.messages, systems, item.task.prompt.reference)


def _by_model(asked: Sequence[Asked]) -> dict[str, list[Asked]]:
    calls: dict[str, list[Asked]] = {}
    for each in asked:
        calls.setdefault(each.call.model, []).append(each)
    return calls


def _next(item: Item, running: Asking[Drafts], replies: list[Reply | None] | None) -> list[Asked]:
    """Return the calls that an item makes next; none where the layer is done with it."""
    try:
        calls = next(running) if replies is None else running.send(replies)
    except StopIteration as done:
        item.drafts = done.value
        return []
    except Lost as lost:
        item.lost = str(lost)
        return []
    return [Asked(item, call, item.task_of(call)) for call in calls]


def _row(asked: Asked, answer: Answer) -> dict[str, Any]:
    key = asked.item.task.key
    what = {"call": asked.key, "prompt": key.prompt, "index": key.number, "step": asked.call.step}
    said = {"text": answer.text, "finish": answer.finish, "tokens": answer.tokens}
    return {
        **what,
        "model": asked.call.model,
        **said,
        **({} if answer.thoughts is None else {"thoughts": answer.thoughts}),
    }


def reply_of(row: Mapping[str, Any]) -> Reply:
    """Return the reply that a row of the ledger has."""
    return Reply(row["text"], row["finish"], row.get("tokens"), row.get("thoughts"))


def is_mute(reply: Reply) -> bool:
    """Return whether a model ended a reply without having said anything. What a limit cut would end alike again."""
    return reply.finish == "stop" and not said_in(reply).strip()


def says_otherwise(model: AskedModel) -> bool:
    """Return whether another seed may give another reply."""
    return model.sampling.temperature > 0
