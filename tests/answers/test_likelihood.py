"""Log-probabilities of given texts, and the log-ratio of two models."""

from __future__ import annotations

import itertools
import math
from pathlib import Path

import pytest
import torch

from mergekit_lite.answers.likelihood import LogProb, log_probs, text_log_probs
from mergekit_lite.answers.rows import Message, Prompt
from mergekit_lite.answers.scoring.registry import open_scorer
from mergekit_lite.answers.scoring.scorer import Judged, Score, ScorerSettings
from mergekit_lite.answers.template import ChatTemplate, Tokens
from mergekit_lite.errors import CheckpointError
from tests.answers.scorers.asked import judged
from tests.causal import causal_model
from tests.tokenizers import tokenizer

ANSWERS = ["one", "two three four", "It is two. " * 6, "helpful", "is it?"]


@torch.no_grad()
def by_hand(model: torch.nn.Module, prompt: tuple[int, ...], response: tuple[int, ...]) -> float:
    """Token by token, from the model's own logits in float64."""
    total = 0.0
    ids = list(prompt)
    for token in response:
        logits = model(torch.tensor([ids])).logits[0, -1].double()
        total += float(logits[token] - logits.logsumexp(0))
        ids.append(token)
    return total


def test_log_probs_equal_those_token_by_token() -> None:
    model = causal_model()
    rows = [Tokens((1, 2, 3), (4, 5)), Tokens((7,), (8, 9, 10, 11, 12)), Tokens((1, 2, 3, 4, 5, 6), (9,))]
    expected = [by_hand(model, *row) for row in rows]
    for batch_size in (1, 2, 8):
        found = log_probs(model, rows, batch_size)
        assert [each.total for each in found] == pytest.approx(expected, abs=1e-4)
        assert [each.tokens for each in found] == [2, 5, 1]
    assert log_probs(model, []) == []


def test_texts_are_scored_once_whatever_the_window() -> None:
    model, words = causal_model("gpt2"), tokenizer()
    texts = ["It is two.", "", "a", "What is one and one? It is two. " * 3]
    whole = text_log_probs(model, words, texts, window=500)
    counts = [len(words(text)["input_ids"]) for text in texts]
    assert [each.tokens for each in whole] == [max(count - 1, 0) for count in counts]
    for window in (2, 7):
        assert [each.tokens for each in text_log_probs(model, words, texts, window)] == [each.tokens for each in whole]
    for text, found in zip(texts, whole, strict=True):
        ids = tuple(words(text)["input_ids"])
        assert found.total == pytest.approx(by_hand(model, ids[:1], ids[1:]), abs=1e-3)
    bigrams = text_log_probs(model, words, texts[:1], window=2)[0]
    ids = tuple(words(texts[0])["input_ids"])
    pairs = [by_hand(model, (before,), (after,)) for before, after in itertools.pairwise(ids)]
    assert bigrams.total == pytest.approx(math.fsum(pairs), abs=1e-3)


def test_means() -> None:
    assert LogProb(-6, 3).mean == -2


# CDR.


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    for name, architecture, style in (("a", "llama", "chatml"), ("b", "qwen2", "gemma"), ("c", "gpt2", None)):
        causal_model(architecture, seed=ord(name)).save_pretrained(folder / name)
        tokenizer(style).save_pretrained(folder / name)
    return folder


def ratios(models: Path, strong: str, weak: str, given: list[Judged], **options: object) -> list[Score]:
    settings = ScorerSettings(
        name="cdr",
        kind="log_ratio",
        strong=str(models / strong),
        weak=str(models / weak),
        batch_size=2,
        options=options,
    )
    with open_scorer(settings) as scorer:
        return scorer.score(given)


def test_a_model_against_itself_is_zero(models: Path) -> None:
    assert ratios(models, "a", "a", [judged(answer) for answer in ANSWERS]) == [Score(0.0)] * len(ANSWERS)


@pytest.mark.parametrize("weak", ["b", "c"])
def test_ratios_across_tokenizers_and_their_sign(models: Path, weak: str) -> None:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    given = [judged(answer) for answer in ANSWERS]
    found, turned = ratios(models, "a", weak, given), ratios(models, weak, "a", given)
    loaded = {name: AutoModelForCausalLM.from_pretrained(models / name).eval() for name in ("a", weak)}
    templates = {name: ChatTemplate(AutoTokenizer.from_pretrained(models / name)) for name in ("a", weak)}
    for each, ratio, other in zip(given, found, turned, strict=True):
        strong, less = (
            by_hand(loaded[name], *templates[name].tokens(each.prompt.messages, each.answer)) for name in ("a", weak)
        )
        assert ratio.value == pytest.approx(strong - less, abs=1e-3)
        assert other.value == pytest.approx(-(ratio.value or 0), abs=1e-3)


def test_instructions_go_to_the_strong_model_only(models: Path) -> None:
    [plain], [told] = (
        ratios(models, "a", "a", [judged("one")], **options) for options in ({}, {"instructions": "Be right."})
    )
    with_system = Prompt(
        "p", (Message(role="system", content="Be right."), Message(role="user", content="What is one and one?"))
    )
    assert plain.value == 0 and told.value not in (0, None)
    [strong] = ratios(models, "a", "c", [Judged(with_system, "one")])
    [weak] = ratios(models, "a", "c", [judged("one")])
    [both] = ratios(models, "a", "c", [judged("one")], instructions="Be right.")
    assert both.value != weak.value and both.value != strong.value
    two = Prompt("p", (Message(role="system", content="Short."), Message(role="user", content="What?")))
    [found] = ratios(models, "a", "a", [Judged(two, "one")], instructions="Be right.")
    assert found.value is not None


def test_what_has_no_ratio_says_why(models: Path) -> None:
    twice = Prompt("p", (Message(role="user", content="u"), Message(role="user", content="v")))
    found = ratios(models, "a", "b", [judged("one"), Judged(twice, "one"), judged("one " * 3000)])
    assert found[0].value is not None and found[1].value is None and found[2].value is None
    assert "roles must alternate" in found[1].why and "tokens are more than the 2,048" in found[2].why


def test_what_is_no_model_is_refused(models: Path) -> None:
    with pytest.raises(CheckpointError, match=r"Can't load .*nothing.* Expected is a folder with a tokenizer"):
        ratios(models, "a", "nothing", [])
