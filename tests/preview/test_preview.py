"""Previews: exact where they must be, and the same by a second, naive implementation everywhere else."""

from __future__ import annotations

import gc
import math
import shutil
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_lite
from mergekit_lite.answers.asking import Sampling
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.previewing import opened
from mergekit_lite.previewing import preview as previewing
from mergekit_lite.previewing.drafts import Drafts, Reader, Rules
from mergekit_lite.previewing.preview import Kept, loaded, previews
from mergekit_lite.previewing.request import Prepared, Request, conversation, prepare, sampling_of
from mergekit_lite.previewing.search import Beam, grown, preference, searched
from tests.adapters import folded, lora, write_adapter
from tests.preview.pairs import greedy, load, write_model, write_pair

QUESTION = "What is one and one?"
ALPHAS = (-1.0, 0.0, 0.5, 2.0)
SLOW = pytest.mark.slow  # of tests that prove with another model, or another size, what one of them proves


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of the same tokens, wider and deeper, and with padded rows of the vocabulary."""
    return write_model(tmp_path_factory.mktemp("large") / "model", hidden=64, layers=3, vocabulary=352, seed=5)


def prepared(pair: tuple[Path, Path], alphas: Sequence[float], **options: Any) -> Prepared:
    drawn: dict[str, Any] = {"top_p": 1.0, "repetition_penalty": 1.0, "max_tokens": 24, "temperature": 0.0}
    drawn |= {name: options.pop(name) for name in list(options) if name in drawn}
    sampling = sampling_of(searching="beam" in options, **drawn)
    asked = conversation([{"role": "user", "content": QUESTION}])
    return prepare(Request(str(pair[0]), str(pair[1]), tuple(alphas), (asked,), sampling=sampling, **options))


def tokens(made: Prepared) -> list[list[int]]:
    """The tokens of the answers, their ends included, by alpha."""
    last: list[list[int]] = []
    with loaded(made) as readers:
        for _ in previews(made, readers, lambda answers: (last.clear(), last.extend(answers))):
            pass
    return last


@pytest.mark.parametrize("kind", ["gemma2", *(pytest.param(kind, marks=SLOW) for kind in ("llama", "qwen2", "gpt2"))])
def test_both_ends_are_the_models_to_the_token(kind: str, tmp_path: Path) -> None:
    """By the road on which one model runs alone, and by that on which both do."""
    pair = write_pair(tmp_path, kind)
    together = tokens(prepared(pair, ALPHAS))
    for alpha, folder in ((-1.0, pair[0]), (0.0, pair[1])):
        alone = prepared(pair, [alpha])
        assert [model.reference for model in alone.models] == [str(folder)]
        expected = greedy(folder, alone.prompts[0], 24)
        assert tokens(alone) == [expected] == [together[ALPHAS.index(alpha)]]
    assert len({tuple(answer) for answer in together}) > 1


def naive(models: Sequence[Any], weights: Sequence[float], prompt: Sequence[int], most: int, end: int) -> list[int]:
    """Greedy answers from logits in float64 of whole sequences, one model after the other."""
    answer: list[int] = []
    while len(answer) < most and end not in answer:
        whole = torch.tensor([[*prompt, *answer]])
        with torch.no_grad():
            each = [model(whole).logits[0, -1].double() for model in models]
        shared = min(map(len, each))
        answer.append(int(sum(w * own[:shared] for w, own in zip(weights, each, strict=True)).argmax()))
    return answer


def test_mixed_logits_beside_a_naive_sum(pair: tuple[Path, Path], large: Path) -> None:
    sft, aligned, on = map(load, (*pair, large))
    made = prepared(pair, (0.5, 2.0, -3.0))
    (end,) = made.ends
    for alpha, answer in zip(made.request.alphas, tokens(made), strict=True):
        assert answer == naive([sft, aligned], [-alpha, 1 + alpha], made.prompts[0], 24, end)
    upscaled = prepared(pair, ALPHAS, on=str(large))
    for alpha, answer in zip(ALPHAS, tokens(upscaled), strict=True):
        assert answer == naive([on, aligned, sft], [1, 1 + alpha, -1 - alpha], made.prompts[0], 24, end)


def test_alpha_minus_one_on_a_large_model_is_that_model(pair: tuple[Path, Path], large: Path) -> None:
    made = prepared(pair, [-1], on=str(large))
    assert [model.role for model in made.models] == ["ON"]
    assert tokens(made) == [greedy(large, made.prompts[0], 24)]


def test_it_is_the_extrapolated_model_where_only_the_head_differs(tmp_path: Path) -> None:
    """Logits are linear in the head, so there the twin of logits is the twin of weights."""
    pair = write_pair(tmp_path, only="lm_head")
    for alpha in (0.5, 3.0):
        made = prepared(pair, [alpha])
        mergekit_lite.extrapolate(*pair, tmp_path / f"expo-{alpha}", alpha)
        assert tokens(made) == [greedy(tmp_path / f"expo-{alpha}", made.prompts[0], 24)]


def test_models_are_kept_while_they_are_the_same(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other files, other models and the end let go of those that are there; nothing else loads them again."""
    sft, dpo = (Path(shutil.copytree(each, tmp_path / each.name)) for each in pair)
    read: list[str] = []
    model = previewing._model
    monkeypatch.setattr(previewing, "_model", lambda each, made: read.append(each.role) or model(each, made))
    kept = Kept()
    alive: list[weakref.ref[Any]] = []

    def answers(alphas: Sequence[float]) -> list[str]:
        made = prepared((sft, dpo), alphas)
        with kept.loaded(made) as readers:
            alive[:] = [weakref.ref(reader.model) for reader in readers]
            found = list(previews(made, readers))
        assert not any(reader.cache for reader in readers)
        with loaded(made) as anew:
            assert [each.answers for each in found] == [each.answers for each in previews(made, anew)]
        return [answer.text for each in found for answer in each.answers]

    answers([0.5, 1])
    answers([2])
    assert read == ["SFT", "ALIGNED"] + ["SFT", "ALIGNED"] * 2  # once for all, and anew to compare with
    read.clear()
    shutil.copy(sft / "model.safetensors", dpo)
    before = list(alive)
    answers([2])
    assert read == ["SFT", "ALIGNED"] * 2
    read.clear()
    answers([0])  # for which one is enough
    assert read == ["ALIGNED"] * 2
    answers([2])
    request = prepared((sft, dpo), [2]).request
    monkeypatch.setattr(opened, "memory_left", lambda device: 1)
    prepare(request, kept.make_room)  # they are there already
    kept.let_go()
    gc.collect()
    assert not any(each() for each in (*before, *alive))
    with pytest.raises(UsageError, match="memory are free"):
        prepare(request, kept.make_room)


def test_log_probabilities(pair: tuple[Path, Path]) -> None:
    made = prepared(pair, (0.5, -1))
    with loaded(made) as readers:
        (preview,) = previews(made, readers)
    for answer, drawn in zip(preview.answers, tokens(made), strict=True):
        for role, folder in (("SFT", pair[0]), ("ALIGNED", pair[1])):
            whole = torch.tensor([[*made.prompts[0], *drawn]])
            logits = load(folder)(whole).logits[0, len(made.prompts[0]) - 1 : -1].log_softmax(1)
            mean = logits.gather(1, torch.tensor(drawn)[:, None]).mean().item()
            assert answer.log_probs[role] == pytest.approx(mean, abs=1e-5)


def test_an_answer_does_not_depend_on_the_other_alphas(pair: tuple[Path, Path]) -> None:
    drawn = {"temperature": 0.8, "top_p": 0.9, "repetition_penalty": 1.2, "seed": 3}
    together = tokens(prepared(pair, ALPHAS, **drawn))
    assert [tokens(prepared(pair, [alpha], **drawn))[0] for alpha in ALPHAS[1:3]] == together[1:3]
    assert tokens(prepared(pair, ALPHAS, **{**drawn, "seed": 4})) != together


def test_draws_follow_the_probabilities(pair: tuple[Path, Path]) -> None:
    """20,000 first tokens: each one's share is within 4.5 standard errors of its probability, cut at top-p."""
    reader, prompt, count = Reader(load(pair[0])), (5, 6, 7), 20_000
    rules = Rules(Sampling(temperature=0.7, top_p=0.6), frozenset(), seed=11)
    with torch.inference_mode():
        drafts = Drafts([reader], torch.ones(1, 1), prompt, rules, each=count)
        drafts.grow()
        p = (load(pair[0])(torch.tensor([prompt])).logits[0, -1] / 0.7).softmax(0)
    order = p.sort(descending=True)
    inside = order.indices[order.values.cumsum(0) - order.values < 0.6]  # the fewest that have 0.6 together
    p = torch.zeros_like(p).index_copy(0, inside, p[inside] / p[inside].sum()).double()
    share = torch.bincount(drafts.tokens[:, 0], minlength=len(p)) / count
    assert (share[p == 0] == 0).all()
    assert ((share - p).abs() <= 4.5 * (p * (1 - p) / count).sqrt() + 1e-12).all()


def naive_search(draw: Callable[[list[int], int], int], score: Callable[[list[int]], float], beam: Beam, most: int,
                 end: int) -> list[int]:  # fmt: skip
    """Algorithm 1 of arXiv 2405.19262 on lists: ``draw`` gives the token after a draft for a number of a draw."""
    kept: list[list[int]] = [[]] * beam.width  # empty drafts, of which each beam begins with one
    while True:
        grown: list[list[int]] = []
        for rank, draft in enumerate(kept):
            for successor in range(beam.successors):
                longer = list(draft)
                while end not in longer and len(longer) < min(most, len(draft) + beam.length):
                    longer.append(draw(longer, rank * beam.successors + successor))
                if longer not in grown:
                    grown.append(longer)
        kept = sorted(grown, key=score, reverse=True)[: beam.width]
        if all(end in draft or len(draft) >= most for draft in kept):
            return kept[0]


@pytest.mark.parametrize(
    "beam", [Beam(2, 3, 3), *(pytest.param(beam, marks=SLOW) for beam in (Beam(4, 4, 3), Beam(2, 3, 1), Beam(3, 1, 4)))]
)
def test_search_beside_a_naive_one(beam: Beam, pair: tuple[Path, Path]) -> None:
    """Small models of 340 tokens seldom end, so a common token is the end here."""
    models, most, alphas = [load(folder) for folder in pair], 11, (-1.0, 0.5)
    weights = torch.tensor([[-alpha for alpha in alphas], [1 + alpha for alpha in alphas]])
    prompt, drawn = (5, 6, 7), Sampling(temperature=1.0, top_p=1.0)
    generator = torch.Generator().manual_seed(9)
    noise = [torch.empty((beam.drafts, 340)).exponential_(generator=generator).log() for _ in range(most)]

    known: dict[tuple[int, ...], torch.Tensor] = {}

    def logits(model: Any, draft: list[int]) -> torch.Tensor:
        key = (models.index(model), *draft)
        if key not in known:  # searches ask for the same beginnings again and again
            known[key] = model(torch.tensor([[*prompt, *draft]])).logits[0, -1]
        return known[key]

    with torch.inference_mode():
        first = sum(weights[place, 0] * logits(model, []) for place, model in enumerate(models))
        end = int(first.topk(3).indices[2])
        drafts = Drafts([Reader(model) for model in models], weights, prompt, Rules(drawn, frozenset({end}), 9),
                        beam.drafts)  # fmt: skip
        best = searched(drafts, most, lambda _: None, beam, aligned=1, sft=0)
        for column, draft in enumerate(best):

            def draw(draft: list[int], number: int, column: int = column) -> int:
                mixed = sum(weights[place, column] * logits(model, draft) for place, model in enumerate(models))
                return int((mixed - noise[len(draft)][number]).argmax())

            def score(draft: list[int]) -> float:
                total = 0.0
                for place, token in enumerate(draft):
                    own = [logits(model, draft[:place]).log_softmax(0)[token].item() for model in models]
                    total += own[1] - own[0]
                return total

            expected = naive_search(draw, score, beam, most, end)
            assert drafts.answer(draft) == expected
            assert preference(drafts, draft, 1, 0) == pytest.approx(score(expected), abs=1e-4)


def test_one_beam_of_endless_chunks_is_best_of_k(pair: tuple[Path, Path]) -> None:
    readers, k = [Reader(load(folder)) for folder in pair], 8
    weights, rules = torch.tensor([[0.0], [1.0]]), Rules(Sampling(temperature=1.0, top_p=1.0), frozenset({3}), 4)
    with torch.inference_mode():
        found = Drafts(readers, weights, (5, 6), rules, k)
        (best,) = searched(found, 12, lambda _: None, Beam(1, k, math.inf), aligned=1, sft=0)
        independent = Drafts(readers, weights, (5, 6), rules, k)
        grown(independent, 12, lambda _: None)
    scores = [preference(independent, draft, 1, 0) for draft in range(k)]
    assert found.answer(best) == independent.answer(scores.index(max(scores)))
    assert len(set(scores)) > 1


def test_adapters_vectors_and_ready_models_are_the_same(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """The aligned model as a task vector on its base; an adapter on its base."""
    vector = tmp_path / "vector.safetensors"
    mergekit_lite.extract_vector(*pair, vector)
    expected = tokens(prepared(pair, ALPHAS))
    assert tokens(prepared((pair[0], Path(f"{pair[0]}+{vector}")), ALPHAS)) == expected
    model = load(pair[0])
    factors = {name: 5 * factor for name, factor in lora("model.layers.1.mlp.down_proj", 32, 64).items()}
    write_adapter(tmp_path / "adapter", factors, target_modules=["down_proj"])
    model.load_state_dict(folded(model.state_dict(), factors))
    model.save_pretrained(tmp_path / "folded")
    adapted = prepared((pair[0], Path(f"{pair[0]}+{tmp_path / 'adapter'}")), [0.0])
    assert tokens(adapted) == [greedy(tmp_path / "folded", adapted.prompts[0], 24)]
    assert tokens(adapted) != tokens(prepared(pair, [-1.0]))


def test_vocabularies_that_differ_are_refused_by_their_tokens(pair: tuple[Path, Path], tmp_path: Path) -> None:
    other = write_model(tmp_path / "other", seed=3)
    text = (other / "tokenizer.json").read_text()
    for old, new in (('"A":', '"swapped":'), ('"B":', '"A":'), ('"swapped":', '"B":')):
        text = text.replace(old, new)
    (other / "tokenizer.json").write_text(text)
    with pytest.raises(UsageError, match=r"ALIGNED and SFT differ in 2 tokens: \d+ is 'A' and 'B'"):
        prepared((other, pair[1]), [0.5])


def test_a_narrower_model(pair: tuple[Path, Path], tmp_path: Path) -> None:
    """SFT of 330 rows beside ALIGNED of 340: alone ALIGNED may write any token, mixed only those of both."""
    narrow = write_model(tmp_path / "narrow", vocabulary=330)
    both = prepared((narrow, pair[1]), (0.0, 0.5))
    alone = tokens(prepared(pair, [0.0]))[0]
    answers = tokens(both)
    assert answers[0] == alone
    assert max(answers[1]) < 330
    sft, aligned = load(narrow), load(pair[1])
    (end,) = both.ends
    assert answers[1] == naive([sft, aligned], [-0.5, 1.5], both.prompts[0], 24, end)
    tiny = write_model(tmp_path / "tiny", vocabulary=50)
    with pytest.raises(UsageError, match=r"The prompt has the token \d+ .*, but SFT \(.*tiny\) has only 50"):
        prepared((tiny, pair[1]), [0.5])


def test_what_can_not_be_done_is_said_before_anything_is_loaded(
    pair: tuple[Path, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(UsageError, match=r"ALIGNED: .*no config.json"):
        file = next(pair[1].glob("*.safetensors"))
        prepared((pair[0], file), [0.5])
    with pytest.raises(UsageError, match=r"SFT: .*\n.*ALIGNED: "):
        prepared((tmp_path / "a", tmp_path / "b"), [0.5])
    with pytest.raises(UsageError, match="greedy ones are all alike"):
        prepared(pair, [0.5], beam=Beam())
    monkeypatch.setattr(opened, "memory_left", lambda device: 300_000)
    assert len(prepared(pair, [0.0]).models) == 1
    with pytest.raises(UsageError, match=r"SFT 0.00, ALIGNED 0.00.*alpha 0 and -1 alone take one model"):
        prepared(pair, [0.5])


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"eos_token_id": ', r"generation_config.json: is not valid JSON"),
        ("[1, 2]", r"generation_config.json: should hold a JSON object"),
        ('{"max_new_tokens": -4}', r"generation_config.json: transformers refuses it: .*must be greater than 0"),
    ],
)
def test_a_damaged_generation_config_is_said(
    pair: tuple[Path, Path], tmp_path: Path, content: str, message: str
) -> None:
    folder = tmp_path / "damaged"
    shutil.copytree(pair[1], folder)
    (folder / "generation_config.json").write_text(content)
    with pytest.raises(MergekitLiteError, match=message):
        prepared((pair[0], folder), [0.0])
    (folder / "generation_config.json").write_text('{"eos_token_id": [[1], "x", 2.5]}')
    assert prepared((pair[0], folder), [0.0]).ends == prepared(pair, [0.0]).ends  # the tokenizer's


def test_in_python(pair: tuple[Path, Path]) -> None:
    """Several prompts, a conversation among them; a system prompt changes what is asked."""
    turns = [
        {"role": "user", "content": "one"},
        {"role": "assistant", "content": "two"},
        {"role": "user", "content": "three"},
    ]
    both = mergekit_lite.preview(str(pair[0]), str(pair[1]), [QUESTION, turns], (0.0, 0.5), max_tokens=8)
    assert [each.prompt.messages[-1]["content"] for each in both] == [QUESTION, "three"]
    assert all([answer.alpha for answer in each.answers] == [0.0, 0.5] for each in both)
    told = mergekit_lite.preview(str(pair[0]), str(pair[1]), [QUESTION], (0.0, 0.5), max_tokens=8, system="assistant")
    assert [a.text for a in told[0].answers] != [a.text for a in both[0].answers]
    with pytest.raises(UsageError, match="no option 'alpha'"):
        mergekit_lite.preview(str(pair[0]), str(pair[1]), [QUESTION], alpha=1)  # type: ignore[call-arg]
