"""Conversations as tokens: the prompt that a model reads, and the response that it is scored or trained on.

The prompt is the conversation under the tokenizer's chat template with the header of the next turn. The response is
the rest of the same conversation with the answer under the template, up to the token that ends the turn. So no header
is scored, a system prompt that the template adds is in the prompt, and a turn ends once.

Thoughts are written as the template writes them. Where it opens them in the prompt, the response goes on from there; an
answer without thoughts closes them first, as the template does, or else by the mark that closes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Literal, NamedTuple, cast

from mergekit_lite.answers.rows import Message, with_system
from mergekit_lite.answers.thoughts import MARKS, OPENING, Parts, parted
from mergekit_lite.errors import MergekitLiteError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

QUESTION = (Message(role="user", content="?"),)
PROBE = "Zq7kAnswer"  # a text that no template writes by itself
THOUGHT_PROBE = "Zq7kThought"
SYSTEM_PROBE = "Zq7kSystem"
THOUGHT_KEYS = ("reasoning_content", "thinking", "reasoning")  # of a message, by which templates take thoughts
# Llama-3.2's template writes today's date unless it is given one. This is its own default. Tokens must not depend on
# the day: a stored log-probability would no longer be that of the row.
DATE = "26 Jul 2024"


class TemplateError(MergekitLiteError):
    """The template can't render this conversation, or doesn't separate the answer from the prompt."""


class Tokens(NamedTuple):
    """Token ids of a prompt and of one response to it, the token that ends the turn included."""

    prompt: tuple[int, ...]
    response: tuple[int, ...]


@dataclass(frozen=True)
class LengthLimits:
    """The largest length of a row, in tokens.

    Attributes:
        length: of the prompt and its longest response together.
        prompt: of the prompt; None where only the whole is limited.
        too_long: ``drop`` a row that is longer. Or ``cut`` it: the prompt keeps its last ``prompt`` tokens (where the
            whole is too long and ``prompt`` is None: its last ``length // 2``), then each response its first, as many
            as fit. A response that was cut has no end of turn.
    """

    length: int
    prompt: int | None = None
    too_long: Literal["drop", "cut"] = "drop"


class Fitted(NamedTuple):
    """The responses to one prompt within the limits; ``cut`` where prompt or responses were cut."""

    rows: tuple[Tokens, ...]
    cut: bool


def fitted(rows: Sequence[Tokens], limits: LengthLimits) -> Fitted | None:
    """Fit the responses to one prompt, with the same prompt tokens, into the limits; None where they are dropped."""
    prompt = rows[0].prompt
    longest = max(len(row.response) for row in rows)
    too_long = len(prompt) + longest > limits.length
    if not too_long and (limits.prompt is None or len(prompt) <= limits.prompt):
        return Fitted(tuple(rows), cut=False)
    if limits.too_long == "drop":
        return None
    end = prompt[-min(limits.prompt or limits.length // 2, len(prompt)) :]
    return Fitted(tuple(Tokens(end, row.response[: limits.length - len(end)]) for row in rows), cut=True)


class Frame(NamedTuple):
    """The text of a template before and after an answer to ``QUESTION``."""

    before: str
    after: str


class PreQuery(NamedTuple):
    """What stands before the user's words in a conversation that begins, and what ends them: Magpie's query template.

    Attributes:
        text: the template up to the user's words.
        tokens: its ids.
        ends: ids of the special tokens that the template writes, and of the end of text.
        stop: the text that follows the words: ``[/INST]``, or that of a special token, which a model may spell, too.
        put: the texts of the tokens that the tokenizer itself puts before any text, and behind it; empty for none.
    """

    text: str
    tokens: tuple[int, ...]
    ends: frozenset[int]
    stop: str
    put: tuple[str, str]

    @property
    def lacks(self) -> tuple[str, str]:
        """What a tokenizer puts before and behind this text that the template doesn't have there."""
        before, behind = self.put
        return "" if self.text.startswith(before) else before, behind


class ChatTemplate:
    """The chat template of a tokenizer; or plain text, where it has none.

    Plain text is the contents of the messages, blank lines between them and after them, then the answer and the
    tokenizer's end of text. A system prompt that the template refuses or leaves out is put before the first turn of
    the user, a blank line between.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self.name = tokenizer.name_or_path or type(tokenizer).__name__
        self.plain = not tokenizer.chat_template
        self._remarks: Counter[str] = Counter()

    @property
    def notes(self) -> list[str]:
        """Remarks for the user: what was written in another way than asked so far, and how often."""
        plain = [f"{self.name} has no chat template: prompts are plain text."] if self.plain else []
        return [*plain, *(f"The chat template of {self.name} {what} ({n:,}×)." for what, n in self._remarks.items())]

    def prompt(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the tokens that the model reads before it answers.

        Raises:
            TemplateError: the template refuses these messages.
        """
        if self.plain:
            return self._plain_ids(messages)
        return self._ids(self._prompt_text(self._accepted(messages)))

    def tokens(self, messages: Sequence[Message], response: str, *, cut: bool = False) -> Tokens:
        """Return the tokens of the conversation so far, and of the answer to it.

        Args:
            messages: the conversation; the last one is the user's.
            response: the answer, its thoughts in front of it (``answers/thoughts.py``).
            cut: the answer was cut: no end of turn follows it. Nor does one follow thoughts that never close.

        Raises:
            TemplateError: the template refuses these messages or shows no answers; or the answer has an end of turn
                inside; or nothing is left of it.
        """
        parts = parted(response)
        cut = cut or parts.open
        if self.plain:
            ids = self._ids(response)
            return Tokens(self._plain_ids(messages), ids if cut else self._ended(ids))
        messages = self._accepted(messages)
        prompt_text = self._prompt_text(messages)
        response_text = self._response_text(messages, parts, prompt_text) + ("" if cut else self._end)
        if not response_text:
            raise TemplateError(f"The answer is empty, or thoughts that {self.name} has no place for.")
        prompt = self._ids(prompt_text)
        whole = self._ids(prompt_text + response_text)
        # A token that spans the border would be no token of the prompt: the model answers after the prompt's own.
        joined = whole[: len(prompt)] == prompt
        ids = whole[len(prompt) :] if joined else self._ids(response_text)
        return Tokens(prompt, ids if cut else self._ended(ids))

    @cached_property
    def opens_thoughts(self) -> str:
        """The end of the prompt, from the mark that opens thoughts on, where the template opens them; else nothing."""
        return "" if self.plain else _opened(self._prompt_text(QUESTION))

    def whole(self, messages: Sequence[Message]) -> tuple[int, ...]:
        """Return the tokens of a whole conversation, with its answers.

        Raises:
            TemplateError: the template refuses these messages.
        """
        return self._plain_ids(messages) if self.plain else self._ids(self._render(self._accepted(messages)))

    def pre_query(self, system: str | None) -> PreQuery:
        """Return what stands before the first words of a user, and what ends them.

        Args:
            system: a system prompt, or None.

        Raises:
            TemplateError: there is no template, it refuses the messages, or it doesn't show the user's words once.
        """
        if self.plain:
            raise TemplateError(f"{self.name} has no chat template: nothing stands before the words of a user.")
        messages = self._accepted(with_system((Message(role="user", content=PROBE),), system))
        text = self._render(messages, header=True)
        before, probe, after = text.partition(PROBE)
        put = self._put()
        if not probe or PROBE in after or before.strip() in ("", self.tokenizer.bos_token, put[0]):
            raise TemplateError(f"The chat template of {self.name} doesn't show the user's words once, behind others.")
        following = self._ids(after)
        special = next((token for token in following if token in self._special), None)
        name = "" if special is None else str(self.tokenizer.convert_ids_to_tokens(special))
        stop = (after.partition(name)[0] if name else after).strip().partition("\n")[0]
        tokens, ends = self._ids(before), {self.tokenizer.eos_token_id} - {None}
        ends |= self._special & {*tokens, *following}
        return PreQuery(before, tokens, frozenset(ends), stop or name, put)

    def _put(self) -> tuple[str, str]:
        """Return the texts of the tokens that the tokenizer puts before any text, and behind it, unless told."""
        bare, whole = self._ids("x"), tuple(self.tokenizer("x")["input_ids"])
        start = next((n for n in range(len(whole)) if whole[n : n + len(bare)] == bare), None)
        if start is None:  # it isn't the same text any more, so nothing of it can be told
            return "", ""
        before, behind = whole[:start], whole[start + len(bare) :]
        first, last = ("".join(map(str, self.tokenizer.convert_ids_to_tokens(list(ids)))) for ids in (before, behind))
        return first, last

    def _prompt_text(self, messages: Sequence[Message]) -> str:
        return self._render(messages, header=True) + self._missing_header

    def _accepted(self, messages: Sequence[Message]) -> Sequence[Message]:
        """Return the messages, the system prompt folded into the user's first turn where there is no place for it."""
        if len(messages) < 2 or messages[0]["role"] != "system" or self._takes_system:
            return messages
        if messages[1]["role"] != "user":
            return messages
        self._remarks["has no place for a system prompt: it is put before the first turn of the user"] += 1
        folded = f"{messages[0]['content']}\n\n{messages[1]['content']}"
        return [Message(role="user", content=folded), *messages[2:]]

    @cached_property
    def _takes_system(self) -> bool:
        try:
            return SYSTEM_PROBE in self._render([Message(role="system", content=SYSTEM_PROBE), *QUESTION], header=True)
        except TemplateError:
            return False

    def _response_text(self, messages: Sequence[Message], parts: Parts, prompt: str) -> str:
        """Return the text that follows the prompt, without the end of the turn.

        Where the template shows the answer as it is, that is the text it renders beyond the prompt. Some templates
        remove thoughts from answers, or write something else in the place of the header: with them it is the answer
        itself, as the model would have written it after the prompt.
        """
        if parts.has_thoughts and prompt.rstrip().endswith(tuple(MARKS.values())):
            self._remarks["closes thoughts before each answer: answers are taken without theirs"] += 1
            parts = Parts("", parts.answer)
        for message in self._messages(parts):
            whole = self._render([*messages, message])
            rest = whole.removeprefix(prompt).removesuffix(self._frame.after)
            framed = whole.startswith(prompt) and whole.endswith(self._frame.after)
            if framed and _shows(rest, parts, _opened(prompt)):
                return rest
        return self._written(parts, _opened(prompt))

    def _messages(self, parts: Parts) -> Iterator[Message]:
        """Yield the answer as a message: with thoughts in a field that the template knows, then in the content."""
        if parts.open:  # a template would close them
            return
        if parts.has_thoughts and self._thought_key:
            apart = {self._thought_key: parts.thoughts.strip()}
            yield cast(Message, {"role": "assistant", "content": parts.answer, **apart})
        yield Message(role="assistant", content=parts.whole)

    def _written(self, parts: Parts, opened: str) -> str:
        """Return the answer as a model writes it after a prompt that ends with ``opened``."""
        mark = next((mark for mark in MARKS if mark in (opened or self._lead)), OPENING)
        if not parts.has_thoughts:
            gap = opened.removeprefix(mark)
            return (gap + MARKS[mark] + 2 * gap if opened else self._lead) + parts.answer
        end = "" if parts.open else MARKS[mark] + parts.text
        if opened:
            return parts.thoughts.removeprefix(opened.removeprefix(mark)) + end
        return self._lead.partition(mark)[0] + mark + parts.thoughts + end

    @cached_property
    def _lead(self) -> str:
        """What the template writes between the prompt and an answer: a space, a channel, thoughts that are empty."""
        asked = self._prompt_text(QUESTION)
        return self._frame.before.removeprefix(asked) if self._frame.before.startswith(asked) else ""

    @cached_property
    def _thought_key(self) -> str | None:
        """The field of a message whose text the template writes before the answer, as thoughts."""
        for key in THOUGHT_KEYS:
            message = {"role": "assistant", "content": PROBE, key: THOUGHT_PROBE}
            try:
                text = self._render([*QUESTION, cast(Message, message)])
            except TemplateError:
                continue
            if PROBE in text.partition(THOUGHT_PROBE)[2]:
                return key
        return None

    @cached_property
    def _missing_header(self) -> str:
        """The header of the assistant's turn, where the template writes it only with answers and never when asked."""
        asked = self._render(QUESTION, header=True)
        between = self._frame.before.removeprefix(asked)
        silent = asked == self._render(QUESTION) and self._frame.before.startswith(asked)
        return between if silent and between.strip() else ""

    @cached_property
    def _end(self) -> str:
        """The end of a turn: the template's text after an answer, up to its first special token.

        The model never writes the rest (a line break, a second end).
        """
        for token in self._ids(self._frame.after):
            if token in self._special:
                name = str(self.tokenizer.convert_ids_to_tokens(token))
                return self._frame.after.partition(name)[0] + name
        return ""

    @cached_property
    def _frame(self) -> Frame:
        whole = self._render([*QUESTION, Message(role="assistant", content=PROBE)])
        before, probe, after = whole.partition(PROBE)
        if not probe:
            raise TemplateError(
                f"The chat template of {self.name} doesn't show the assistant's answer, so its tokens can't be told "
                f"from the prompt's. Use a tokenizer with another template."
            )
        return Frame(before, after)

    def _render(self, messages: Sequence[Message], header: bool = False) -> str:
        try:
            text = self.tokenizer.apply_chat_template(
                cast("list[dict[str, str]]", list(messages)),
                tokenize=False,
                add_generation_prompt=header,
                date_string=DATE,
            )
        except Exception as error:  # a template is a program: it may divide by zero, or recurse without end
            raise TemplateError(
                f"The chat template of {self.name} refuses a conversation of roles "
                f"{', '.join(message['role'] for message in messages)}: {error}"
            ) from error
        return cast(str, text)

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer(text, add_special_tokens=False)["input_ids"])

    def _plain_ids(self, messages: Sequence[Message]) -> tuple[int, ...]:
        text = "".join(f"{message['content']}\n\n" for message in messages)
        ids = tuple(self.tokenizer(text)["input_ids"])
        # An end of text that the tokenizer adds would come between prompt and answer.
        return ids[:-1] if len(ids) > 1 and ids[-1] == self.tokenizer.eos_token_id else ids

    def _ended(self, response: tuple[int, ...]) -> tuple[int, ...]:
        """Return the response with one token that ends its turn: the template's, or the end of text."""
        if (not response or response[-1] not in self._special) and self.tokenizer.eos_token_id is not None:
            response = (*response, self.tokenizer.eos_token_id)
        if response and response[-1] in response[:-1] and response[-1] in self._special:
            raise TemplateError(f"The answer holds the token that ends turns, {self.tokenizer.decode(response[-1])!r}.")
        return response

    @cached_property
    def _special(self) -> frozenset[int]:
        added = self.tokenizer.added_tokens_decoder
        return frozenset({*self.tokenizer.all_special_ids, *(key for key, token in added.items() if token.special)})


def _opened(prompt: str) -> str:
    """Return the end of a prompt, from the mark that opens thoughts on, if it ends with one; else nothing."""
    bare = prompt.rstrip()
    mark = next((mark for mark in MARKS if bare.endswith(mark)), "")
    return prompt[len(bare) - len(mark) :] if mark else ""


def _shows(rest: str, parts: Parts, opened: str) -> bool:
    """Return whether what a template wrote after the prompt is the answer with its thoughts, each of them once."""
    answer = parts.answer.strip()
    if parts.has_thoughts:
        before, found, after = rest.partition(parts.thoughts.strip())
        marks = sum(before.count(mark) for mark in MARKS)
        return bool(found) and answer in after and marks <= 1 and not (opened and before.strip())
    closed = any(mark in rest[: rest.find(answer)] for mark in MARKS.values())
    return answer in rest and (closed or not opened)
