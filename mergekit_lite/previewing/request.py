"""The request of a preview, and all checks of it that need no weights."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.prompts import LoadedPrompts, Prompts, digest_of, load
from mergekit_lite.answers.rows import Message, Prompt, own_systems, with_system
from mergekit_lite.answers.template import ChatTemplate, TemplateError
from mergekit_lite.engine.devices import chosen_device
from mergekit_lite.errors import UsageError, counted, listing
from mergekit_lite.previewing.opened import Opened, check_memory, check_vocabularies, opened
from mergekit_lite.previewing.search import Beam

SFT, ALIGNED, ON = "SFT", "ALIGNED", "ON"
DRAWN = 0.7  # the temperature of a search, by default
DTYPES = ("float32", "bfloat16", "float16")


@dataclass(frozen=True)
class Request:
    """A preview, as the command line gives it."""

    sft: str
    aligned: str
    alphas: tuple[float, ...]
    prompts: tuple[Prompt, ...]
    on: str | None = None
    system: str | None = None
    sampling: Sampling = field(default_factory=lambda: Sampling(temperature=0))
    beam: Beam | None = None
    seed: int = 0
    device: str = "cpu"
    dtype: str | None = None
    threads: int | None = None


@dataclass(frozen=True)
class Prepared:
    """A preview that can be carried out: no weight is read yet."""

    request: Request
    aligned: Opened  # gives tokenizer and template, even where its weights aren't needed
    models: tuple[Opened, ...]  # that are loaded, each once
    weights: tuple[tuple[float, ...], ...]  # of each model's logits, for each alpha
    prompts: tuple[tuple[int, ...], ...]  # as tokens
    device: str
    ends: frozenset[int]  # tokens that end an answer
    notes: tuple[str, ...]  # remarks for the user

    @property
    def most(self) -> int:
        """The most tokens of an answer."""
        return self.request.sampling.max_tokens

    @property
    def drafts(self) -> int:
        """How many answers grow at once."""
        return len(self.request.alphas) * (self.request.beam.drafts if self.request.beam else 1)

    @property
    def memory(self) -> int:
        """The bytes that weights, and keys and values of the longest prompt, are expected to take."""
        longest = max(map(len, self.prompts)) + self.most
        return sum(model.weights + model.cached(longest) * self.drafts for model in self.models)


def sampling_of(
    temperature: float | None, top_p: float, repetition_penalty: float, max_tokens: int, *, searching: bool
) -> Sampling:
    """Return the sampling of these numbers. Raises UsageError where one is out of its range."""
    drawn = temperature if temperature is not None else DRAWN if searching else 0.0
    wrong = [f"top-p: expected a number above 0, up to 1, got {top_p:g}"] * (not 0 < top_p <= 1)
    wrong += [f"temperature: expected a number from 0, got {drawn:g}"] * (not 0 <= drawn < math.inf)
    wrong += [f"repetition-penalty: expected a number above 0, got {repetition_penalty:g}"] * (
        not 0 < repetition_penalty < math.inf
    )
    wrong += [f"max-tokens: expected a number from 1, got {max_tokens}"] * (max_tokens < 1)
    if searching and drawn == 0:
        wrong.append("temperature 0: a search chooses among different draws, greedy ones are all alike")
    if wrong:
        raise UsageError(listing("Answers can't be drawn so", wrong) if len(wrong) > 1 else f"{wrong[0]}.")
    return Sampling(temperature=drawn, top_p=top_p, repetition_penalty=repetition_penalty, max_tokens=max_tokens)


def prepare(request: Request, has_room: Callable[[Sequence[Opened], str], bool] | None = None) -> Prepared:
    """Check a request; of the models only headers are read.

    ``has_room`` tells of models and a device whether they are in its memory already.

    Raises:
        UsageError: it can't be carried out.
    """
    _check(request)
    device = chosen_device(request.device)
    references = {SFT: request.sft, ALIGNED: request.aligned} | ({} if request.on is None else {ON: request.on})
    every = opened(references, request.dtype or ("float32" if device == "cpu" else None))
    by_role = {model.role: model for model in every}
    aligned = by_role[ALIGNED]
    notes = check_vocabularies([aligned, *(model for model in every if model is not aligned)])
    factors = {model.role: tuple(_weight(model.role, alpha, request.on) for alpha in request.alphas) for model in every}
    needed = {SFT, ALIGNED} if request.beam else set()
    models = tuple(model for model in every if any(factors[model.role]) or model.role in needed)
    if has_room is None or not has_room(models, device):
        check_memory(models, device)
    template = ChatTemplate(aligned.tokenizer)
    prompts = tuple(_tokens(prompt, request, template, models) for prompt in request.prompts)
    notes += template.notes
    notes += [said] if (said := own_systems(request.prompts, request.system)) is not None else []
    ends = frozenset().union(*(model.ends() for model in every))
    weights = tuple(factors[model.role] for model in models)
    return Prepared(request, aligned, models, weights, prompts, device, ends, tuple(notes))


def _weight(role: str, alpha: float, on: str | None) -> float:
    """Return a model's factor in base + (1 + alpha)·(aligned − sft)."""
    if role == ON:
        return 1.0
    if role == ALIGNED:
        return 1 + alpha
    return -alpha if on is None else -(1 + alpha)


def _check(request: Request) -> None:
    problems = []
    if not request.prompts:
        problems.append("What is to be asked? Give --prompt TEXT, or --prompts FILE.")
    if not request.alphas or not all(map(math.isfinite, request.alphas)):
        problems.append("Which alphas? Expected finite numbers, for instance 0,0.3,0.6.")
    if len(set(request.alphas)) < len(request.alphas):
        problems.append("The same alpha was given twice.")
    if request.dtype is not None and request.dtype not in DTYPES:
        problems.append(f"dtype {request.dtype!r}: expected one of {', '.join(DTYPES)}.")
    beam = request.beam
    if beam is not None and not (beam.width >= 1 and beam.successors >= 1 and beam.length >= 1):
        problems.append("A search needs at least one draft, one successor and one token: for instance 4,4,10.")
    if problems:
        raise UsageError(problems[0] if len(problems) == 1 else listing("This can't be done as asked", problems))


def asked_prompts(texts: Sequence[str], files: Sequence[Path]) -> LoadedPrompts:
    """Return the prompts that were typed, then those of the files, with the problems of the files' rows.

    Raises:
        UsageError: a file can't be read, or has no column with prompts.
    """
    read = load(Prompts(path=path) for path in files)
    typed = [conversation([Message(role="user", content=text)]) for text in texts]
    return LoadedPrompts([*typed, *read.prompts], read.problems, read.repeated)


def conversation(messages: Sequence[Message]) -> Prompt:
    """Return a conversation, whose last turn is the user's, as a prompt."""
    return Prompt(digest_of(messages), tuple(messages))


def _tokens(prompt: Prompt, request: Request, template: ChatTemplate, models: Sequence[Opened]) -> tuple[int, ...]:
    """Return a prompt as tokens. Raises UsageError where a model can't read it."""
    try:
        tokens = template.prompt(with_system(prompt.messages, request.system))
    except TemplateError as error:
        raise UsageError(str(error)) from error
    for model in models:
        unknown = [token for token in tokens if token >= model.width]
        if unknown:
            name = template.tokenizer.convert_ids_to_tokens(unknown[0])
            raise UsageError(
                f"The prompt has the token {unknown[0]} ({name!r}), but {model.role} ({model.reference}) has only "
                f"{model.width:,}: it can't read it."
            )
        if model.context is not None and len(tokens) >= model.context:
            raise UsageError(
                f"The prompt has {counted(len(tokens), 'token')}, {model.role} ({model.reference}) takes "
                f"{model.context:,}, the answer included."
            )
    return tokens
