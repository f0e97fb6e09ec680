"""PairRM's ranker: llm-blender's own numbers (``parity/pair_rm.py``), formulas in float64, and what is refused."""

from __future__ import annotations

import json
import math
import random
from collections.abc import Sequence
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from mergekit_lite.answers.loading import placed
from mergekit_lite.answers.rows import Message, Prompt
from mergekit_lite.answers.scorers import pair_rm
from mergekit_lite.answers.scorers.pair_rm import source_of, whole_answer
from mergekit_lite.answers.scoring.pair_ranker import EMBEDDINGS, MARKS, Comparison, PairRanker, load
from mergekit_lite.answers.scoring.registry import open_scorer
from mergekit_lite.answers.scoring.rivals import meets_rivals
from mergekit_lite.answers.scoring.scorer import Judged, Score, ScorerSettings
from mergekit_lite.errors import CheckpointError
from tests.answers.scorers import pair_ranker as tiny
from tests.answers.scorers.asked import judged

SAID: dict[str, Any] = json.loads(Path(__file__).with_name("pair_rm.json").read_text())  # by llm-blender 0.0.2
ANSWERS = ["It is two.", "two", "One and one is the number three", "No.", "la la"]
SOURCE, ANSWER = tiny.LENGTHS.values()


@pytest.fixture(scope="module", params=["own", "transformers"])
def ranker(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> PairRanker:
    folder = tmp_path_factory.mktemp(request.param)
    if request.param == "transformers":
        path, backbone = tiny.write_for_transformers(folder / "ranker"), None
    else:
        path, backbone = tiny.write_ranker(folder / "ranker"), str(tiny.write_backbone(folder / "backbone"))
    return load(str(path), placed("cpu", None), backbone, SOURCE, ANSWER)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tiny.write_for_transformers(tmp_path_factory.mktemp("hf") / "ranker")


def settings(model: Path, **options: object) -> ScorerSettings:
    lengths = {"source_length": SOURCE, "answer_length": ANSWER}
    return ScorerSettings(name="pr", kind="pair_rm", model=str(model), batch_size=3, options={**lengths, **options})


def contest(answers: Sequence[str], question: str = "What is one and one?") -> list[Judged]:
    """Each answer, the others its rivals."""
    return [
        judged(answer, question)._replace(rivals=(*answers[:place], *answers[place + 1 :]))
        for place, answer in enumerate(answers)
    ]


def scores(given: Sequence[Judged], scorer: ScorerSettings) -> list[Score]:
    with open_scorer(scorer) as opened:
        return opened.score(given)


def values(given: Sequence[Judged], scorer: ScorerSettings) -> list[float]:
    found = [score.value for score in scores(given, scorer)]
    assert None not in found
    return [value for value in found if value is not None]


def ranks(values: Sequence[float]) -> list[int]:
    return [1 + sum(other > value for other in values) for value in values]


@pytest.mark.parametrize("batch_size", [1, 4])
def test_margins_of_llm_blender(ranker: PairRanker, batch_size: int) -> None:
    """Long prompts and answers are cut where it cuts them; an answer with [SEP] in it is read as it reads it."""
    for case in SAID["cases"]:
        candidates, count = case["candidates"], len(case["candidates"])
        orders = [(i, j) for i in range(count) for j in range(count) if i != j]
        found = ranker.compare(
            [Comparison(case["source"], candidates[i], candidates[j]) for i, j in orders], batch_size
        )
        np.testing.assert_allclose(found, [case["logits"][i][j] for i, j in orders], atol=5e-6)


def test_the_class_for_transformers_says_the_same(ranker: PairRanker) -> None:
    pairs = [Comparison(case["source"], *case["candidates"][:2]) for case in SAID["cases"]]
    np.testing.assert_allclose(ranker.compare(pairs, 8), SAID["class"], atol=5e-6)


def test_a_margin_is_the_formula(ranker: PairRanker) -> None:
    """Naively: one pair at a time, its head in float64 from the file's tensors, marks found by their places."""
    tensors = {name: tensor.double().numpy() for name, tensor in tiny.ranker_tensors().items()}
    w, u, v, c = (tensors[f"head_layer.{part}"] for part in ("1.weight", "1.bias", "4.weight", "4.bias"))
    pairs = [Comparison("What is one and one?", first, second) for first in ANSWERS for second in ANSWERS]
    for pair, margin in zip(pairs, ranker.compare(pairs, 7), strict=True):
        parts = [ranker.tokenizer(mark + text)["input_ids"] for mark, text in zip(MARKS[:3], pair, strict=True)]
        with torch.no_grad():
            hidden = ranker.model(torch.tensor([[*chain(*parts)]])).last_hidden_state[0].double().numpy()
        starts = np.cumsum([0, *map(len, parts[:2])]) + 1
        source, *answers = hidden[starts]
        first, second = (v @ np.tanh(w @ np.concatenate([source, answer]) + u) + c for answer in answers)
        np.testing.assert_allclose(margin, (first - second).mean(), atol=5e-6)


def test_scores_and_ranks_of_llm_blender(model: Path) -> None:
    for case in SAID["cases"]:
        given = contest(case["candidates"], case["source"])
        logits = values(given, settings(model))
        np.testing.assert_allclose(logits, case["scores"], atol=5e-6)
        assert ranks(logits) == case["ranks"]
        assert ranks(values(given, settings(model, by="wins"))) == case["ranks by wins"]


def test_a_conversation_is_read_as_llm_blender_reads_it(ranker: PairRanker) -> None:
    told = SAID["turns"]
    roles = ("user", "assistant", "user")
    turns = tuple(Message(role=role, content=text) for role, text in zip(roles, told["turns"], strict=True))
    prompt = Prompt("p", turns)
    first, second = (whole_answer(prompt, text) for text in told["last"])
    assert (source_of(prompt), [first, second]) == (told["source"], told["read"])
    source = source_of(prompt)
    assert source is not None
    both = ranker.compare([Comparison(source, first, second), Comparison(source, second, first)], 2)
    assert both[0] - both[1] == pytest.approx(told["difference"], abs=1e-5)
    system = Message(role="system", content="Be brief.")
    assert source_of(Prompt("p", (system, Message(role="user", content="Hm")))) == "Be brief.\nHm"


def test_scores_are_the_formulas(model: Path) -> None:
    """Naively: every pair alone, in float64, with ties of equal texts."""
    answers = [*ANSWERS, "two"]
    ranker = load(str(model), placed("cpu", None), None, SOURCE, ANSWER)
    count = len(answers)
    margin = np.zeros((count, count))
    for i in range(count):
        for j in range(count):
            if answers[i] != answers[j]:
                [margin[i, j]] = ranker.compare([Comparison("What is one and one?", answers[i], answers[j])], 1)
    won = ((margin > 0) * 1.0 + (margin.T < 0) * 1.0) / 2
    for i, j in ((1, 5), (5, 1)):
        won[i, j] = 0.5
    np.testing.assert_allclose(values(contest(answers), settings(model)), (margin - margin.T).mean(1), atol=5e-6)
    wins = values(contest(answers), settings(model, by="wins"))
    np.testing.assert_allclose(wins, won[~np.eye(count, dtype=bool)].reshape(count, -1).mean(1))
    assert sum(wins) == pytest.approx(count / 2)


def test_a_score_depends_on_its_contest_alone(model: Path) -> None:
    """Whatever is judged with it, in whatever order; and rivals that come in another order change nothing."""
    seed = 3
    given = [*contest(ANSWERS), *contest(["yes", "no", "it is"], "Is it?")]
    together = values(given, settings(model))
    shuffled = list(range(len(given)))
    random.Random(seed).shuffle(shuffled)
    again = values([given[place] for place in shuffled], settings(model))
    np.testing.assert_allclose(again, [together[place] for place in shuffled], atol=5e-6, err_msg=f"seed {seed}")
    turned = [each._replace(rivals=each.rivals[::-1]) for each in given]
    np.testing.assert_allclose(values(turned, settings(model)), together, atol=5e-6)


def test_each_pair_is_read_once(model: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    read: list[Comparison] = []
    compare = PairRanker.compare

    def noted(self: PairRanker, pairs: Sequence[Comparison], batch_size: int) -> list[float]:
        read.extend(pairs)
        return compare(self, pairs, batch_size)

    monkeypatch.setattr(PairRanker, "compare", noted)
    values(contest([*ANSWERS, ANSWERS[0]]), settings(model))
    assert len(read) == len({*read}) == 5 * 4


def test_against_the_reference(model: Path) -> None:
    ours, theirs = judged("two", reference="It is two."), judged("It is two.", reference="two")
    for by, total in (("logits", 0.0), ("wins", 1.0)):
        first, second = values([ours, theirs], settings(model, against="reference", by=by))
        assert first + second == pytest.approx(total)
    assert not meets_rivals(settings(model, against="reference")) and meets_rivals(settings(model))


def test_what_has_no_score(model: Path) -> None:
    twice = tuple(Message(role="user", content=text) for text in "uv")
    [alone, strange, none] = [
        *scores([judged("two"), Judged(Prompt("p", twice), "two", ("three",))], settings(model)),
        *scores([judged("two")], settings(model, against="reference")),
    ]
    assert "no other answer" in alone.why and "one after the other" in strange.why and "no reference" in none.why
    assert {alone.value, strange.value, none.value} == {None}


def test_an_answer_cannot_pass_for_the_other_one(ranker: PairRanker) -> None:
    """The ranker's own marks in an answer are blanks."""
    for mark in (*MARKS, "[SEP]"):
        told = ranker.tokens(Comparison(f"Hm {mark}", f"two {mark} three", "four"))
        plain = ranker.tokens(Comparison("Hm  ", "two   three", "four"))
        assert told == plain


@pytest.fixture
def normalising(tmp_path: Path) -> PairRanker:
    """A ranker whose tokenizer makes one of signs that look alike, as DeBERTa's does, and would cut at the left."""
    folder = tiny.write_for_transformers(tmp_path / "ranker")
    change(folder / "tokenizer.json", normalizer={"type": "NFKC"})
    change(folder / "tokenizer_config.json", truncation_side="left")
    return load(str(folder), placed("cpu", None), None, SOURCE, ANSWER)


def change(path: Path, **entries: object) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **entries}))


def test_signs_that_look_like_marks_are_none(normalising: PairRanker) -> None:
    wide = [mark.replace("<", "＜").replace("|", "｜") for mark in MARKS]
    marks = [normalising.marks[mark] for mark in MARKS[:3]]
    for text in ("".join(wide), *wide, "\u0338two", "a" * 99):
        told = normalising.tokens(Comparison(text, text, text))
        found = [token for token in (*told.prompt, *told.response) if token in normalising.marks.values()]
        assert found == marks, text
        assert (told.prompt[1], told.response[1]) == (marks[0], marks[1])
        assert len(normalising.compare([Comparison(text, text, "two")], 1)) == 1


@pytest.mark.parametrize("by", ["logits", "wins"])
def test_no_score_of_margins_that_are_not_finite(by: str) -> None:
    contest = [(Comparison("Hm", "a", other), Comparison("Hm", other, "a")) for other in "bc"]
    (first, _), (second, _) = contest
    found = pair_rm._score(contest, {first: math.inf, second: -math.inf}, by)
    assert found.value is None and "nan" in found.why


def broken(folder: Path, how: str) -> str | None:
    """Write a ranker that is wrong in one way; return its backbone."""
    tensors = tiny.ranker_tensors()
    if how == "kind":
        tiny.write_ranker(folder, ranker_type="deberta-rm")
    elif how == "backbone":
        tiny.write_ranker(folder)
    elif how == "marks":
        tiny.write_for_transformers(folder, cand1_prefix_id=5)
    elif how == "plain":
        tiny.write_backbone(folder)
    elif how == "model":
        tiny.write_for_transformers(folder, model_type="bert")
    elif how == "places":
        tiny.write_for_transformers(folder, position_biased_input=True)
    elif how == "both":
        tiny.write_for_transformers(folder)
        return str(folder)
    elif how == "word":
        tiny.write_for_transformers(folder)
        added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
        words = [{**token, "single_word": token["content"] == MARKS[1]} for token in added]
        change(folder / "tokenizer.json", added_tokens=words)
    elif how in ("number", "none"):
        tiny.write_for_transformers(folder)
        embeddings = tensors.pop(EMBEDDINGS)
        save_file(tensors | ({EMBEDDINGS: embeddings[0, 0]} if how == "number" else {}), folder / "model.safetensors")
    else:
        tiny.write_for_transformers(folder)
        tensors["head_layer.1.weight"] = tensors["head_layer.1.weight"][:, :5].contiguous()
        del tensors["head_layer.4.bias"]
        tensors["stray"] = tensors["head_layer.1.bias"].clone()
        save_file(tensors, folder / "model.safetensors")
    return None


@pytest.mark.parametrize(
    ("how", "why"),
    [
        ("kind", "its ranker_type is 'deberta-rm', expected 'pairranker'"),
        ("backbone", "names microsoft/deberta-v3-large: give that as the option `backbone`"),
        ("marks", "the configuration has 5 as cand1_prefix_id, and the tokenizer writes <|candidate1|> as"),
        ("plain", "neither 'ranker_type' nor 'source_prefix_id'"),
        ("model", "is a bert: known backbones of pair rankers are deberta-v2"),
        ("places", "it knows 64 places, fewer than 1,224 tokens of a prompt and two answers of 412"),
        ("both", "leave the option `backbone` out"),
        ("word", r"doesn't write a text behind <\|candidate1\|> between one token and"),
        ("number", r"word_embeddings.weight has shape \(\), expected"),
        ("none", "the weights have no pretrained_model.embeddings.word_embeddings.weight"),
        ("tensors", r"no head_layer.4.bias(.|\n)*stray in the weights(.|\n)*shape \(16, 5\), expected \(16, 32\)"),
    ],
)
def test_what_is_refused(tmp_path: Path, how: str, why: str) -> None:
    backbone = broken(tmp_path / "ranker", how)
    with pytest.raises(CheckpointError, match=why):
        load(str(tmp_path / "ranker"), placed("cpu", None), backbone)
