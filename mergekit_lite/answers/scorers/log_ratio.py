"""CDR: the log-ratio of an answer under a strong and a weak model, which needs no reward model.

    score(x, y) = log π_strong(y | c, x) − log π_weak(y | x)

summed over the tokens of the answer and the end of its turn. From "Dr. SoW: density ratio of strong-over-weak LLMs"
(arXiv:2411.02481); the formula is from a summary, not from the paper itself. ``c`` customises the strong model's
prompt by the domain. Each model reads the text through its own tokenizer and template, so they need not be of one
family. The further apart the two are, the better the score: a model and the one it was tuned from, for instance.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

from mergekit_lite.answers.likelihood import LogProb, log_probs
from mergekit_lite.answers.loading import Dtype, causal_model, context_of, free_memory, placed, tokenizer_of
from mergekit_lite.answers.rows import Message
from mergekit_lite.answers.scoring.scorer import Judged, Score, Scorer, ScorerOptions, ScorerSettings, finite, scorer
from mergekit_lite.answers.template import ChatTemplate, TemplateError, Tokens

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Options(ScorerOptions):
    """``instructions``: c, put before the conversation that the strong model reads, as a system prompt."""

    instructions: str | None = None
    device: str | None = None  # cpu, cuda, cuda:1 …; the first GPU by default; auto: all
    dtype: Dtype | None = None  # on a CPU float32, else the models' own by default


class PromptedModel(NamedTuple):
    """A model, its chat template, and a system prompt of ours."""

    model: PreTrainedModel
    template: ChatTemplate
    instructions: str | None = None

    def log_probs(self, judged: Sequence[Judged], batch_size: int) -> list[LogProb | Score]:
        """Return the log-probability of each answer; a score with the reason where there is none."""
        rows = [self._tokens(each) for each in judged]
        read = iter(log_probs(self.model, [row for row in rows if isinstance(row, Tokens)], batch_size))
        return [next(read) if isinstance(row, Tokens) else row for row in rows]

    def _tokens(self, judged: Judged) -> Tokens | Score:
        try:
            tokens = self.template.tokens(self._messages(judged), judged.answer)
        except TemplateError as error:
            return Score(None, str(error))
        length, most = sum(map(len, tokens)), context_of(self.model)
        if most is not None and length > most:
            return Score(None, f"{length:,} tokens are more than the {most:,} that {self.template.name} takes")
        return tokens

    def _messages(self, judged: Judged) -> Sequence[Message]:
        messages = judged.prompt.messages
        if self.instructions is None:
            return messages
        content = self.instructions
        if messages[0]["role"] == "system":
            content, messages = f"{content}\n\n{messages[0]['content']}", messages[1:]
        return (Message(role="system", content=content), *messages)


@scorer("log_ratio", needs={"strong": "MODEL", "weak": "MODEL"}, takes=("batch_size",), read_together=True)
class LogRatio(Scorer):
    """The difference of two log-probabilities; no score where a template refuses the conversation or it is too long."""

    def __init__(self, settings: ScorerSettings, options: Options):
        """Load both models.

        Raises:
            CheckpointError: one can't be loaded.
            UsageError: one makes its logits in a way that isn't known.
        """
        assert settings.strong is not None and settings.weak is not None
        self.name = settings.name
        self.batch_size = settings.batch_size
        self.strong = _load(settings.strong, options, options.instructions)
        self.weak = _load(settings.weak, options, None)

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """Return a score for each answer, in order."""
        strong = self.strong.log_probs(judged, self.batch_size)
        weak = self.weak.log_probs(judged, self.batch_size)
        return [_ratio(*both) for both in zip(strong, weak, strict=True)]

    def close(self) -> None:
        """Free both models."""
        del self.strong, self.weak
        free_memory()


def _ratio(strong: LogProb | Score, weak: LogProb | Score) -> Score:
    if isinstance(strong, Score):
        return strong
    return weak if isinstance(weak, Score) else finite(strong.total - weak.total)


def _load(path: str, options: Options, instructions: str | None) -> PromptedModel:
    from mergekit_lite.answers.logprobs import check_head

    template = ChatTemplate(tokenizer_of(path))
    model = causal_model(path, placed(options.device, options.dtype))
    check_head(model)
    return PromptedModel(model, template, instructions)
