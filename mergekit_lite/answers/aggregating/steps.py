"""The steps, each a generator: it yields the calls that it makes at once, is sent their replies, and returns drafts.

A reply is None where a model gave none. Drafts that are missing are left out; a judgement that is missing ends the
answer (``Lost``). A judgement that can't be read is asked for again, with another seed.
"""

from __future__ import annotations

from collections.abc import Callable, Generator, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeVar

from mergekit_lite.answers.aggregating.judgements import critiques_in, ranking_in, verdict_in
from mergekit_lite.answers.aggregating.messages import (
    Draft,
    to_check,
    to_criticise,
    to_judge,
    to_rank,
    to_refine,
    with_drafts,
)
from mergekit_lite.answers.aggregating.recipe import Kind, Step
from mergekit_lite.answers.replies import Reply
from mergekit_lite.answers.rows import Message, with_system
from mergekit_lite.answers.thoughts import parts_of
from mergekit_lite.errors import shortened

TRIES = 3  # of a judgement that can't be read, and of a reply that says nothing
T = TypeVar("T")
Drafts = tuple[Draft, ...]


class Conversation(NamedTuple):
    """What is to be answered."""

    messages: Sequence[Message]
    systems: Mapping[str, str | None]  # the system prompt of each model, for messages that have none of their own
    reference: str | None = None  # the right or a good answer, if it is known

    def to(self, model: str) -> tuple[Message, ...]:
        """Return the messages as a model reads them."""
        return with_system(self.messages, self.systems.get(model))


@dataclass(frozen=True)
class Call:
    """One reply that a step asks a model for."""

    step: Kind
    model: str  # its name
    messages: tuple[Message, ...]
    stands_in: str | None = None  # a reply that can be read, for a dry run; any text is one where this is None


Asking = Generator[list[Call], list[Reply | None], T]


class Lost(Exception):
    """There is no answer, and why."""


def layer(steps: Sequence[Step], asked: Conversation, drafts: Drafts) -> Asking[Drafts]:
    """Take the steps of a layer side by side, and return their drafts one after the other."""
    running = [STEPS[step.step](step, asked, drafts) for step in steps]
    made: dict[int, Drafts] = {}
    sent: dict[int, list[Reply | None] | None] = dict.fromkeys(range(len(running)))
    while sent:
        waiting: dict[int, list[Call]] = {}
        for place, replies in sent.items():
            try:
                waiting[place] = next(running[place]) if replies is None else running[place].send(replies)
            except StopIteration as done:
                made[place] = done.value
        if not waiting:
            break
        all_replies = iter((yield [call for calls in waiting.values() for call in calls]))
        sent = {place: [next(all_replies) for _ in calls] for place, calls in waiting.items()}
    found = tuple(draft for place in sorted(made) for draft in made[place])
    if not found:
        raise Lost("no model gave a draft")
    return found


def generate(step: Step, asked: Conversation, drafts: Drafts) -> Asking[Drafts]:
    """Have each model answer the conversation ``samples`` times, whatever was drafted before."""
    return (yield from _drafted(step, asked.to))


def fuse(step: Step, asked: Conversation, drafts: Drafts) -> Asking[Drafts]:
    """Have each model make one draft of all, ``samples`` times.

    With a ``window`` it sees no more drafts than that at once, as Self-MoA-Seq (Li et al. 2025, arXiv 2502.00674) does:
    the first ones, then what it made of them in front of the next ones, and so on. The form is that of third parties:
    the authors published no code.
    """
    if step.window is None or step.window >= len(drafts):
        return (yield from _drafted(step, lambda model: _to_fuse(step, asked.to(model), drafts)))
    return (yield from _in_windows(step, asked, drafts, step.window))


def _in_windows(step: Step, asked: Conversation, drafts: Drafts, window: int) -> Asking[Drafts]:
    chains = [model for model in step.model for _ in range(step.samples)]
    heads: list[Draft | None] = [None] * len(chains)
    begun, taken = False, 0
    while taken < len(drafts):
        more = window - 1 if begun else window
        part = drafts[taken : taken + more]
        taken += more
        live = [place for place in range(len(chains)) if not begun or heads[place] is not None]
        calls = [
            Call(
                "fuse",
                chains[place],
                _to_fuse(step, asked.to(chains[place]), (*filter(None, [heads[place]]), *part)),
            )
            for place in live
        ]
        replies = yield calls
        for place, call, reply in zip(live, calls, replies, strict=True):
            heads[place] = _draft(call, reply)
        begun = True
    return tuple(filter(None, heads))


def rank(step: Step, asked: Conversation, drafts: Drafts) -> Asking[Drafts]:
    """Return the ``keep`` best drafts, the best one first."""
    if len(drafts) == 1:
        return drafts
    call = Call(
        "rank",
        step.model[0],
        to_rank(asked.messages, drafts, step.prompt),
        f"Ranking: {' > '.join(f'[{number}]' for number in range(1, len(drafts) + 1))}",
    )
    (places,) = yield from _read([call], lambda text: ranking_in(text, len(drafts), step.keep), "ranking")
    return tuple(drafts[place] for place in places[: step.keep])


def critique(step: Step, asked: Conversation, drafts: Drafts) -> Asking[Drafts]:
    """Return the drafts with a critique of each.

    With the reference answer beside them the critique is what REFED calls feedback at the level of the response (Mehri
    et al. 2025, arXiv 2502.04511).
    """
    if step.reference and asked.reference is None:
        raise Lost("the prompt has no reference, which the critique is to see")
    call = Call(
        "critique",
        step.model[0],
        to_criticise(asked.messages, drafts, step.prompt, asked.reference if step.reference else None),
        "\n".join(f"[{number}]\nIt is." for number in range(1, len(drafts) + 1)),
    )
    (critiques,) = yield from _read([call], lambda text: critiques_in(text, len(drafts)), "critique of each draft")
    return tuple(draft._replace(critique=text) for draft, text in zip(drafts, critiques, strict=True))


def refine(step: Step, asked: Conversation, drafts: Drafts) -> Asking[Drafts]:
    """Return each draft as a model writes it anew, in view of its critique (SRT, Hu et al. 2024, arXiv 2406.07168)."""
    calls = [Call("refine", step.model[0], to_refine(asked.messages, draft, step.prompt)) for draft in drafts]
    replies = yield calls
    return tuple(filter(None, map(_draft, calls, replies)))


def verify(step: Step, asked: Conversation, drafts: Drafts) -> Asking[Drafts]:
    """Return the drafts that a model finds correct after a check in writing; all of them where it finds none."""
    (model,) = step.model
    checks = yield from _read(
        [Call("verify", model, to_check(asked.messages, draft, step.prompt)) for draft in drafts],
        lambda text: text.strip() or None,
        "check",
    )
    calls = [
        Call("verify", model, to_judge(asked.messages, draft, check), "Verdict: correct")
        for draft, check in zip(drafts, checks, strict=True)
    ]
    verdicts = yield from _read(calls, verdict_in, "verdict")
    correct = tuple(draft._replace(doubted=False) for draft, right in zip(drafts, verdicts, strict=True) if right)
    return correct or tuple(draft._replace(doubted=True) for draft in drafts)


STEPS: dict[Kind, Callable[[Step, Conversation, Drafts], Asking[Drafts]]] = {
    "generate": generate,
    "fuse": fuse,
    "rank": rank,
    "critique": critique,
    "refine": refine,
    "verify": verify,
}


def _to_fuse(step: Step, messages: Sequence[Message], drafts: Drafts) -> tuple[Message, ...]:
    return with_drafts(messages, drafts, step.prompt, length_control=step.length_control)


def _drafted(step: Step, request_to: Callable[[str], tuple[Message, ...]]) -> Asking[Drafts]:
    calls = [Call(step.step, model, request_to(model)) for model in step.model for _ in range(step.samples)]
    replies = yield calls
    return tuple(filter(None, map(_draft, calls, replies)))


def _draft(call: Call, reply: Reply | None) -> Draft | None:
    return None if reply is None else Draft(said_in(reply), call.model, reply)


def _read(calls: list[Call], read: Callable[[str], T | None], what: str) -> Asking[list[T]]:
    """Make calls until what each reply says can be read. Raises Lost where a reply is missing, or can't be read."""
    found: dict[int, T] = {}
    for attempt in range(TRIES):
        missing = [place for place in range(len(calls)) if place not in found]
        if not missing:
            break
        replies = yield [calls[place] for place in missing]
        for place, reply in zip(missing, replies, strict=True):
            if reply is None:
                raise Lost(f"{calls[place].model} gave no {what}")
            if (value := read(said_in(reply))) is not None:
                found[place] = value
            elif attempt == TRIES - 1:
                end = shortened(said_in(reply).strip()[-100:])
                raise Lost(f"{calls[place].model}: {TRIES} replies without a {what}, the last one …{end}")
    return [found[place] for place in range(len(calls))]


def said_in(reply: Reply) -> str:
    """Return what a reply says, without thoughts."""
    return parts_of({"text": reply.text, "thoughts": reply.thoughts}).answer
