"""Models in this process, through transformers: batched, left-padded, under their own chat template."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lite.answers import shrinking
from mergekit_lite.answers.asking import Failures, Sampling, Task
from mergekit_lite.answers.loading import Dtype, causal_model, context_of, placed, tokenizer_of
from mergekit_lite.answers.rows import Answer, Key, given_text, seed_of, with_system
from mergekit_lite.answers.template import ChatTemplate, TemplateError
from mergekit_lite.errors import RunError

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedTokenizerBase

BEFORE = 8  # tokens before an answer that is gone on with: some tokenizers drop the space that a text begins with
SERVE = "serve it, and give the source a `server`."


class ReadyModel(NamedTuple):
    """A model that is ready to answer."""

    model: Any  # of transformers
    ends: frozenset[int]  # tokens that end an answer


class Draw(NamedTuple):
    """An answer, with the tokens that it was made of."""

    answer: Answer
    prompt: tuple[int, ...]  # that the model read
    tokens: tuple[int, ...]  # that it drew; the last one ends the answer, unless a limit or a text that stops did


class _Asked(NamedTuple):
    prompt: str  # its id
    given: str  # the beginning of the answer


class _Work(NamedTuple):
    task: Task
    prompt: tuple[int, ...]  # tokens


@dataclass(eq=False)
class Local:
    """A respondent in this process, whose model is loaded when it is first needed.

    Answers are drawn batch by batch, each batch with its own seed. Batches are cut from all tasks, so an answer depends
    on the tasks, the batch size and the machine, not on where a run was stopped.
    """

    name: str  # of the source
    path: str  # a folder, or org/name on the hub. Code in it is never run.
    sampling: Sampling  # how answers are drawn
    system: str | None = None  # a system prompt put before each conversation
    batch_size: int = 16  # how many answers are generated at once
    device: str | None = None  # cpu, cuda, cuda:1 …, or auto: all GPUs. By default the first GPU, else the CPU.
    dtype: Dtype | None = None  # float32, bfloat16 or float16; by default float32 on a CPU, else the model's own
    failures: Failures = field(default_factory=Failures, init=False)  # so far
    _prompts: dict[_Asked, tuple[int, ...] | None] = field(default_factory=dict, init=False)  # tokens; None: refused
    _refused: dict[_Asked, str] = field(default_factory=dict, init=False)  # reasons

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
        """Yield the answers to the ``wanted`` of the ``tasks``, batch by batch.

        Raises:
            CheckpointError: the model can't be loaded.
            RunError: a batch doesn't fit into memory.
        """
        if not wanted:
            return
        work = self._work(tasks)
        for start in range(0, len(work), self.batch_size):
            yield from self._wanted(work[start : start + self.batch_size], wanted)

    def batch(self, tasks: Sequence[Task], wanted: frozenset[Key], number: int) -> list[Answer]:
        """Return the answers that ``answers`` yields of one batch, counted from 0; none where there is no such batch.

        Raises as ``answers``.
        """
        work = self._work(tasks)[number * self.batch_size :]
        return list(self._wanted(work[: self.batch_size], wanted))

    def draws(self, tasks: Sequence[Task], wanted: frozenset[Key], number: int) -> list[Draw]:
        """Return what ``batch`` returns, with the tokens. Raises as ``answers``."""
        batch = self._work(tasks)[number * self.batch_size :][: self.batch_size]
        if not any(task.key in wanted for task, _ in batch):
            return []
        return [draw for draw in self._drawn(batch) if draw.answer.key in wanted]

    def _wanted(self, batch: Sequence[_Work], wanted: frozenset[Key]) -> Iterator[Answer]:
        """Yield the ``wanted`` answers of a batch."""
        if any(task.key in wanted for task, _ in batch):
            yield from (draw.answer for draw in self._drawn(batch) if draw.answer.key in wanted)

    def _work(self, tasks: Sequence[Task]) -> list[_Work]:
        """Return all tasks that can be answered, longest prompts first.

        So prompts of a batch need little padding, and a lack of memory shows in the first batch.
        """
        work = []
        for task in tasks:
            asked = _Asked(task.prompt.id, given_text(task.prompt.messages))
            if asked not in self._prompts:
                self._prompts[asked] = self._prompt(task, asked)
            if (tokens := self._prompts[asked]) is None:
                self.failures.lost[task.key] = self._refused[asked]
            else:
                work.append(_Work(task, tokens))
        return sorted(work, key=lambda work: -len(work.prompt))

    def _prompt(self, task: Task, asked: _Asked) -> tuple[int, ...] | None:
        try:
            tokens = self._tokens(task)
        except TemplateError as error:
            self._refused[asked] = str(error)
            return None
        if self._context is not None and len(tokens) >= self._context:
            self._refused[asked] = f"the prompt has {len(tokens):,} tokens, the model takes {self._context:,}"
            return None
        return tokens

    def _tokens(self, task: Task) -> tuple[int, ...]:
        """Return what the model reads of a task. Raises TemplateError where its template refuses that."""
        messages = with_system(task.prompt.messages, self.system)
        if not (given := given_text(messages)):
            return self.template.prompt(messages)
        begun = self.template.tokens(messages[:-1], given, cut=True)
        return (*begun.prompt, *begun.response)

    def _drawn(self, batch: Sequence[_Work]) -> Iterator[Draw]:
        import torch

        longest = max(len(work.prompt) for work in batch)
        ids = torch.zeros((len(batch), longest), dtype=torch.long)
        mask = torch.zeros_like(ids)
        for row, (_, prompt) in enumerate(batch):
            # Padded with a token of its own: a repetition penalty looks at all tokens, masked or not.
            ids[row] = prompt[0]
            ids[row, longest - len(prompt) :] = torch.tensor(prompt)
            mask[row, longest - len(prompt) :] = 1
        most = self.sampling.max_tokens
        if self._context is not None:
            most = min(most, self._context - longest)
        model = self.loaded.model
        torch.manual_seed(seed_of(*(work.task.seed for work in batch)))
        stops = Stops(self.tokenizer, self.sampling.stop or (), longest, len(batch))
        try:
            with torch.inference_mode():
                if self._shrinks:
                    answers = shrinking.generate(model, ids, mask, most, self.loaded.ends)
                else:
                    sequences = model.generate(
                        ids.to(model.device),
                        attention_mask=mask.to(model.device),
                        max_new_tokens=most,
                        stopping_criteria=[stops] if self.sampling.stop else None,
                    )
                    answers = sequences[:, longest:].tolist()
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(
                f"{self.path}: {len(batch)} answers at once to prompts of up to {longest:,} tokens don't fit into the "
                f"memory of {model.device}. Lower `batch_size` of the source {self.name}."
            ) from error
        for work, tokens, stopped in zip(batch, answers, stops.at, strict=True):
            yield self._draw(work, tokens[:stopped], stopped is not None)

    def _draw(self, work: _Work, tokens: list[int], stopped: bool) -> Draw:
        end = next((place for place, token in enumerate(tokens) if token in self.loaded.ends), None)
        text = self._decoded(work, tokens[:end])
        if stopped:
            places = [place for stop in self.sampling.stop or () if (place := text.find(stop)) >= 0]
            text = text[: min(places, default=len(text))]
        text = self._said(work.task, text)
        finish = "length" if end is None and not stopped else "stop"
        task = work.task
        answer = Answer(task.prompt.id, self.name, task.index, text, finish, len(tokens[:end]))
        return Draw(answer, work.prompt, tuple(tokens if end is None else tokens[: end + 1]))

    def _decoded(self, work: _Work, tokens: list[int]) -> str:
        """Return the text of the tokens that a model drew."""
        if not given_text(work.task.prompt.messages):
            return decoded(self.tokenizer, tokens)
        before = list(work.prompt[-BEFORE:])
        return decoded(self.tokenizer, before + tokens).removeprefix(decoded(self.tokenizer, before))

    def _said(self, task: Task, text: str) -> str:
        """Return the whole answer to a task, with the beginning that was given."""
        given = given_text(task.prompt.messages)
        return given + text if given else self._whole(text)

    def _whole(self, text: str) -> str:
        """Return an answer with the mark of the thoughts that the chat template has opened, and it goes on from."""
        return self.template.opens_thoughts + text

    @property
    def notes(self) -> list[str]:
        """Remarks for the user on how prompts were written."""
        return self.template.notes

    @cached_property
    def template(self) -> ChatTemplate:
        """The model's chat template."""
        return ChatTemplate(self.tokenizer)

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The model's tokenizer."""
        return tokenizer_of(self.path, SERVE)

    @cached_property
    def _context(self) -> int | None:
        """The longest sequence that the model takes, in tokens; None where its config doesn't say."""
        return context_of(self.loaded.model)

    @cached_property
    def _shrinks(self) -> bool:
        """Whether answers that have ended leave their batch. A text that stops answers is looked for in whole ones."""
        return not self.sampling.stop and shrinking.can_shrink(self.loaded.model)

    @cached_property
    def loaded(self) -> ReadyModel:
        """The model, ready to answer."""
        model = causal_model(self.path, placed(self.device, self.dtype), SERVE)
        return ready(model, self.tokenizer, self.sampling, self._more_ends)

    @property
    def _more_ends(self) -> frozenset[int]:
        """Tokens that end an answer beside those of the model and its tokenizer."""
        return frozenset()


class Stops:
    """Ends an answer at the first of some texts. ``at``: each answer's number of tokens by then, or None."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase, stops: Sequence[str], start: int, rows: int):
        self.tokenizer = tokenizer
        self.stops = stops
        self.start = start  # of the answers, in tokens
        self.tail = max(map(len, stops), default=0) + 4  # tokens that hold a stop: each token but special ones has text
        self.at: list[int | None] = [None] * rows

    def __call__(self, ids: torch.Tensor, scores: object, **_: object) -> torch.Tensor:
        """Return which answers have ended."""
        import torch

        made = ids.shape[1] - self.start
        for row, before in enumerate(self.at):
            if before is None:
                text = decoded(self.tokenizer, ids[row, self.start :][-self.tail :].tolist())
                if any(stop in text for stop in self.stops):
                    self.at[row] = made
        return torch.tensor([at is not None for at in self.at], device=ids.device)


def decoded(tokenizer: PreTrainedTokenizerBase, tokens: list[int]) -> str:
    """Return the text of tokens, special ones left out."""
    return str(tokenizer.decode(tokens, skip_special_tokens=True, clean_up_tokenization_spaces=False))


def ready(
    model: Any, tokenizer: PreTrainedTokenizerBase, sampling: Sampling, more_ends: frozenset[int] = frozenset()
) -> ReadyModel:
    """Replace a model's generation config by the sampling; settings that it doesn't have become neutral.

    ``more_ends``: tokens that end an answer, too.
    """
    from transformers import GenerationConfig

    model.eval()
    ends = ends_of(model.generation_config.eos_token_id, tokenizer) | more_ends
    drawn = sampling.temperature > 0
    warped: dict[str, Any] = {}
    if drawn:
        warped = {"temperature": sampling.temperature, "top_p": sampling.top_p, "top_k": sampling.top_k or 0}
        warped |= {} if sampling.min_p is None else {"min_p": sampling.min_p}
    settings: Any = GenerationConfig  # has no types
    model.generation_config = settings(
        do_sample=drawn,
        repetition_penalty=sampling.repetition_penalty,
        eos_token_id=sorted(ends) or None,
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else min(ends, default=0),
        **warped,
    )
    return ReadyModel(model, ends)


def ends_of(configured: int | list[int] | None, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    """Return the tokens that end an answer: the tokenizer's, and those of the model that are special tokens.

    A configuration without such tokens has its family's default, which in another vocabulary may be any word.
    """
    added = tokenizer.added_tokens_decoder
    special = {*tokenizer.all_special_ids, *(number for number, token in added.items() if token.special)}
    given = configured if isinstance(configured, list) else [configured]
    by_model = {token for token in given if isinstance(token, int)}  # others are mistakes in a file
    own = set() if tokenizer.eos_token_id is None else {tokenizer.eos_token_id}
    return frozenset(own | (by_model & special))
