"""Vocabularies brought into one order: rows follow their tokens, whatever their numbers; nothing is lost unsaid."""

from __future__ import annotations

import json
import pickle
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.encodings.gathered import Places, gathered, part_of
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tokenizer_file import vocabulary_in
from mergekit_lite.engine.schedule import by_themselves
from mergekit_lite.engine.tiling import spans
from mergekit_lite.errors import PlanError
from mergekit_lite.recipe import as_data, parse, to_yaml
from mergekit_lite.transplanting.planning import plan_transplant
from tests.models import State, read_folder, same_bytes, state, write_folder

VOCABULARY = ("model.embed_tokens.weight", "lm_head.weight")
WORDS = ["<s>", "</s>", "Ġsnow", "win", "ter", "Ġand", "a", "b", "c", "é"]


def tokenizer(tokens: list[str | None], added: int = 2, kind: str = "ByteLevel") -> dict[str, Any]:
    """The content of a tokenizer.json; the first ones are added tokens; None is a number without a token."""
    named = {token: number for number, token in enumerate(tokens) if token is not None}
    special = [{"id": number, "content": token, "special": True} for token, number in list(named.items())[:added]]
    return {
        "model": {"type": "BPE", "vocab": dict(list(named.items())[added:]), "merges": []},
        "added_tokens": special,
        "pre_tokenizer": {"type": kind},
    }


def model(folder: Path, seed: int, tokens: list[str | None], rows: int | None = None, **config: Any) -> State:
    """Write a model with a row for each token, or more, and its tokenizer."""
    tensors = state(seed, vocabulary=rows or len(tokens))
    described = {"model_type": "llama", "hidden_size": 8, "vocab_size": rows or len(tokens), **config}
    write_folder(folder, tensors, config=described)
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer(tokens)))
    (folder / "tokenizer_config.json").write_text(json.dumps({"eos_token": "</s>"}))
    return tensors


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def linear(models: list[str], **more: Any) -> dict[str, Any]:
    return {
        "merge_method": "linear",
        "models": [{"model": name, "parameters": {"weight": 1 / len(models)}} for name in models],
        **more,
    }


def merged(recipe: dict[str, Any]) -> State:
    mergekit_lite.merge(recipe, "out", force=True)
    return read_folder(Path("out"))


def mean(*rows: torch.Tensor) -> torch.Tensor:
    return (sum(row.float() for row in rows) / len(rows)).to(rows[0].dtype)


def test_any_order_of_tokens_gives_the_same_rows(place: Path) -> None:
    """A second implementation: each row is looked up by its token, one by one."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    for _ in range(5):
        orders: dict[str, list[str | None]] = {}
        tensors: dict[str, State] = {}
        for number, name in enumerate(("one", "two", "three")):
            tokens: list[str | None] = [*WORDS[:2], *draw.sample(WORDS[2:], draw.randint(4, len(WORDS) - 2))]
            body = tokens[2:]
            draw.shuffle(body)
            orders[name] = [*tokens[:2], *body]
            tensors[name] = model(place / name, number, orders[name])
        made = merged(linear(list(orders), base_model="one", tokenizer_source="two"))
        for tensor in VOCABULARY:
            assert len(made[tensor]) == len(orders["two"])
            for row, token in enumerate(orders["two"]):
                own = {n: tensors[n][tensor][orders[n].index(token)] for n in orders if token in orders[n]}
                default = own["one"] if "one" in own else torch.stack([r.double() for r in own.values()]).mean(0)
                rows = [own.get(name, default) for name in orders]
                exact = torch.stack([each.double() for each in rows]).mean(0)
                torch.testing.assert_close(made[tensor][row].double(), exact, rtol=2**-7, atol=1e-6)
        assert json.loads((place / "out/config.json").read_text())["vocab_size"] == len(orders["two"])
        assert json.loads((place / "out/tokenizer.json").read_text()) == tokenizer(orders["two"])
        assert mergekit_lite.verify("out").sound


def test_added_tokens_keep_the_rows_of_whoever_has_them(place: Path) -> None:
    """A base and two fine-tunes, each with a token of its own: linear and TIES give the only row there is."""
    base = model(place / "base", 0, [*WORDS])
    chat = model(place / "chat", 1, [*WORDS, "<|im_end|>"])
    for method in ("linear", "ties", "task_arithmetic"):
        recipe = linear(["chat"], base_model="base", tokenizer_source="union") | {"merge_method": method}
        recipe["models"].append({"model": "base", "parameters": {"weight": 0.5}}) if method == "linear" else None
        made = merged(recipe)
        for tensor in VOCABULARY:
            assert same_bytes(made[tensor][len(WORDS)], chat[tensor][len(WORDS)]), method
    plan = mergekit_lite.plan_merge(recipe, "x")
    assert any(
        "10 tokens at the same place, 0 at another, 1 it lacks; 10 rows become 11" in note for note in plan.notes
    )
    assert base is not None


@pytest.mark.parametrize(("width", "rows"), [("base", 12), ("max", 16), ("min", 12)])
def test_padded_vocabularies_take_the_width_that_is_asked_for(place: Path, width: str, rows: int) -> None:
    """Padding rows that several have are merged, those that one has are kept."""
    base, tuned = model(place / "base", 0, [*WORDS], rows=12), model(place / "tuned", 1, [*WORDS], rows=16)
    recipe = linear(["base", "tuned"], base_model="base", tokenizer={"source": "base", "width": width})
    made = merged(recipe)
    for tensor in VOCABULARY:
        assert len(made[tensor]) == rows
        for row in range(min(rows, 12)):
            assert same_bytes(made[tensor][row], mean(base[tensor][row], tuned[tensor][row]))
        for row in range(12, rows):
            assert same_bytes(made[tensor][row], tuned[tensor][row])
    assert json.loads((place / "out/config.json").read_text())["vocab_size"] == len(made[VOCABULARY[0]])
    assert parse(to_yaml(as_data(parse(to_yaml(recipe))))) == parse(to_yaml(recipe))


def test_a_multiple_pads_with_rows_of_nothing(place: Path) -> None:
    model(place / "one", 0, [*WORDS])
    model(place / "two", 1, [*WORDS])
    made = merged(linear(["one", "two"], tokenizer={"source": "one", "pad_to_multiple_of": 8}))
    for tensor in VOCABULARY:
        assert len(made[tensor]) == 16
        assert not made[tensor][10:].any()


def test_single_tokens_get_what_the_recipe_says(place: Path) -> None:
    one, two = model(place / "one", 0, [*WORDS]), model(place / "two", 1, [*reversed(WORDS)])
    tokens = {
        "a": {"source": {"kind": "zero"}, "force": True},
        "b": {"source": "two", "force": True},
        "c": {"source": {"kind": "model_token", "model": "two", "token": "win"}, "force": True},
        "win": {"source": {"kind": "model_token", "model": "one", "token_id": 0}, "force": True},
    }
    recipe = linear(["one", "two"], tokenizer={"source": "one", "tokens": tokens})
    made = merged(recipe)
    for tensor in VOCABULARY:
        at = {token: made[tensor][number] for number, token in enumerate(WORDS)}
        assert not at["a"].any()
        assert same_bytes(at["b"], two[tensor][WORDS[::-1].index("b")])
        assert same_bytes(at["c"], two[tensor][WORDS[::-1].index("win")])
        assert same_bytes(at["win"], one[tensor][0])
    assert parse(to_yaml(as_data(parse(to_yaml(recipe))))) == parse(to_yaml(recipe))


def test_tokens_of_two_alphabets_are_matched_by_what_they_stand_for(place: Path) -> None:
    bytes_of = ["<s>", "</s>", "Ġsnow", "Ã©", "a", "Ã"]
    words_of: list[str | None] = ["<s>", "</s>", "a", "é", "▁snow", "<0xC3>"]
    one = model(place / "bytes", 0, [*bytes_of])
    two = model(place / "words", 1, words_of)
    (place / "words/tokenizer.json").write_text(json.dumps(tokenizer(words_of, kind="Metaspace")))
    made = merged(linear(["bytes", "words"], tokenizer_source="bytes"))
    for tensor in VOCABULARY:
        for row, other in enumerate([0, 1, 4, 3, 2, 5]):
            assert same_bytes(made[tensor][row], mean(one[tensor][row], two[tensor][other]))


@pytest.mark.parametrize(
    ("written", "source"), [("Ġsnow", "words"), (" snow", {"token": " snow"}), ("Ġsnow", {"token": "▁snow"})]
)
def test_a_recipe_names_tokens_as_their_tokenizer_does_or_by_what_they_say(
    place: Path, written: str, source: str | dict[str, str]
) -> None:
    model(place / "bytes", 0, ["<s>", "</s>", "Ġsnow", "a"])
    words: list[str | None] = ["<s>", "</s>", "a", "▁snow"]
    two = model(place / "words", 1, words)
    (place / "words/tokenizer.json").write_text(json.dumps(tokenizer(words, kind="Metaspace")))
    given = source if isinstance(source, str) else {"kind": "model_token", "model": "words", **source}
    made = merged(
        linear(["bytes", "words"], tokenizer={"source": "bytes", "tokens": {written: {"source": given, "force": True}}})
    )
    for tensor in VOCABULARY:
        assert same_bytes(made[tensor][2], two[tensor][3])


def test_a_tied_head_stays_tied(place: Path) -> None:
    for number, name in enumerate(("one", "two")):
        tokens: list[str | None] = [*WORDS] if number == 0 else [*reversed(WORDS)]
        tensors = model(place / name, number, tokens, tie_word_embeddings=True)
        del tensors["lm_head.weight"]
        config = json.loads((place / name / "config.json").read_text())
        write_folder(place / name, tensors, config=config)
    made = merged(linear(["one", "two"], tokenizer_source="one"))
    assert "lm_head.weight" not in made
    assert json.loads((place / "out/config.json").read_text())["tie_word_embeddings"] is True


def test_what_only_one_model_has_is_told_and_what_cannot_be_told_is_refused(place: Path) -> None:
    model(place / "one", 0, [*WORDS])
    model(place / "two", 1, [*WORDS, "<|im_end|>"])
    plan = mergekit_lite.plan_merge(linear(["one", "two"], tokenizer_source="one"), "x")
    assert any("1 that only it has are left out: '<|im_end|>'" in note for note in plan.notes)
    (place / "two/tokenizer.json").unlink()
    with pytest.raises(PlanError, match=r"two: has no tokenizer\.json to tell"):
        merged(linear(["one", "two"], tokenizer_source="one"))


def test_special_tokens_follow_the_tokenizer(place: Path) -> None:
    model(place / "one", 0, [*WORDS], eos_token_id=1)
    model(place / "two", 1, [*WORDS, "<|im_end|>"], eos_token_id=10)
    (place / "one/generation_config.json").write_text('{"eos_token_id": 1}')
    (place / "two/generation_config.json").write_text('{"eos_token_id": 10}')
    (place / "two/tokenizer_config.json").write_text('{"eos_token": "<|im_end|>"}')
    merged(linear(["one", "two"], base_model="one", tokenizer_source="two"))
    for name in ("config.json", "generation_config.json"):
        assert json.loads((place / "out" / name).read_text())["eos_token_id"] == 10
    plan = mergekit_lite.plan_merge(linear(["one", "two"], base_model="one", tokenizer_source="two"), "x")
    assert "one uses other special tokens: eos_token '</s>', here '<|im_end|>'" in plan.notes


def test_other_numbers_in_the_config_follow_their_tokens(place: Path) -> None:
    """The config is the base's, and its rows move: what it says of an image stands where that token is now."""
    numbers = {"image_token_id": 3, "stop_token_ids": [4, 9], "text_config": {"decoder_start_token_id": 0, "depth": 3}}
    model(place / "one", 0, [*WORDS], eos_token_id=1, lost_token_id=9, **numbers)
    model(place / "two", 1, WORDS[8::-1], eos_token_id=7)
    merged(linear(["one", "two"], base_model="one", tokenizer_source="two"))
    config = json.loads((place / "out/config.json").read_text())
    assert config["eos_token_id"] == 7 and config["image_token_id"] == WORDS[8::-1].index(WORDS[3])
    assert config["stop_token_ids"] == [WORDS[8::-1].index(WORDS[4])] and config["lost_token_id"] is None
    assert config["text_config"] == {"decoder_start_token_id": 8, "depth": 3}
    merged(linear(["one", "two"], base_model="one", tokenizer_source="base"))
    kept = json.loads((place / "out/config.json").read_text())
    assert {key: kept[key] for key in numbers} == numbers


def test_special_tokens_follow_a_tokenizer_of_the_same_tokens(place: Path) -> None:
    """Nothing moves, but the tokenizer ends elsewhere: config and tokenizer agree, and no number of another stays."""
    model(place / "one", 0, [*WORDS], eos_token_id=1)
    model(place / "two", 1, [*WORDS], eos_token_id=5)
    recipe = linear(["one", "two"], base_model="one", tokenizer_source="two")
    for numbers, stays in ((1, False), (5, True), ([1, 5], True)):
        (place / "one/generation_config.json").write_text(json.dumps({"eos_token_id": numbers}))
        merged(recipe)
        assert json.loads((place / "out/config.json").read_text())["eos_token_id"] == 5
        assert (place / "out/generation_config.json").exists() == stays
    assert not any("eos_token_id" in note for note in mergekit_lite.plan_merge(recipe, "x").notes)


def test_any_part_of_gathered_rows_is_what_the_whole_has(place: Path) -> None:
    """Reads of any begin and length, across runs, means and zeros."""
    seed = random.randrange(1 << 30)
    print(f"seed {seed}")
    draw = random.Random(seed)
    model(place / "one", 0, [*WORDS])
    model(place / "two", 1, [*WORDS])
    specs = [open_checkpoint(name).tensors[VOCABULARY[0]] for name in ("one", "two")]
    matrix, row = [0, 0, 0, -1, -2, 1, 1, 1, -1], [3, 4, 5, 0, 0, 9, 0, 1, 0]
    places = Places(np.array(matrix, np.int32), np.array(row, np.int32), (((0, 1), (1, 2)), ()))
    made = gathered(specs[0], specs, places)
    with Reader() as reader:
        whole = made.elements(reader, 0, made.numel)
        for _ in range(100):
            begin = draw.randrange(made.numel)
            count = draw.randint(1, made.numel - begin)
            assert same_bytes(made.elements(reader, begin, count), whole[begin : begin + count])
            part = part_of(made, draw.randint(0, begin), draw.randint(begin + count, made.numel))
            assert same_bytes(part.elements(reader, begin, count), whole[begin : begin + count])
        rows = [spec.elements(reader, 0, spec.numel).view(10, 8) for spec in specs]
        assert same_bytes(whole.view(-1, 8)[0], rows[0][3]) and same_bytes(whole.view(-1, 8)[7], rows[1][1])
        assert same_bytes(whole.view(-1, 8)[3], ((rows[0][1].double() + rows[1][2].double()) / 2).bfloat16())
        assert not whole.view(-1, 8)[4].any()


def test_a_text_that_is_two_tokens_keeps_both_rows(place: Path) -> None:
    """An added token that repeats an entry of the vocabulary: each number has its own row, where a model has both."""
    content = tokenizer([*WORDS])
    content["added_tokens"].append({"id": len(WORDS), "content": "a"})
    models = {name: model(place / name, number, [*WORDS, "a"]) for number, name in enumerate(("one", "two"))}
    for name in models:
        (place / name / "tokenizer.json").write_text(json.dumps(content))
    models["three"] = model(place / "three", 2, [*WORDS[::-1]])
    made = merged(linear([*models], tokenizer_source="one"))
    for tensor in VOCABULARY:
        one, two, three = (each[tensor] for each in models.values())
        for row in (WORDS.index("a"), len(WORDS)):
            assert same_bytes(made[tensor][row], mean(one[row], two[row], three[WORDS[::-1].index("a")]))


def test_rows_of_a_matrix_that_a_model_lacks_are_not_read_elsewhere(place: Path) -> None:
    """One model alone has a bias; the rows of tokens that only the other has are zeros, not bytes behind its own."""
    model(place / "large", 0, [*WORDS, *(f"more {number}" for number in range(30))])
    small = model(place / "small", 1, [*WORDS]) | {"lm_head.bias": torch.ones(len(WORDS)).bfloat16()}
    write_folder(place / "small", small, config=json.loads((place / "small/config.json").read_text()))
    recipe = linear(["large", "small"], base_model="small", tokenizer_source="large", exclude=["lm_head.bias"])
    bias = merged(recipe)["lm_head.bias"]
    assert bias.tolist() == [1.0] * len(WORDS) + [0.0] * 30


def test_what_is_called_like_a_head_within_a_layer_stays(place: Path) -> None:
    """A layer's ``output.weight`` has no rows of tokens; another embedding within a layer has."""
    tokens: dict[str, list[str | None]] = {"one": [*WORDS], "two": [*WORDS[::-1]]}
    tensors = {}
    for number, name in enumerate(tokens):
        own = model(place / name, number, tokens[name])
        own |= {"model.layers.0.output.weight": torch.randn(3, 8).bfloat16()}
        own |= {"model.layers.1.embed_tokens.weight": own[VOCABULARY[0]] * 2}
        tensors[name] = own
        write_folder(place / name, own, config=json.loads((place / name / "config.json").read_text()))
    made = merged(linear([*tokens], tokenizer_source="one"))
    for name, turned in (("model.layers.0.output.weight", False), ("model.layers.1.embed_tokens.weight", True)):
        other = tensors["two"][name].flip(0) if turned else tensors["two"][name]
        assert same_bytes(made[name], mean(tensors["one"][name], other))


def test_spans_travel_with_their_own_rows_alone(place: Path) -> None:
    """A matrix of several spans: what a worker is sent for one doesn't grow with the others; the bytes are right."""
    tokens: list[str | None] = ["<s>", "</s>", *(f"t{number}" for number in range(9000))]
    turned = tokens[::-1]
    tensors = {}
    for number, (name, order) in enumerate({"one": tokens, "two": turned}.items()):
        model(place / name, number, order)
        generator = torch.Generator().manual_seed(number)
        tensors[name] = {VOCABULARY[0]: torch.randn(len(order), 1024, generator=generator).bfloat16()}
        write_folder(place / name, tensors[name], config=json.loads((place / name / "config.json").read_text()))
    recipe = linear(["one", "two"], tokenizer_source="one")
    [job] = mergekit_lite.plan_merge(recipe, "x").jobs
    [of_job] = spans(mergekit_lite.plan_merge(recipe, "x"))
    assert len(of_job) == 2
    assert len(pickle.dumps(job)) > 8 * len(tokens)
    sizes = [len(pickle.dumps(span)) for span in by_themselves(of_job)]
    assert sum(sizes) < len(pickle.dumps(job)) + 10_000
    made = merged(recipe)[VOCABULARY[0]]
    one, two = tensors["one"][VOCABULARY[0]], tensors["two"][VOCABULARY[0]].flip(0)
    assert same_bytes(made, ((one.float() + two.float()) / 2).bfloat16())


def test_numbers_that_no_row_can_have_are_no_tokens() -> None:
    content = {
        "model": {"vocab": {"a": -1, "b": True, "c": 2}},
        "added_tokens": [{"id": -5, "content": "d"}, {"id": 3, "content": "e"}],
    }
    assert vocabulary_in(content) == {2: "c", 3: "e"}


@pytest.mark.parametrize("vocabulary", [5, "abc", [1, 2], [{"a": 1}], [["a"], []], None, {"a": "x"}])
def test_a_broken_vocabulary_has_the_tokens_that_can_be_told(place: Path, vocabulary: Any) -> None:
    model(place / "one", 0, list("abcd"))
    model(place / "two", 1, list("abcd"))
    content = {"model": {"vocab": vocabulary}, "added_tokens": [{"id": 2, "content": "c"}, {"id": "x"}, 7]}
    (place / "two/tokenizer.json").write_text(json.dumps(content))
    plan = mergekit_lite.plan_merge(linear(["one", "two"], tokenizer_source="base"), "out")
    lacking = 2 if vocabulary == [["a"], []] else 3
    assert any(f"two: {4 - lacking} token" in note and f"{lacking} it lacks" in note for note in plan.notes)


def test_a_vocabulary_far_larger_than_its_tokens_is_refused(place: Path) -> None:
    """A number of a token, or a multiple, that would take all memory."""
    model(place / "one", 0, list("abcd"))
    model(place / "two", 1, list("dcbae"))
    wide = linear(["one", "two"], tokenizer={"source": "base", "pad_to_multiple_of": 10**12})
    with pytest.raises(PlanError, match=r"pad_to_multiple_of: 1,000,000,000,000 makes .* rows for 4 tokens"):
        mergekit_lite.plan_merge(wide, "out")
    with pytest.raises(PlanError, match=r"pad_to_multiple_of: 1,000,000,000,000 makes .* rows for 5 tokens"):
        plan_transplant("one", "two", "out", method="mean", pad_to_multiple_of=10**12)
    content = json.loads((place / "one/tokenizer.json").read_text())
    content["added_tokens"].append({"id": 10**12, "content": "far"})
    (place / "one/tokenizer.json").write_text(json.dumps(content))
    for tokens in ({"source": "union"}, {"source": "base", "tokens": {"new": {"source": {"kind": "zero"}}}}):
        with pytest.raises(PlanError, match="one: its tokenizer numbers a token 1,000,000,000,001, far beyond others"):
            mergekit_lite.plan_merge(linear(["one", "two"], tokenizer=tokens), "out")
    with pytest.raises(PlanError, match="one: its tokenizer numbers a token 1,000,000,000,000, far beyond others"):
        plan_transplant("two", "one", "out", method="mean")


def test_texts_of_tokens_are_told_without_controls_and_short(place: Path) -> None:
    end = "\x1b]0;title\x07" + "q" * 5000
    model(place / "one", 0, ["</s>", *"abc"])
    model(place / "two", 1, [end, *"abc", "\x1b[31mred"])
    for name, text in (("one", "</s>"), ("two", end)):
        (place / name / "tokenizer_config.json").write_text(json.dumps({"eos_token": text}))
    plans = [
        mergekit_lite.plan_merge(linear(["one", "two"], tokenizer_source="one"), "out"),
        plan_transplant("one", "two", "out", method="mean"),
    ]
    for plan in plans:
        notes = "\n".join(plan.notes)
        assert "eos_token" in notes and "\x1b" not in notes and max(map(len, plan.notes)) < 300
