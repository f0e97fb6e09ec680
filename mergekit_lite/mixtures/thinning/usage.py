"""How often a mixture's experts are chosen: the model reads prompts, and its routers' choices are counted.

transformers' classes read them, so that what is counted is what the model does, whatever its router adds or limits.
Prompts go through its chat template, in batches padded at the end; what stands in the padding isn't counted.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from mergekit_lite.answers.loading import context_of
from mergekit_lite.answers.prompts import LoadedPrompts, Prompts, digest_of, load
from mergekit_lite.answers.rows import Message, Prompt
from mergekit_lite.answers.template import ChatTemplate, TemplateError
from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.errors import CheckpointError, UsageError, counted
from mergekit_lite.mixtures.layers import ROUTERS
from mergekit_lite.resident.model import tokenizer_of
from mergekit_lite.resident.whole import check_memory, check_tokens, loaded, plan_of_whole

if TYPE_CHECKING:
    import torch

BATCH = 8  # prompts that are read at once, of similar lengths
MODULE = re.compile(rf"(?:.*\.)?layers\.(\d+)\.(?:.*\.)?({'|'.join(ROUTERS)})")


class Usage(NamedTuple):
    """How often experts were chosen.

    Attributes:
        counts: for each layer with experts, by its number, how many tokens chose each expert.
        tokens: that were read.
        prompts: that they are from.
        cut: prompts that were cut at the longest text that the model takes.
    """

    counts: dict[int, tuple[int, ...]]
    tokens: int
    prompts: int
    cut: int


def prompts_in(files: Iterable[Path]) -> LoadedPrompts:
    """Read the prompts of files. Raises UsageError where one can't be read, or has no column with prompts."""
    return load(Prompts(path=path) for path in files)


def prompts_of(texts: Iterable[str]) -> list[Prompt]:
    """Return texts as prompts."""
    asked = [(Message(role="user", content=text),) for text in texts]
    return [Prompt(digest_of(messages), messages) for messages in asked]


def measured(
    mixture: Checkpoint,
    prompts: Sequence[Prompt],
    experts: int,
    *,
    device: str = "cpu",
    threads: int | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> Usage:
    """Let a mixture read prompts, and count which experts its routers choose.

    Args:
        mixture: the model, which is loaded into this process.
        prompts: conversations; the model reads them up to where it would answer.
        experts: how many it has in a layer.
        device: ``cpu``, ``cuda`` ….
        threads: workers that read the weights.
        progress: called with (tokens read, tokens in all).

    Raises:
        UsageError: there are no prompts, the template refuses one, the model has no tokenizer, or one with more tokens
            than rows, doesn't fit into memory, or transformers can't load it.
        CheckpointError: its routers don't say what they choose.
        RunError: it can't be read.
    """
    import torch

    plan = plan_of_whole(mixture, device)
    check_memory(plan, device, "choose by weights or router, which runs no model")
    tokens = _tokens(ChatTemplate(tokenizer_of(plan)), prompts)
    model = loaded(plan, device, threads).model
    check_tokens(tokens, len(model.get_input_embeddings().weight), mixture.reference)
    most = context_of(model)
    rows = sorted((row[:most] for row in tokens), key=len, reverse=True)
    in_all, done = sum(map(len, rows)), 0
    counters: dict[int, torch.Tensor] = {}
    with torch.inference_mode(), ExitStack() as hooks:
        mask: list[torch.Tensor] = [torch.empty(0)]
        for number, router in _routers(model):
            counters[number] = torch.zeros(experts, dtype=torch.int64)
            handle = router.register_forward_hook(_counting(counters[number], mask))
            hooks.callback(handle.remove)
        if not counters:
            raise CheckpointError(
                f"{mixture.reference}: transformers' model has no module called {' or '.join(ROUTERS)} in layers."
            )
        for start in range(0, len(rows), BATCH):
            batch = rows[start : start + BATCH]
            ids = torch.zeros(len(batch), len(batch[0]), dtype=torch.int64)
            mask[0] = torch.zeros_like(ids)
            for place, row in enumerate(batch):
                ids[place, : len(row)] = torch.tensor(row)
                mask[0][place, : len(row)] = 1
            model.base_model(ids.to(model.device), attention_mask=mask[0].to(model.device), use_cache=False)
            done += sum(map(len, batch))
            if progress is not None:
                progress(done, in_all)
    cut = sum(most is not None and len(row) > most for row in tokens)
    return Usage({number: tuple(of.tolist()) for number, of in counters.items()}, in_all, len(rows), cut)


def described(usage: Usage) -> str:
    """Return in words what was counted."""
    cut = f", {usage.cut:,} of them cut at the longest text that the model takes" if usage.cut else ""
    return f"{counted(usage.tokens, 'token')} of {counted(usage.prompts, 'prompt')}{cut}"


def _tokens(template: ChatTemplate, prompts: Sequence[Prompt]) -> list[tuple[int, ...]]:
    """Return the prompts as the model reads them."""
    try:
        rows = [row for prompt in prompts if (row := template.prompt(prompt.messages))]
    except TemplateError as error:
        raise UsageError(str(error)) from error
    if not rows:
        raise UsageError("No prompts: usage is counted on texts, so name a file of them: --prompts prompts.jsonl.")
    return rows


def _routers(model: Any) -> Iterator[tuple[int, Any]]:
    """Yield each layer's number and its router, as transformers built it: modules with rows for the experts."""
    for name, module in model.named_modules():
        if (match := MODULE.fullmatch(name)) and getattr(module, "weight", None) is not None:
            yield int(match[1]), module


def _counting(counts: torch.Tensor, mask: Sequence[torch.Tensor]) -> Callable[[Any, Any, Any], None]:
    """Return a hook that counts a router's choices: the whole numbers that it returns, a row for each token."""

    def count(router: Any, inputs: object, outputs: Any) -> None:
        import torch

        parts = outputs if isinstance(outputs, tuple) else (outputs,)
        chosen = [part for part in parts if not part.is_floating_point() and part.dim() == 2]
        if len(chosen) != 1:
            raise CheckpointError(
                f"{type(router).__name__} of transformers doesn't say which experts it chose, so their usage can't be "
                "counted. Choose by weights or router instead."
            )
        read = mask[0].reshape(-1).bool()
        counts.add_(torch.bincount(chosen[0].cpu()[read].reshape(-1), minlength=len(counts)))

    return count
