"""Unions of tokenizers of which none has all tokens, and new tokens: mergekit's rows, and what they are good for."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.tokenizer_file import read_tokenizers
from mergekit_lite.errors import PlanError
from mergekit_lite.planning.unions import appended, examined
from mergekit_lite.recipe import as_data, parse, to_yaml
from mergekit_lite.resident.model import tokenizer_of
from parity.unions import MODELS, VOCABULARY, digest_of, recipe, write_models
from tests.models import read_folder, same_bytes, write_folder

BY_MERGEKIT = "48f35d11d4360bfec7b5804fd61ef58ab6f84bd34d6b651d9cf0cdcbafca8f59"  # python -m parity.unions
SPECIAL = ("<s>", "</s>", "<|im_end|>", "<tool>")
ADDED = ("in", "def", "si", "de", "and", "ter", "er", "now", "win", "Ġsnow", "<new>")


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_union_has_mergekits_tokens_and_rows(place: Path) -> None:
    """All 51 tokens with both rows each; the tokenizer that is written gives them the numbers of these rows."""
    mergekit_lite.merge(recipe(place), "out")
    loaded = Tokenizer.from_file("out/tokenizer.json")
    numbers = loaded.get_vocab()
    assert len(numbers) == 51
    assert digest_of(numbers, Path("out")) == BY_MERGEKIT
    added = {token.content: token.special for token in loaded.get_added_tokens_decoder().values()}
    assert added == dict.fromkeys(SPECIAL, True) | dict.fromkeys(ADDED, False)
    before = Tokenizer.from_file("base/tokenizer.json").get_vocab()
    assert {text: numbers[text] for text in before} == before
    own = [text for text in sorted(numbers, key=lambda text: numbers[text]) if text not in before]
    assert own == ["in", "win", "er", "ter", "and", "now", "Ġsnow", "de", "def", "si", "<|im_end|>", "<new>"]
    assert json.loads(Path("out/config.json").read_text())["vocab_size"] == 51
    assert mergekit_lite.verify("out", samples="all").sound


def test_transformers_loads_it_with_these_numbers(place: Path) -> None:
    from transformers import AutoTokenizer

    mergekit_lite.merge(recipe(place), "out")
    loaded = AutoTokenizer.from_pretrained("out")
    assert loaded.get_vocab() == Tokenizer.from_file("out/tokenizer.json").get_vocab()
    assert loaded("<|im_end|>").input_ids == [loaded.get_vocab()["<|im_end|>"]]
    assert loaded.decode([loaded.get_vocab()["<|im_end|>"]], skip_special_tokens=True) == ""


def test_what_no_text_reaches_and_what_cuts_texts_otherwise_is_told(place: Path) -> None:
    """The plan counts by the tokenizer itself: literals match before a text is split, what begins with Ġ never."""
    notes = mergekit_lite.plan_merge(recipe(place), "out").notes
    [told] = [note for note in notes if note.startswith("union: ")]
    assert "10 tokens of other vocabularies are put behind those of" in told
    assert "1 that no text reaches ('Ġsnow')" in told
    assert "9 that match wherever their letters stand" in told and "tokenizer transplant" in told
    assert any("2 tokens added to the tokenizer of" in note and "'<|im_end|>', '<new>'" in note for note in notes)
    union = Tokenizer.from_str(json.dumps(_written(place)))
    text = "winter and snow"
    assert union.encode(text).tokens != Tokenizer.from_file("chat/tokenizer.json").encode(text).tokens
    assert union.encode(text).tokens != Tokenizer.from_file("base/tokenizer.json").encode(text).tokens


def _written(place: Path) -> dict[str, Any]:
    mergekit_lite.merge(recipe(place), "out")
    content: dict[str, Any] = json.loads((place / "out/tokenizer.json").read_text())
    return content


def test_padding_of_the_base_becomes_room_for_new_tokens_and_is_no_row_of_theirs(place: Path) -> None:
    """A base of 8 rows more than tokens: the new ones stand there, with the rows of those that have them."""
    own = read_folder(place / "base")
    count = len(own[VOCABULARY[0]])
    other = read_folder(place / "chat")
    for name in VOCABULARY:
        own[name] = torch.cat([own[name], torch.full((8, 8), 5.0)])

    write_folder(
        place / "base", own, config=json.loads(Path("base/config.json").read_text()) | {"vocab_size": count + 8}
    )
    asked = recipe(place)
    asked["models"] = [{"model": str(place / name), "parameters": {"weight": 0.5}} for name in ("base", "chat")]
    asked["tokenizer"] = {"source": "union", "align": "strings"}
    mergekit_lite.merge(asked, "out")
    made = read_folder(Path("out"))
    win = Tokenizer.from_file("out/tokenizer.json").token_to_id("win")
    assert count <= win < count + 8 == len(made[VOCABULARY[0]])
    for name in VOCABULARY:
        assert same_bytes(made[name][win], other[name][Tokenizer.from_file("chat/tokenizer.json").token_to_id("win")])


def test_a_union_may_be_what_another_document_is_made_of(place: Path) -> None:
    """What is planned of a result before it is there has the tokens that it will have."""
    joined, last = recipe(place), {"merge_method": "passthrough", "models": [{"model": "joined"}]}
    Path("both.yml").write_text(f"name: joined\n{to_yaml(joined)}---\n{to_yaml(last | {'tokenizer_source': 'joined'})}")
    mergekit_lite.merge("both.yml", "out")
    assert digest_of(Tokenizer.from_file("out/tokenizer.json").get_vocab(), Path("out")) == BY_MERGEKIT


def test_a_union_that_is_made_while_it_is_read_leaves_the_same_files(place: Path) -> None:
    last = {"merge_method": "linear", "tokenizer_source": "joined", "parameters": {"weight": 0.5}}
    last["models"] = [{"model": "joined"}, {"model": str(place / "base")}]
    Path("both.yml").write_text(f"name: joined\n{to_yaml(recipe(place))}---\n{to_yaml(last)}")
    mergekit_lite.merge("both.yml", "out")
    mergekit_lite.merge("both.yml", "kept", keep=True)
    for name in ("model.safetensors", "tokenizer.json", "tokenizer_config.json", "config.json"):
        assert Path("out", name).read_bytes() == Path("kept", name).read_bytes(), name
    assert mergekit_lite.verify("out", samples="all").sound


def test_a_model_in_memory_has_the_tokenizer_that_will_be_written(place: Path) -> None:
    from transformers import AutoTokenizer

    in_memory = tokenizer_of(mergekit_lite.plan_merge(recipe(place), "out"))
    mergekit_lite.merge(recipe(place), "out")
    written = AutoTokenizer.from_pretrained("out")
    assert in_memory.get_vocab() == written.get_vocab()
    assert set(in_memory.all_special_tokens) == set(written.all_special_tokens)
    for text in ("winter and snow", "<|im_end|>in the <new>def", "a<s>b</s>now<tool>"):
        numbers = in_memory(text).input_ids
        assert numbers == written(text).input_ids
        assert in_memory.decode(numbers, skip_special_tokens=True) == written.decode(numbers, skip_special_tokens=True)


def test_new_tokens_are_added_with_the_row_that_is_given(place: Path) -> None:
    """Without a union, too; a token without a source gets zeros, and one that is there is none."""
    asked = recipe(place)
    asked["tokenizer"]["source"] = "base"
    asked["tokenizer"]["tokens"] |= {"<zero>": {}, "no": {"source": str(place / "chat"), "force": True}}
    mergekit_lite.merge(asked, "out")
    made, chat = read_folder(Path("out")), read_folder(place / "chat")
    tokenizer = Tokenizer.from_file("out/tokenizer.json")
    of_chat = Tokenizer.from_file("chat/tokenizer.json")
    count = len(Tokenizer.from_file("base/tokenizer.json").get_vocab())
    assert [tokenizer.token_to_id(text) for text in ("<new>", "<zero>")] == [count, count + 1]
    for name in VOCABULARY:
        assert same_bytes(made[name][count], chat[name][of_chat.token_to_id("win")])
        assert not made[name][count + 1].any()
        assert same_bytes(made[name][tokenizer.token_to_id("no")], chat[name][of_chat.token_to_id("no")])
    assert any("2 tokens added to the tokenizer" in note for note in mergekit_lite.plan_merge(asked, "x").notes)
    assert parse(to_yaml(as_data(parse(to_yaml(asked))))) == parse(to_yaml(asked))


def test_numbers_that_a_tokenizer_would_not_give_are_refused(place: Path) -> None:
    """A vocabulary that leaves numbers out: the library numbers new tokens from its count on."""
    content = json.loads(Path("base/tokenizer.json").read_text())
    content["model"]["vocab"]["Ġan"] += 100
    content["model"]["merges"] = [merge for merge in content["model"]["merges"] if "Ġan" not in merge.replace(" ", "")]
    Path("base/tokenizer.json").write_text(json.dumps(content))
    sources = [open_checkpoint(name) for name in MODELS]
    read = [each for each in read_tokenizers(sources) if each is not None]
    union = appended(read, 0, [1000, 1000, 1000], [], union=True)
    assert union.new[0].number == max(content["model"]["vocab"].values()) + 1
    notes, wrong = examined(sources[0], union)
    assert not notes and "leaves out numbers" in wrong[0]
    Path("base/tokenizer.json").write_text(json.dumps(content | {"model": {"type": "BPE", "vocab": {"a": 0}}}))
    with pytest.raises(PlanError, match=r"the package tokenizers can't load its tokenizer\.json"):
        mergekit_lite.plan_merge(recipe(place), "out")
