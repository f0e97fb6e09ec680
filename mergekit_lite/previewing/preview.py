"""Hear an alpha before it is written: the answers of several alphas to some prompts, in one call."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mergekit_lite.answers.rows import Message, Prompt, seed_of, user_text
from mergekit_lite.engine.devices import explained
from mergekit_lite.errors import NonFiniteError, counted
from mergekit_lite.options import named_options
from mergekit_lite.previewing.request import ALIGNED, SFT, Prepared, Request, conversation, prepare, sampling_of
from mergekit_lite.previewing.search import Beam

if TYPE_CHECKING:
    from mergekit_lite.previewing.drafts import Drafts, Reader
    from mergekit_lite.previewing.opened import Opened


@dataclass(frozen=True)
class Previewed:
    """The answer of one alpha to one prompt.

    Attributes:
        alpha: the alpha.
        text: the answer, without special tokens.
        tokens: their number, the end of the turn not counted.
        finish: ``stop`` where the answer ended by itself, ``length`` where the limit cut it.
        log_probs: the mean log-probability of its tokens, the end included, under each model that was loaded: by
            ``SFT``, ``ALIGNED``, ``ON``; None where a model doesn't have one of the tokens.
    """

    alpha: float
    text: str
    tokens: int
    finish: str
    log_probs: Mapping[str, float | None]


@dataclass(frozen=True)
class Preview:
    """The answers to one prompt.

    Attributes:
        prompt: what was asked.
        answers: one for each alpha, in their order.
        seconds: that it took.
    """

    prompt: Prompt
    answers: tuple[Previewed, ...]
    seconds: float

    @property
    def question(self) -> str:
        """The user's last message."""
        return user_text(self.prompt.messages)


OnTokens = Callable[[list[list[int]]], None]  # called with the tokens so far, by alpha


@named_options
def preview(
    sft: str,
    aligned: str,
    prompts: Sequence[str | Sequence[Message]],
    alphas: Sequence[float] = (0.0, 0.3, 0.6),
    *,
    on: str | None = None,
    system: str | None = None,
    temperature: float | None = None,
    top_p: float = 1.0,
    repetition_penalty: float = 1.0,
    max_tokens: int = 256,
    beam: tuple[int, int, float] | None = None,
    seed: int = 0,
    device: str = "cpu",
    dtype: str | None = None,
    threads: int | None = None,
) -> list[Preview]:
    """Answer prompts as the models ``aligned + alpha·(aligned − sft)`` might, from logits, without writing one.

    At each step the logits are ``base + (1 + alpha)·(aligned − sft)``, where base is ``sft``, or ``on``. At alpha 0
    that is the aligned model, at −1 the base, to the token. At others it is near to the model that ``extrapolate``
    makes, and not the same (docs/preview.md).

    Args:
        sft: the model before alignment: a reference to a model with a config and a tokenizer.
        aligned: the model after; prompts are put to all models under its chat template.
        prompts: texts, or conversations that end with the user's turn.
        alphas: any numbers, each once.
        on: a model of the same vocabulary, and of any size, that the pair's change is added to.
        system: a system prompt before each conversation that has none of its own.
        temperature: of the draws, which all alphas share; 0, greedy, by default, with ``beam`` 0.7.
        top_p: the share of the likeliest tokens that are drawn from, in (0, 1].
        repetition_penalty: divides the logits of tokens that are there already; 1 is none.
        max_tokens: most tokens of an answer.
        beam: width, successors and length of a chunk-level beam search; None for none.
        seed: of the draws.
        device: ``cpu``, ``cuda``, ``cuda:1`` … or ``auto``.
        dtype: ``float32``, ``bfloat16`` or ``float16``; by default ``float32`` on the CPU, else the models' own.
        threads: that read the weights; one for each core by default.

    Returns:
        The answers to each prompt.

    Raises:
        UsageError: an option is wrong, a model can't be loaded, the vocabularies differ, or there is too little memory.
        CheckpointError, NonFiniteError: weights can't be read, or are no numbers.
        RunError: the memory ran out, or mixed logits are no numbers.
    """
    sampling = sampling_of(temperature, top_p, repetition_penalty, max_tokens, searching=beam is not None)
    asked = tuple(conversation([{"role": "user", "content": one}] if isinstance(one, str) else one) for one in prompts)
    prepared = prepare(
        Request(
            sft=str(sft),
            aligned=str(aligned),
            alphas=tuple(map(float, alphas)),
            prompts=asked,
            on=None if on is None else str(on),
            system=system,
            sampling=sampling,
            beam=None if beam is None else Beam(*beam),
            seed=seed,
            device=device,
            dtype=dtype,
            threads=threads,
        )
    )
    with loaded(prepared) as readers:
        return list(previews(prepared, readers))


@contextmanager
def loaded(prepared: Prepared) -> Iterator[list[Reader]]:
    """Load the models, and free their memory with the context.

    Raises:
        CheckpointError: an input can't be read.
        NonFiniteError: weights are NaN or infinite.
    """
    from mergekit_lite.answers.loading import free_memory
    from mergekit_lite.previewing.drafts import Reader

    readers: list[Reader] = []
    try:
        with explained(prepared.device):
            readers += [Reader(_model(opened, prepared)) for opened in prepared.models]
        yield readers
    finally:
        readers.clear()
        free_memory()


class Kept:
    """Models that stay loaded from one preview to the next, as long as that needs the same ones, of the same files."""

    def __init__(self) -> None:
        """Keep none yet."""
        self._of: object = None
        self._readers: list[Reader] = []
        self._held = ExitStack()

    def make_room(self, models: Sequence[Opened], device: str) -> bool:
        """Let go of models that aren't these; return whether these are loaded."""
        if self._of is not None and self._of == _identity(models, device):
            return True
        self.let_go()
        return False

    @contextmanager
    def loaded(self, prepared: Prepared) -> Iterator[list[Reader]]:
        """Load the models, unless they are. Raises as ``loaded`` does."""
        if not self.make_room(prepared.models, prepared.device):
            of = _identity(prepared.models, prepared.device)  # before they are read: they may change meanwhile
            self._readers = self._held.enter_context(loaded(prepared))
            self._of = of
        try:
            yield self._readers
        finally:
            for reader in self._readers:
                reader.forget()

    def let_go(self) -> None:
        """Free the memory of the models."""
        self._of = None
        self._readers = []
        self._held.close()


def _identity(models: Sequence[Opened], device: str) -> object:
    """Return what tells loaded models apart: their files, as the disk has them now, and what becomes of them.

    Files elsewhere are never the same ones.
    """
    return device, [
        (
            model.role,
            model.reference,
            {job.dtype for job in model.plan.jobs},
            [each.config for each in model.plan.inputs],
            [_as_it_is(Path(file.path)) for each in model.plan.inputs for file in each.files_read],
        )
        for model in models
    ]


def _as_it_is(path: Path) -> object:
    try:
        found = path.stat()
    except OSError:
        return object()
    return str(path), found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


def _model(opened: Opened, prepared: Prepared) -> Any:
    from mergekit_lite.resident.model import build
    from mergekit_lite.resident.weights import Weights

    built = build(opened.plan, prepared.device)
    result = Weights(built, prepared.device, prepared.request.threads).set(opened.plan)
    if result.nonfinite:
        raise NonFiniteError(
            f"{opened.role} ({opened.reference}): NaN or infinity in {counted(len(result.nonfinite), 'tensor')}, first "
            f"in {result.nonfinite[0]}."
        )
    return built.model


def previews(prepared: Prepared, readers: Sequence[Reader], watch: OnTokens | None = None) -> Iterator[Preview]:
    """Yield the answers to one prompt after the other.

    Args:
        prepared: from ``prepare``.
        readers: the loaded models.
        watch: called after each step.

    Raises:
        RunError: the memory ran out, or mixed logits are no numbers.
    """
    import torch

    for prompt, tokens in zip(prepared.request.prompts, prepared.prompts, strict=True):
        started = time.monotonic()
        with torch.inference_mode(), explained(prepared.device):
            answers = _answers(prepared, readers, prompt, tokens, watch)
        yield Preview(prompt, answers, time.monotonic() - started)


def _answers(
    prepared: Prepared, readers: Sequence[Reader], prompt: Prompt, tokens: Sequence[int], watch: OnTokens | None
) -> tuple[Previewed, ...]:
    import torch

    from mergekit_lite.previewing.drafts import Drafts, Rules
    from mergekit_lite.previewing.search import grown, searched

    request, beam = prepared.request, prepared.request.beam
    rules = Rules(request.sampling, prepared.ends, seed_of(request.seed, prompt.id))
    weights = torch.tensor(prepared.weights)
    drafts = Drafts(readers, weights, tokens, rules, beam.drafts if beam else 1)
    contexts = [model.context for model in prepared.models if model.context is not None]
    most = min([request.sampling.max_tokens, *(context - len(tokens) for context in contexts)])

    def seen(drafts: Drafts) -> None:
        if watch is not None:
            first = [(drafts.alphas == alpha).nonzero()[0, 0] for alpha in range(len(request.alphas))]
            watch([drafts.answer(int(draft)) for draft in first])

    if beam is None:
        best = grown(drafts, most, seen)
    else:
        roles = [model.role for model in prepared.models]
        best = searched(drafts, most, seen, beam, roles.index(ALIGNED), roles.index(SFT))
    return tuple(_previewed(prepared, drafts, draft, alpha) for draft, alpha in zip(best, request.alphas, strict=True))


def _previewed(prepared: Prepared, drafts: Drafts, draft: int, alpha: float) -> Previewed:
    tokens = drafts.answer(draft)
    ended = bool(drafts.ended[draft])
    means = {
        model.role: float(total) / len(tokens)
        for model, total in zip(prepared.models, drafts.log_probs[:, draft], strict=True)
    }
    return Previewed(
        alpha=alpha,
        text=text_of(prepared, tokens[: len(tokens) - ended]),
        tokens=len(tokens) - ended,
        finish="stop" if ended else "length",
        log_probs={role: mean if math.isfinite(mean) else None for role, mean in means.items()},
    )


def text_of(prepared: Prepared, tokens: Sequence[int]) -> str:
    """Return tokens of an answer as text, without special ones."""
    text: str = prepared.aligned.tokenizer.decode(
        list(tokens), skip_special_tokens=True, clean_up_tokenization_spaces=False
    )
    return text
