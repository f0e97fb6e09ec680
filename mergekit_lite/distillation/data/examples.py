"""One row of data as other tools write it: a conversation with answers, some of them preferred to others.

The columns tell the form:

    chosen, rejected          preferences: of TRL, with or without ``prompt``, as texts or messages; HuggingFaceH4's
                              binarized UltraFeedback; princeton-nlp's; LLaMA-Factory's, with ``conversations`` or
                              ``instruction``; WRPO's, with several chosen; rows of ``pairs/preference.jsonl``
    completions               UltraFeedback as openbmb has it: ``instruction``, and each model's answer and scores
    all_generated_responses   answers of one model with ``all_rm_scores``, princeton-nlp's
    prompt, completion        TRL, texts or messages
    messages, conversations   whole conversations, of OpenAI's form or ShareGPT's; the last answer is the answer
    messages, response        rows of ``pairs/sft.jsonl``
    instruction, output       Alpaca's, with ``input``

Answers before the last one are part of the conversation. Anything else about a row is an error that says what.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergekit_lite.answers.prompts import digest_of, message_of
from mergekit_lite.answers.rows import Message, Prompt
from mergekit_lite.answers.thoughts import is_cut, together
from mergekit_lite.errors import shortened

ROLES = {  # of messages, in ShareGPT's and other names
    **dict.fromkeys(("system",), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", "chatgpt", "bing", "bard"), "assistant"),
}
THOUGHT_KEYS = ("reasoning_content", "reasoning", "thinking")
TRANSCRIPT = re.compile(r"\n\n(Human|Assistant): ?")  # of Anthropic's HH
KNOWN = "chosen and rejected; prompt and completion; messages; conversations; completions; instruction and output"


@dataclass(frozen=True)
class Given:
    """An answer that data have."""

    text: str  # its thoughts in front of it
    model: str = ""  # that gave it, where the data say so
    score: float | None = None
    ended: bool = True  # False where the data say that it was cut
    role: str = ""  # source or target, where the data say so

    @property
    def cut(self) -> bool:
        """Whether it was cut: the data say so, or its thoughts never close."""
        return is_cut({"text": self.text, "finish": "stop" if self.ended else "length"})


@dataclass(frozen=True)
class Example:
    """A prompt, and the answers to it: those preferred and those not, or just answers."""

    prompt: Prompt
    chosen: tuple[Given, ...] = ()
    rejected: tuple[Given, ...] = ()
    answers: tuple[Given, ...] = ()  # that nobody has compared
    own: Given | None = None  # beside chosen and rejected ones, the model's own (``own``)
    judgment: str = ""  # of the answer: what is wrong with it (``judgment``)

    @property
    def all(self) -> tuple[Given, ...]:
        """All answers, but for the model's own."""
        return (*self.chosen, *self.rejected, *self.answers)


def example_of(row: Mapping[str, Any], domain: str = "") -> Example:
    """Return the example that a row is, whichever form it has.

    Raises:
        ValueError: it has none, or is not what its columns say.
    """
    has = {name for name, value in row.items() if value is not None}
    if {"chosen", "rejected"} <= has:
        messages, chosen, rejected = _preference(row, has)
        own = row.get("own")
        given = None if own is None else _own(own) if isinstance(own, Mapping) else Given(_text(own, "'own'"))
        return Example(_prompt(row, messages, domain), chosen, rejected, own=given)
    messages, answers = _answers(row, has)
    judgment = _text(row["judgment"], "'judgment'") if "judgment" in has else ""
    return Example(_prompt(row, messages, domain), answers=answers, judgment=judgment)


def _answers(row: Mapping[str, Any], has: set[str]) -> tuple[tuple[Message, ...], tuple[Given, ...]]:
    if {"instruction", "completions"} <= has:
        return _asked(row), tuple(_of_model(each) for each in _list(row, "completions"))
    if {"prompt", "all_generated_responses"} <= has:
        texts = _list(row, "all_generated_responses")
        scores = _list(row, "all_rm_scores") if "all_rm_scores" in has else [None] * len(texts)
        if len(scores) != len(texts):
            raise ValueError(f"{len(texts)} answers have {len(scores)} scores")
        pairs = zip(texts, scores, strict=True)
        return _asked(row), tuple(Given(_text(text, "an answer"), score=_number(score)) for text, score in pairs)
    if {"prompt", "completion"} <= has:
        return _asked(row), (_answer(row["completion"]),)
    if {"messages", "response"} <= has:
        return _turns(row["messages"]), (Given(_text(row["response"], "'response'"), ended=row.get("cut") is not True),)
    if {"instruction", "output"} <= has:
        return _asked(row), (_answer(row["output"]),)
    for name in ("messages", "conversations", "conversation"):
        if name in has:
            *before, last = _with_system(row, _turns(row[name]))
            if last["role"] != "assistant":
                raise ValueError(f"the last message is of the role {last['role']!r}: there is no answer")
            return tuple(before), (Given(last["content"]),)
    raise ValueError(f"the columns {', '.join(map(repr, row))} are none of those that are known: {KNOWN}")


class _Preference(NamedTuple):
    messages: tuple[Message, ...]
    chosen: tuple[Given, ...]
    rejected: tuple[Given, ...]


def _preference(row: Mapping[str, Any], has: set[str]) -> _Preference:
    sides = {name: row[name] for name in ("chosen", "rejected")}
    if all(isinstance(side, str) for side in sides.values()):
        if not has & {"prompt", "instruction", "conversations", "messages"}:
            return _without_prompt(row)
        texts = ((Given(side, score=_number(row.get(f"score_{name}"))),) for name, side in sides.items())
        return _Preference(_asked(row), *texts)
    sides = {name: [side] if isinstance(side, Mapping | str) else side for name, side in sides.items()}
    if any(not isinstance(side, Sequence) or not side for side in sides.values()):
        raise ValueError("'chosen' and 'rejected' have to be both texts, or both lists of messages")
    if all(isinstance(each, Mapping) and "text" in each for side in sides.values() for each in side):
        return _Preference(_turns(row["messages"]), *(tuple(map(_own, side)) for side in sides.values()))
    turns = {name: _turns(side) for name, side in sides.items()}
    if all(turn["role"] == "assistant" for side in turns.values() for turn in side):
        messages = _asked(row)
    else:
        messages = _shared(*turns.values())
        turns = {name: side[len(messages) :] for name, side in turns.items()}
        asked = row.get("prompt")
        if isinstance(asked, str) and not any(asked.strip() in turn["content"] for turn in messages):
            raise ValueError("'prompt' isn't what 'chosen' and 'rejected' answer")
    if wrong := next((turn for side in turns.values() for turn in side if turn["role"] != "assistant"), None):
        raise ValueError(f"a turn of the role {wrong['role']!r} follows the answer: only the last answers may differ")
    scores = {name: _number(row.get(f"score_{name}")) for name in turns}
    said = (tuple(Given(turn["content"], score=scores[name]) for turn in side) for name, side in turns.items())
    return _Preference(messages, *said)


def _without_prompt(row: Mapping[str, Any]) -> _Preference:
    """Take two texts apart: transcripts into turns, others where they begin to differ, at a space before it."""
    chosen, rejected = row["chosen"], row["rejected"]
    if TRANSCRIPT.match(chosen) and TRANSCRIPT.match(rejected):
        turns = [_transcript(chosen), _transcript(rejected)]
        return _preference({"chosen": turns[0], "rejected": turns[1]}, {"chosen", "rejected"})
    same = next((at for at, (a, b) in enumerate(zip(chosen, rejected, strict=False)) if a != b), None)
    same = min(len(chosen), len(rejected)) if same is None else same
    border = max(chosen.rfind(" ", 0, same), chosen.rfind("\n", 0, same)) + 1
    if not chosen[:border].strip():
        raise ValueError("there is no 'prompt', and 'chosen' and 'rejected' begin with nothing in common")
    prompt = (Message(role="user", content=chosen[:border].rstrip()),)
    return _Preference(prompt, (Given(chosen[border:]),), (Given(rejected[border:]),))


def _transcript(text: str) -> list[dict[str, str]]:
    parts = TRANSCRIPT.split(text)[1:]
    roles = {"Human": "user", "Assistant": "assistant"}
    return [{"role": roles[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]


def _shared(chosen: tuple[Message, ...], rejected: tuple[Message, ...]) -> tuple[Message, ...]:
    """Return the turns that both begin with, up to the last one of the user."""
    number = 0
    for number, (one, other) in enumerate(zip(chosen, rejected, strict=False), 1):
        if one != other:
            number -= 1
            break
    shared = list(chosen[:number])
    while shared and shared[-1]["role"] != "user":
        shared.pop()
    if not shared:
        raise ValueError("'chosen' and 'rejected' don't begin with the same turn of a user, and there is no 'prompt'")
    return tuple(shared)


def _asked(row: Mapping[str, Any]) -> tuple[Message, ...]:
    """Return the conversation that is answered."""
    given = next((row[name] for name in ("prompt", "conversations", "messages") if row.get(name) is not None), None)
    if given is None and isinstance(row.get("instruction"), str):
        more = row.get("input")
        given = "\n".join([row["instruction"], *([more] if isinstance(more, str) and more else [])])
    if given is None:
        raise ValueError("there is no 'prompt', 'instruction', 'messages' or 'conversations'")
    if isinstance(given, str):
        given = [{"role": "user", "content": given}]
    return _with_system(row, _turns([given] if isinstance(given, Mapping) else given))


def _with_system(row: Mapping[str, Any], turns: tuple[Message, ...]) -> tuple[Message, ...]:
    system = row.get("system")
    if not isinstance(system, str) or not system.strip() or turns[0]["role"] == "system":
        return turns
    return (Message(role="system", content=system), *turns)


def _turns(given: object) -> tuple[Message, ...]:
    if not isinstance(given, Sequence) or isinstance(given, str) or not given:
        raise ValueError(f"expected a list of messages, got {shortened(given, 60)!r}")
    return tuple(_turn(number, turn) for number, turn in enumerate(given, 1))


def _turn(number: int, given: object) -> Message:
    if not isinstance(given, Mapping):
        raise ValueError(
            f"message {number}: expected {{role, content}} or {{from, value}}, got {shortened(given, 60)!r}"
        )
    role, content = given.get("role", given.get("from")), given.get("content", given.get("value"))
    if given.get("tool_calls"):
        raise ValueError(f"message {number}: it calls tools, which is no text to train on")
    if isinstance(content, list) and all(isinstance(part, Mapping) and part.get("type") == "text" for part in content):
        content = "".join(str(part.get("text")) for part in content)
    role = ROLES.get(role, role) if isinstance(role, str) else role
    thoughts = next(
        (given[key] for key in THOUGHT_KEYS if isinstance(given.get(key), str) and given[key].strip()), None
    )
    if role == "assistant" and thoughts is not None and isinstance(content, str):
        content = together(thoughts, content).whole
    return message_of(number, {"role": role, "content": content})


def _answer(given: object) -> Given:
    if isinstance(given, str):
        return Given(given)
    turns = _turns([given] if isinstance(given, Mapping) else given)
    if len(turns) != 1 or turns[0]["role"] != "assistant":
        raise ValueError(f"expected one answer of the assistant, got {', '.join(turn['role'] for turn in turns)}")
    return Given(turns[0]["content"])


def _own(given: Mapping[str, Any]) -> Given:
    return Given(
        _text(given.get("text"), "an answer"),
        model=str(given.get("source") or ""),
        score=_number(given.get("score")),
        ended=given.get("cut") is not True,
        role=str(role) if (role := given.get("role")) in ("source", "target") else "",
    )


def _of_model(given: object) -> Given:
    if not isinstance(given, Mapping):
        raise ValueError(f"expected a completion with its response, got {shortened(given, 60)!r}")
    score = next((given[name] for name in ("overall_score", "score") if given.get(name) is not None), None)
    return Given(_text(given.get("response"), "'response'"), str(given.get("model") or ""), _number(score))


def _list(row: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = row[name]
    if not isinstance(value, Sequence) or isinstance(value, str):
        raise ValueError(f"{name!r} is {shortened(value, 60)!r}, expected a list")
    return value


def _text(value: object, what: str) -> str:
    if not isinstance(value, str):
        raise ValueError(f"{what} is {shortened(value, 60)!r}, expected a text")
    return value


def _number(value: object) -> float | None:
    """Return a finite number, also one that is written as a text; else None."""
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return None
    try:
        number = float(value)
    except (ValueError, OverflowError):
        return None
    return number if math.isfinite(number) else None


def _prompt(row: Mapping[str, Any], messages: tuple[Message, ...], domain: str) -> Prompt:
    """Return the prompt. Its id is a digest of it: other data may have the same prompt under another id."""
    if not messages or messages[-1]["role"] != "user":
        raise ValueError("what is answered has to end with a turn of the user")
    names = ("messages", "conversations", "prompt", "instruction")
    asked = next((row[name] for name in names if row.get(name) is not None), None)
    own_domain, reference, tests = row.get("domain"), row.get("reference"), row.get("tests")
    tests = [tests] if isinstance(tests, str) else tests
    return Prompt(
        digest_of(messages),
        messages,
        own_domain if isinstance(own_domain, str) and own_domain else domain,
        str(reference) if isinstance(reference, str | int | float) and not isinstance(reference, bool) else None,
        tuple(tests) if isinstance(tests, list) and all(isinstance(test, str) for test in tests) else (),
        plain=isinstance(asked, str) and len(messages) == 1,
    )
