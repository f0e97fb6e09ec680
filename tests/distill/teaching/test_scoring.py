"""What teachers say of given tokens: here and behind every kind of server, the same."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from mergekit_lite.answers import logprobs, server
from mergekit_lite.answers.logprobs import padded
from mergekit_lite.answers.template import Tokens
from mergekit_lite.distillation.recipe.schema import RecipeTeacher
from mergekit_lite.distillation.teaching.scoring import LocalScorer, Said, said_of
from mergekit_lite.distillation.teaching.served import ServedScorer
from mergekit_lite.errors import RunError
from tests.causal import causal_model
from tests.distill.teaching.scoring_server import Scoring, scoring_server
from tests.tokenizers import tokenizer

MODEL = causal_model()
TOKENIZER = tokenizer()
TOP = 12


@pytest.fixture(autouse=True)
def no_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "FIRST_WAIT", 0.001)


def rows(number: int = 6, seed: int = 0) -> list[Tokens]:
    draw = random.Random(seed)
    texts = ("one two ", "three four five", "What is one?", "helpful\n\n")
    made = [TOKENIZER("".join(draw.choices(texts, k=draw.randrange(2, 9))))["input_ids"] for _ in range(number)]
    borders = [draw.randrange(1, len(ids)) for ids in made]
    return [Tokens(tuple(ids[:border]), tuple(ids[border:])) for ids, border in zip(made, borders, strict=True)]


def plainly(row: Tokens, top: int) -> Said:
    """Return what the model says, from all logits of the row alone."""
    with torch.no_grad():
        logits = MODEL(torch.tensor([[*row.prompt, *row.response]])).logits[0, len(row.prompt) - 1 : -1]
    values = logits.double().log_softmax(1)
    best = values.topk(top)
    own = values.gather(1, torch.tensor(row.response)[:, None])[:, 0]
    return Said(own.float().numpy(), best.indices.int().numpy(), best.values.float().numpy())


def assert_same(said: Said, expected: Said) -> None:
    assert said.log_probs == pytest.approx(expected.log_probs, abs=1e-4)
    assert said.top_ids.shape == expected.top_ids.shape
    assert np.allclose(said.top_log_probs, expected.top_log_probs, atol=1e-4)
    assert (said.top_ids != expected.top_ids).sum() <= 0.05 * said.top_ids.size  # ties
    assert (said.log_probs <= 0).all() and (said.top_log_probs <= 0).all()


def settings(**changes: Any) -> RecipeTeacher:
    return RecipeTeacher.model_validate({"name": "strong", "model": "m", "top": TOP, **changes})


@pytest.mark.parametrize("chunk", [1 << 26, 3 * 340])
def test_a_model_here_says_what_its_logits_say(chunk: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(logprobs, "LOGITS_AT_ONCE", chunk)
    asked = rows()
    for row, said in zip(asked, said_of(MODEL, padded(asked), TOP), strict=True):
        assert_same(said, plainly(row, TOP))


@pytest.mark.parametrize("architecture", ["gemma2", "granite", "gpt2"])
def test_logits_that_are_scaled_or_capped(architecture: str) -> None:
    model, row = causal_model(architecture), rows(1)[0]
    (said,) = said_of(model, padded([row]), 5)
    with torch.no_grad():
        logits = model(torch.tensor([[*row.prompt, *row.response]])).logits[0, len(row.prompt) - 1 : -1]
    assert said.top_log_probs == pytest.approx(logits.log_softmax(1).topk(5).values.numpy(), abs=1e-3)


def test_a_model_here_is_loaded_and_asked_in_batches(tmp_path: Path) -> None:
    MODEL.save_pretrained(tmp_path)
    asked = rows(7)
    scorer = LocalScorer(settings(model=str(tmp_path), batch_size=3))
    found = dict(scorer.score(asked))
    assert sorted(found) == list(range(7))
    for place, said in found.items():
        assert_same(said, plainly(asked[place], TOP))
    too_long = Tokens((1,) * 2000, (1,) * 100)
    assert "longer than the 2,048 tokens" in str(scorer.why_not(too_long))
    assert scorer.why_not(asked[0]) is None


@pytest.mark.parametrize(
    ("way", "top"), [("vllm", TOP), ("vllm", 0), ("sglang", TOP), ("sglang", 0), ("echo", 0), ("echo of text", 0)]
)
def test_servers_say_the_same(way: str, top: int) -> None:
    asked = rows()
    with scoring_server(Scoring(MODEL, TOKENIZER, way)) as fake:
        scorer = ServedScorer(settings(server=fake.url, top=top), TOKENIZER)
        found = dict(scorer.score(asked))
    assert sorted(found) == list(range(len(asked)))
    for place, said in found.items():
        assert_same(said, plainly(asked[place], top))
    assert fake.requests.total() - len(asked) == {"vllm": 1, "sglang": 2, "echo": 1, "echo of text": 3}[way]


@pytest.mark.parametrize("itself", [False, True])
def test_llama_cpp_python_says_the_same(itself: bool) -> None:
    """It takes texts alone, may put BOS before them itself, and leaves BOS out of what it tells, wherever it is."""
    made = tokenizer()
    made.bos_token = made.eos_token
    begin = made.bos_token_id
    asked = [Tokens((begin, *row.prompt, begin), row.response) for row in rows()]
    with scoring_server(Scoring(MODEL, made, "llama-cpp-python", adds=(begin,) if itself else ())) as fake:
        found = dict(ServedScorer(settings(server=fake.url, top=0), made).score(asked))
    assert sorted(found) == list(range(len(asked)))
    for place, said in found.items():
        assert_same(said, plainly(asked[place], 0))


def test_log_probabilities_of_one_place_later_are_refused() -> None:
    """Those of llama-cpp-python where a text doesn't begin with BOS."""
    with (
        scoring_server(Scoring(MODEL, TOKENIZER, "llama-cpp-python")) as fake,
        pytest.raises(RunError, match="are then those of one place later"),
    ):
        list(ServedScorer(settings(server=fake.url, top=0), TOKENIZER).score(rows()))


def test_one_request_finds_out_what_vllm_is() -> None:
    with scoring_server(Scoring(MODEL, TOKENIZER, "vllm")) as fake:
        list(ServedScorer(settings(server=fake.url), TOKENIZER).score(rows(4)))
    assert fake.requests == {"/v1/completions": 5}


@pytest.mark.parametrize("way", ["vllm", "sglang"])
def test_a_server_that_fails_a_third_of_the_time_loses_nothing(way: str) -> None:
    seed = random.randrange(1 << 32)
    print(f"seed {seed}")
    draw = random.Random(seed)

    def mood(request: int) -> str | int | None:
        return draw.choice(["drop", "garbage", 500, 429]) if draw.random() < 0.3 else None

    asked = rows(40)
    with (
        scoring_server(Scoring(MODEL, TOKENIZER, way, mood)) as one,
        scoring_server(Scoring(MODEL, TOKENIZER, way, mood)) as two,
    ):
        scorer = ServedScorer(settings(server=[one.url, two.url], concurrency=4, retries=20), TOKENIZER)
        found = dict(scorer.score(asked))
    assert sorted(found) == list(range(40))
    for place in (0, 39):
        assert_same(found[place], plainly(asked[place], TOP))
    assert one.requests and two.requests  # which of them answers is chance: one that fails often rests
    assert any("made again" in note for note in scorer.notes)


@pytest.mark.parametrize(
    ("way", "top", "said"),
    [
        ("llama.cpp", 0, "Only no echo is supported.*Serve the model by vLLM"),
        ("nothing", TOP, "tells no log-probabilities of given tokens.*Serve the model by vLLM"),
        ("echo", TOP, "`top` is 12. Set top: 0"),
    ],
)
def test_servers_that_can_not_are_refused_with_what_to_do(way: str, top: int, said: str) -> None:
    with scoring_server(Scoring(MODEL, TOKENIZER, way)) as fake:
        scorer = ServedScorer(settings(server=fake.url, top=top), TOKENIZER)
        with pytest.raises(RunError, match=said) as refused:
            list(scorer.score(rows()))
    assert "\n" not in str(refused.value)
    assert fake.requests.total() <= 5


def test_more_likely_tokens_than_the_server_gives() -> None:
    with scoring_server(Scoring(MODEL, TOKENIZER, "vllm", most=5)) as fake:
        scorer = ServedScorer(settings(server=fake.url), TOKENIZER)
        with pytest.raises(RunError, match=r"greater than max allowed: 5.*--max-logprobs 12, or lower `top`"):
            list(scorer.score(rows()))


@pytest.mark.parametrize("way", ["vllm", "sglang", "echo", "echo of text"])
@pytest.mark.parametrize("wrong", [{"adds": (7,)}, {"shift": 1}])
def test_other_tokens_than_were_sent_are_an_error(way: str, wrong: dict[str, Any]) -> None:
    """A token put before the others, or ids of another vocabulary."""
    if way == "sglang" and "adds" in wrong:
        pytest.skip("what comes before the prompt isn't told")
    with scoring_server(Scoring(MODEL, TOKENIZER, way, **wrong)) as fake:
        scorer = ServedScorer(settings(server=fake.url, top=TOP if way in ("vllm", "sglang") else 0), TOKENIZER)
        with pytest.raises(RunError, match="its tokens are not those that were sent"):
            list(scorer.score(rows()))


def test_one_of_two_urls_with_another_tokenizer_is_given_up() -> None:
    asked = rows(20)
    good, bad = Scoring(MODEL, TOKENIZER, "vllm"), Scoring(MODEL, TOKENIZER, "vllm", shift=1)
    with scoring_server(good), scoring_server(bad):
        scorer = ServedScorer(settings(server=[good.url, bad.url], concurrency=2), TOKENIZER)
        found = dict(scorer.score(asked))
    assert sorted(found) == list(range(20))
    assert any(bad.url in note and "not those that were sent" in note for note in scorer.notes)


def test_the_key_goes_to_the_server_and_nowhere_else(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TEACHERS_KEY", "s3cret")
    with scoring_server(Scoring(MODEL, TOKENIZER, "vllm", lambda request: 401)) as fake:
        scorer = ServedScorer(settings(server=fake.url, api_key_variable="TEACHERS_KEY"), TOKENIZER)
        with pytest.raises(RunError, match="TEACHERS_KEY") as refused:
            list(scorer.score(rows()))
    assert fake.headers[0]["authorization"] == "Bearer s3cret"
    assert "s3cret" not in str(refused.value) + str(scorer.notes)


def test_nobody_there() -> None:
    scorer = ServedScorer(settings(server="http://127.0.0.1:9/v1", retries=1), TOKENIZER)
    with pytest.raises(RunError, match="no connection"):
        list(scorer.score(rows()))


def test_impossible_tokens_and_odd_numbers() -> None:
    """vLLM sends −9999 for −∞."""
    from mergekit_lite.answers.replies import Failed
    from mergekit_lite.distillation.teaching.dialects import PromptLogprobs

    row = Tokens((1,), (2, 3))
    told: list[Any] = [None, {"2": {"logprob": -9999.0}, "5": {"logprob": 0.0}}, {"3": {"logprob": -0.5}}]
    said = PromptLogprobs().said({"choices": [{"prompt_logprobs": told}]}, row, 2)
    assert np.isneginf(said.log_probs[0]) and said.log_probs[1] == -0.5
    assert said.top_ids[0, 0] == 5
    for odd in (float("nan"), "x", None, 0.5, True, 10**400):
        told[2] = {"3": {"logprob": odd}}
        with pytest.raises(Failed):
            PromptLogprobs().said({"choices": [{"prompt_logprobs": told}]}, row, 2)


@pytest.mark.parametrize(
    ("likely", "said"),
    [
        ([[-1.0, 5, None], [-2.0, 5, None]], "tells twice"),
        ([[-0.1, 5, None], [-0.1, 6, None]], "in sum"),
        ([[-1.0, 5.7, None]], "can't be read"),
        ([[-1.0, True, None]], "can't be read"),
        ([[-1.0, "1_0", None]], "can't be read"),
        ([[-1.0, -5, None]], "can't be read"),
        ([[-(10**400), 5, None], [10**400, 6, None]], "can't be read"),
        ([[-1.0]], "can't be read"),
        (None, "can't be read"),
    ],
)
def test_what_is_no_distribution_is_no_reply(likely: Any, said: str) -> None:
    from mergekit_lite.answers.replies import Failed
    from mergekit_lite.distillation.teaching.dialects import Generate

    told = {"input_token_logprobs": [[None, 1, None], [-0.5, 2, None]], "input_top_logprobs": [None, likely]}
    with pytest.raises(Failed, match=said):
        Generate().said({"meta_info": told}, Tokens((1,), (2,)), 4)


def test_a_server_that_tells_fewer_likely_tokens_than_asked_is_told() -> None:
    with scoring_server(Scoring(MODEL, TOKENIZER, "vllm", caps=5)) as fake:
        scorer = ServedScorer(settings(server=fake.url), TOKENIZER)
        found = dict(scorer.score(rows(3)))
    assert {said.top_ids.shape[1] for said in found.values()} <= {5, 6}  # the token itself is told, too
    assert any("of the 12 likeliest tokens" in note for note in scorer.notes)
