"""Models in this process through vLLM's offline engine, where it is installed: many times faster than ``generate``.

Prompts are the same tokens as with ``Local``. Every answer has its own seed, so it doesn't depend on what it is
batched with, as far as vLLM's arithmetic doesn't.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from importlib.util import find_spec
from typing import Any

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.loading import CAUSAL, config_of, fetched
from mergekit_lite.answers.local import SERVE, Local
from mergekit_lite.answers.rows import Answer, Key

AT_ONCE = 4096  # answers that vLLM is given; a kill loses those in work


def is_installed() -> bool:
    """Whether vLLM is installed. Doesn't import it."""
    return find_spec("vllm") is not None


@dataclass(eq=False)
class Offline(Local):
    """A respondent in this process, whose answers vLLM draws."""

    options: Mapping[str, Any] = field(default_factory=dict)  # more arguments of ``vllm.LLM``

    def answers(self, tasks: Sequence[Task], wanted: frozenset[Key]) -> Iterator[Answer]:
        """Yield the answers to the ``wanted`` of the ``tasks``, portion by portion.

        Raises:
            CheckpointError: the model can't be loaded.
            TemplateError: the chat template refuses the system prompt.
        """
        work = self._work([task for task in tasks if task.key in wanted])
        for start in range(0, len(work), AT_ONCE):
            portion = work[start : start + AT_ONCE]
            prompts = [{"prompt_token_ids": list(each.prompt)} for each in portion]
            settings = [self._settings(each.task, len(each.prompt)) for each in portion]
            outputs = self.engine.generate(prompts, settings, use_tqdm=False)
            for each, output in zip(portion, outputs, strict=True):
                made = output.outputs[0]
                finish = "length" if made.finish_reason == "length" else "stop"
                tokens = len(made.token_ids)
                text = self._said(each.task, made.text)
                yield Answer(each.task.prompt.id, self.name, each.task.index, text, finish, tokens)

    def _settings(self, task: Task, prompt: int) -> Any:
        """Return vLLM's ``SamplingParams`` for one answer; ``prompt`` is the number of the prompt's tokens."""
        from vllm import SamplingParams

        sampling, room = self.sampling, self.sampling.max_tokens
        if self._context is not None:
            room = min(room, self._context - prompt)
        optional = sampling.model_dump(
            include={"top_k", "min_p", "presence_penalty", "frequency_penalty"}, exclude_none=True
        )
        return SamplingParams(
            seed=task.seed,
            temperature=sampling.temperature,
            top_p=sampling.top_p,
            repetition_penalty=sampling.repetition_penalty,
            stop=list(sampling.stop or ()),
            max_tokens=room,
            **optional,
        )

    @cached_property
    def engine(self) -> Any:
        """The engine with the model."""
        from vllm import LLM

        how: dict[str, Any] = {"model": self.path, "trust_remote_code": False, **self.options}
        if self.dtype is not None:
            how["dtype"] = self.dtype
        return fetched(self.path, CAUSAL, lambda: LLM(**how), SERVE)

    @cached_property
    def _context(self) -> int | None:
        """The longest sequence that the engine takes, in tokens."""
        most = self.options.get("max_model_len")
        if most is None:
            config: Any = config_of(self.path, CAUSAL, SERVE)
            most = getattr(config.get_text_config(), "max_position_embeddings", None)
        return most if isinstance(most, int) and most > 0 else None
