"""PairRM and rankers like it: a small model that reads two answers to a prompt at once, and says which is better.

An answer is compared with each of its rivals, in both orders. M(a, b) says by how much the model finds a better than b,
where it reads a first (``scoring/pair_ranker.py``); n is the number of answers, this one included. LLM-Blender (Jiang
et al. 2023, arXiv 2306.02561) ranks by

    by: logits    s(a) = 1/n · Σ_b M(a, b) − M(b, a)                        σ(s(a) − s(b)) is SPPO's P(a beats b)
    by: wins      w(a) = 1/(n−1) · Σ_b ½·[M(a, b) > 0] + ½·[M(b, a) < 0]    1 for one that wins in both orders, ½ a tie

Equal texts tie, and aren't read. A score is among its rivals: those of different prompts tell nothing of each other.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Literal

from mergekit_lite.answers.loading import Dtype, free_memory, placed
from mergekit_lite.answers.rows import Prompt
from mergekit_lite.answers.scoring.pair_ranker import Comparison, load
from mergekit_lite.answers.scoring.rivals import RIVALS, Against, opponents
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
from mergekit_lite.errors import RunError

# LLM-Blender's words for a conversation of several turns, as its rankers have read it in training.
SEVERAL = "Finish the following coversation in each i-th turn by filling in <Response i> with your response."

Margins = Mapping[Comparison, float]


class Options(ScorerOptions):
    """Lengths are in tokens; by default as the ranker's configuration says, or as published."""

    by: Literal["logits", "wins"] = "logits"
    against: Against = RIVALS
    backbone: str | None = None  # a folder or org/name: of a ranker in PairRM's own layout
    source_length: Positive | None = None  # a longer prompt is cut
    answer_length: Positive | None = None  # a longer answer is cut, where the prompt leaves nothing of its own
    device: str | None = None  # cpu, cuda, cuda:1 …; the first GPU by default, and with auto
    dtype: Dtype | None = None  # on a CPU float32, else the model's own by default


@scorer("pair_rm", needs={"model": "MODEL"}, takes=("batch_size",), read_together=True, opponent_as="reference")
class PairRm(Scorer):
    """The score among its rivals; none, with the reason, where there is no rival, or the turns are of other roles."""

    def __init__(self, settings: ScorerSettings, options: Options):
        """Load the ranker.

        Raises:
            CheckpointError: it can't be loaded, or is no pair ranker.
            UsageError: there is no such device.
        """
        assert settings.model is not None
        self.name, self.batch_size, self.options = settings.name, settings.batch_size, options
        place = placed(None if options.device == "auto" else options.device, options.dtype)
        self.ranker = load(settings.model, place, options.backbone, options.source_length, options.answer_length)

    def score(self, judged: Sequence[Judged]) -> list[Score]:
        """Return a score for each answer, in order. What several of them need is read once."""
        contests = [_contest(each, self.options.against) for each in judged]
        wanted = dict.fromkeys(
            pair for contest in contests if not isinstance(contest, Score) for both in contest for pair in both
        )
        margins = self._margins([pair for pair in wanted if pair.first != pair.second])
        return [
            contest if isinstance(contest, Score) else _score(contest, margins, self.options.by) for contest in contests
        ]

    def close(self) -> None:
        """Free the model."""
        del self.ranker
        free_memory()

    def _margins(self, pairs: Sequence[Comparison]) -> Margins:
        import torch

        try:
            return dict(zip(pairs, self.ranker.compare(pairs, self.batch_size), strict=True))
        except torch.cuda.OutOfMemoryError as error:
            raise RunError(
                f"{self.batch_size} pairs of answers don't fit into the memory of {self.ranker.model.device}. Lower "
                f"`batch_size` of the scorer {self.name}."
            ) from error


def _contest(judged: Judged, against: Against) -> list[tuple[Comparison, Comparison]] | Score:
    """Return what is read of an answer, for each of its opponents in both orders; or why nothing is."""
    others = opponents(judged, against)
    if isinstance(others, Score):
        return others
    source = source_of(judged.prompt)
    if source is None:
        return Score(None, "the prompt isn't of turns of user and assistant, one after the other")
    ours, *theirs = (whole_answer(judged.prompt, text) for text in (judged.answer, *others))
    return [(Comparison(source, ours, each), Comparison(source, each, ours)) for each in theirs]


def _score(contest: Sequence[tuple[Comparison, Comparison]], margins: Margins, by: str) -> Score:
    both = [(margins.get(ours, 0.0), margins.get(theirs, 0.0)) for ours, theirs in contest]
    if not all(math.isfinite(margin) for each in both for margin in each):
        return finite(math.nan)
    if by == "logits":
        return finite(math.fsum(first - second for first, second in both) / (len(both) + 1))
    equal = [ours.first == ours.second for ours, _ in contest]
    won = [0.5 if same else ((first > 0) + (second < 0)) / 2 for same, (first, second) in zip(equal, both, strict=True)]
    return Score(math.fsum(won) / len(won))


def source_of(prompt: Prompt) -> str | None:
    """Return a prompt as the ranker reads it: a text, or the turns so far with places for the answers.

    System messages come first. None where the turns aren't of user and assistant, one after the other.
    """
    turns = [message for message in prompt.messages if message["role"] != "system"]
    if not turns or [turn["role"] for turn in turns] != [("user", "assistant")[n % 2] for n in range(len(turns))]:
        return None
    if len(turns) % 2 == 0:
        return None
    system = [message["content"] for message in prompt.messages if message["role"] == "system"]
    asked = [turn["content"] for turn in turns[::2]]
    if len(asked) > 1:
        places = (f"USER: {text}\nAssistant: <Response {number}>" for number, text in enumerate(asked, 1))
        return "\n".join([*system, SEVERAL + "\n".join(places)])
    return "\n".join([*system, *asked])


def whole_answer(prompt: Prompt, answer: str) -> str:
    """Return an answer as the ranker reads it; after several turns, with the answers before it."""
    before = [message["content"] for message in prompt.messages if message["role"] == "assistant"]
    if not before:
        return answer
    return "\n".join(f"<Response {number}>: {text}" for number, text in enumerate((*before, answer), 1))
