"""Reward models: a number for a conversation and its answer.

Any model that transformers loads as ``AutoModelForSequenceClassification`` with one logit; and those of the ArmoRM
family, see ``scoring/armorm.py``. The conversation is written by the model's own chat template, as in its training. A
conversation that is too long for the model has no score.

Rows of like length are read together. Padding is masked, so a score depends on its row alone; the rounding of matrix
products still differs in the last bits with the shape of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from mergekit_lite.answers.likelihood import batches
from mergekit_lite.answers.loading import (
    Dtype,
    Placed,
    config_of,
    context_of,
    free_memory,
    model_of,
    placed,
    tokenizer_of,
)
from mergekit_lite.answers.rows import Message
from mergekit_lite.answers.scoring import armorm
from mergekit_lite.answers.scoring.scorer import (
    Judged,
    Positive,
    Score,
    Scorer,
    ScorerOptions,
    ScorerSettings,
    finite,
    scorer,
)
from mergekit_lite.answers.template import ChatTemplate, TemplateError, Tokens
from mergekit_lite.errors import CheckpointError, RunError, listing

if TYPE_CHECKING:
    from transformers import PreTrainedModel


class Options(ScorerOptions):
    """``max_length``: tokens of conversation and answer; as many as the model takes by default."""

    max_length: Positive | None = None
    device: str | None = None  # cpu, cuda, cuda:1 …; the first GPU by default; auto: all
    dtype: Dtype | None = None  # on a CPU float32, else the model's own by default


@scorer("reward", needs={"model": "MODEL"}, takes=("batch_size", "minimise"), read_together=True)
class Reward(Scorer):
    """The reward model's number; no score where its template refuses the conversation or it is too long."""

    def __init__(self, settings: ScorerSettings, options: Options):
        """Load the model.

        Raises:
            CheckpointError: it can't be loaded, or is no reward model.
        """
        assert settings.model is not None
        self.name = settings.name
        self.batch_size = settings.batch_size
        self.template = _template(settings.model)
        self.head = _head(settings.model, placed(options.device, options.dtype))
        lengths = [length for length in (options.max_length, context_of(self.head.model)) if length is not None]
        self.max_length = min(lengths, default=None)

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """Return a score for each answer, in order."""
        conversations = [self._tokens(each) for each in judged]
        rows = [tokens for tokens in conversations if isinstance(tokens, Tokens)]
        rewards: dict[int, float] = {}
        for places in batches(rows, self.batch_size):
            rewards |= zip(places, self._rewards([rows[place] for place in places]), strict=True)
        scores = (finite(rewards[place]) for place in range(len(rows)))
        return [next(scores) if isinstance(each, Tokens) else each for each in conversations]

    def close(self) -> None:
        """Free the model."""
        del self.head
        free_memory()

    def _tokens(self, judged: Judged) -> Tokens | Score:
        """Return the conversation, split behind the last token before the answer."""
        answer = Message(role="assistant", content=judged.answer)
        try:
            before = self.template.whole(judged.prompt.messages)
            whole = self.template.whole([*judged.prompt.messages, answer])
        except TemplateError as error:
            return Score(None, str(error))
        if whole[: len(before)] != before:
            return Score(None, "the chat template writes what comes before an answer otherwise than without one")
        if self.max_length is not None and len(whole) > self.max_length:
            return Score(None, f"{len(whole):,} tokens are more than {self.max_length:,}")
        return Tokens(before, whole[len(before) :])

    def _rewards(self, rows: Sequence[Tokens]) -> list[float]:
        import torch

        try:
            with torch.inference_mode():
                return self.head.rewards(rows)
        except torch.cuda.OutOfMemoryError as error:
            longest = max(sum(map(len, row)) for row in rows)
            raise RunError(
                f"{len(rows)} conversations of up to {longest:,} tokens don't fit into the memory of "
                f"{self.head.model.device}. Lower `batch_size` of the scorer {self.name}, or its option max_length."
            ) from error


class Classifier:
    """A model for sequence classification with one logit."""

    def __init__(self, model: PreTrainedModel):
        self.model = model
        self.pad: int | None = model.config.get_text_config().pad_token_id

    def rewards(self, rows: Sequence[Tokens]) -> list[float]:
        """Return the logit of each conversation of a batch.

        transformers reads the logit at the last token that isn't the configuration's padding token. Where the
        configuration has none, a token that is in none of the rows becomes the padding.
        """
        from mergekit_lite.answers.logprobs import padded

        pad = self.pad
        if pad is None:
            used = {token for row in rows for part in row for token in part}
            pad = next(token for token in range(len(used) + 1) if token not in used)
            self.model.config.get_text_config().pad_token_id = pad
        batch = padded(rows, pad, self.model.device)
        logits = self.model(input_ids=batch.input_ids, attention_mask=batch.attention_mask).logits
        rewards: list[float] = logits[:, 0].double().tolist()
        return rewards


def _template(path: str) -> ChatTemplate:
    template = ChatTemplate(tokenizer_of(path))
    if template.plain:
        raise CheckpointError(
            f"The tokenizer of the reward model {path} has no chat template: it can't be told how the model wants a "
            f"conversation written. Put the template of its training beside it as chat_template.jinja."
        )
    return template


def _head(path: str, place: Placed) -> Classifier | armorm.Gated:
    from transformers import AutoModelForSequenceClassification

    config = config_of(path, "a reward model")
    if armorm.is_gated(config):
        return armorm.load(path, config, place)
    model, missing, unexpected = model_of(AutoModelForSequenceClassification, path, "a reward model", place)
    problems = [f"the weights have no {name}" for name in missing]
    problems += [f"{name} in the weights belongs to nothing that is known" for name in unexpected]
    if not problems and model.config.num_labels != 1:
        problems = [f"it has {model.config.num_labels} logits, expected one"]
    if problems:
        remedy = "Name a model for sequence classification with one logit, or one of the ArmoRM family."
        raise CheckpointError(listing(f"{path} is no reward model. {remedy} What is wrong", problems))
    return Classifier(model)
