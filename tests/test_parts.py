"""A model that stands for a part of another: a language model in a vision model, one of two towers, renamed names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

import mergekit_lite
from mergekit_lite.errors import CheckpointError, PlanError, UsageError
from mergekit_lite.recipe import as_data, parse, to_yaml
from tests.models import State, read_folder, same_bytes, state, tuned, write_folder

TEXT = {"model_type": "llama", "hidden_size": 8, "num_hidden_layers": 2}


def language(seed: int) -> State:
    return tuned(state(0), seed)


def omni(seed: int) -> State:
    """Two language models of one shape with a head each: names and shapes alone can't tell them apart."""
    return {
        f"{tower}.{name}": tensor
        for number, tower in enumerate(("thinker", "talker"))
        for name, tensor in language(seed + 10 * number).items()
    }


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_folder(tmp_path / "llm", language(1), config=TEXT)
    write_folder(
        tmp_path / "omni", omni(2), config={"model_type": "omni", "thinker_config": TEXT, "talker_config": TEXT}
    )
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(recipe: dict[str, Any]) -> State:
    mergekit_lite.merge(recipe, "out", force=True)
    return read_folder(Path("out"))


def averaged(model: dict[str, Any]) -> dict[str, Any]:
    weight = {"parameters": {"weight": 0.5}}
    return {
        "merge_method": "linear",
        "base_model": "omni",
        "models": [{"model": "omni", **weight}, {**model, **weight}],
    }


@pytest.mark.parametrize("tower", ["thinker", "talker"])
def test_a_model_is_merged_into_the_part_that_is_named(place: Path, tower: str) -> None:
    made, whole, alone = merged(averaged({"model": "llm", "part": tower})), read_folder(place / "omni"), language(1)
    assert made.keys() == whole.keys()
    for name, tensor in made.items():
        if name.startswith(tower):
            own = alone[name.removeprefix(f"{tower}.")]
            assert same_bytes(tensor, ((whole[name].float() + own.float()) / 2).to(tensor.dtype))
        else:
            assert same_bytes(tensor, whole[name])
    plan = mergekit_lite.plan_merge(averaged({"model": "llm", "part": tower}), "x")
    assert {job.why for job in plan.copied} == {f"outside {tower}."}
    assert mergekit_lite.verify("out").sound


def test_the_head_beside_a_part_is_its_head(place: Path) -> None:
    tensors = {name.replace("model.", "model.language_model."): tensor for name, tensor in language(2).items()}
    tensors |= {"model.visual.proj.weight": language(3)["model.embed_tokens.weight"]}
    write_folder(place / "omni", tensors, config={"model_type": "vl", "text_config": TEXT, "vision_config": {}})
    made = merged(averaged({"model": "llm", "part": "model.language_model."}))
    mean = (tensors["lm_head.weight"].float() + language(1)["lm_head.weight"].float()) / 2
    assert same_bytes(made["lm_head.weight"], mean.to(made["lm_head.weight"].dtype))
    assert same_bytes(made["model.visual.proj.weight"], tensors["model.visual.proj.weight"])


def test_it_holds_for_references_everywhere(place: Path) -> None:
    finished = mergekit_lite.extrapolate("part=thinker:llm", "omni", "more", alpha=0.5)
    whole, alone = read_folder(place / "omni"), language(1)
    for name, tensor in read_folder(finished.outputs[0]).items():
        if name.startswith("talker"):
            assert same_bytes(tensor, whole[name])
        else:
            sft = alone[name.removeprefix("thinker.")].double()
            assert same_bytes(tensor, (whole[name].double() * 1.5 - 0.5 * sft).to(tensor.dtype))


def test_a_tokenizer_and_rows_are_of_the_model_that_stands_for_a_part(place: Path) -> None:
    """Named without its part, as long as it is listed once; ``base`` and ``union`` stay what they are."""
    given = {"tokens": {"a": {"source": "llm"}, "b": {"source": {"kind": "model_token", "model": "llm", "token": "a"}}}}
    recipe = averaged({"model": "llm", "part": "thinker"})
    read = parse(to_yaml({**recipe, "tokenizer": {"source": "llm", **given}}))
    assert read.tokenizer == "part=thinker:llm"
    assert [row.model for row in read.vocabulary.tokens] == ["part=thinker:llm"] * 2
    assert parse(to_yaml(as_data(read))) == read
    assert parse(to_yaml({**recipe, "tokenizer": {"source": "omni"}})).tokenizer == "omni"
    assert parse(to_yaml({**recipe, "tokenizer_source": "llm"})).tokenizer == "part=thinker:llm"
    recipe["models"].append({"model": "llm", "part": "talker", "parameters": {"weight": 1}})
    with pytest.raises(UsageError, match="one of the recipe's models, got 'llm'"):
        parse(to_yaml({**recipe, "tokenizer_source": "llm"}))


def test_beginnings_of_names_are_read_as_others(place: Path) -> None:
    odd = {name.replace("model.", "decoder.body."): tensor for name, tensor in language(1).items()}
    write_folder(place / "odd", odd, config=TEXT)
    renamed = averaged({"model": "odd", "part": "thinker", "rename": {"decoder.body.": "model."}})
    plain = averaged({"model": "llm", "part": "thinker"})
    one, other = merged(renamed), merged(plain)
    assert all(same_bytes(one[name], other[name]) for name in other)
    recipe = parse(to_yaml(renamed))
    assert recipe.models[1] == "part=thinker:rename=decoder.body.>model.:odd"
    assert parse(to_yaml(as_data(recipe))) == recipe


def test_nothing_is_lost_and_nothing_guessed(place: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor of omni has a name that begins with 'singer\.'.*thinker"):
        merged(averaged({"model": "llm", "part": "singer"}))
    write_folder(place / "deep", tuned(state(0, layers=3), 1), config=TEXT)
    with pytest.raises(CheckpointError, match=r"3 tensors with no place in thinker\. of omni"):
        merged(averaged({"model": "deep", "part": "thinker"}))
    with pytest.raises(CheckpointError, match="no tensor's name begins with 'body'"):
        merged(averaged({"model": "llm", "part": "thinker", "rename": {"body": "model"}}))
    with pytest.raises(PlanError, match="is a part of a model, and the output needs a whole one"):
        merged({"merge_method": "linear", "models": [{"model": "llm", "part": "thinker"}], "parameters": {"weight": 1}})


def test_the_backbone_alone_is_merged(place: Path) -> None:
    """Models of other vocabularies merge between embedding and head."""
    wide = language(5) | {
        name: tensor for name, tensor in state(6, vocabulary=24).items() if "embed_tokens" in name or "lm_head" in name
    }
    write_folder(place / "wide", wide, config=TEXT)
    recipe = {
        "merge_method": "linear",
        "backbone": "only",
        "models": [{"model": "llm", "parameters": {"weight": 0.5}}, {"model": "wide", "parameters": {"weight": 0.5}}],
    }
    made, one, other = merged(recipe), language(1), wide
    for name, tensor in made.items():
        if "embed_tokens" in name or "lm_head" in name:
            assert same_bytes(tensor, one[name])
        else:
            assert same_bytes(tensor, ((one[name].float() + other[name].float()) / 2).to(tensor.dtype))
    assert json.loads((place / "out" / "config.json").read_text())["hidden_size"] == 8
    assert parse(to_yaml(as_data(parse(to_yaml(recipe))))) == parse(to_yaml(recipe))
