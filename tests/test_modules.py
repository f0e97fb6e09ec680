"""Modules: parts of a model merged by slices of their own; what is in none is the base's, and the output loads."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_lite
from mergekit_lite.errors import PlanError
from mergekit_lite.recipe import RecipeError, as_data, parse, to_yaml
from tests.families import FAMILIES, Family, step, weights
from tests.models import State, same_bytes

KINDS = {  # family: the module that gets a layer, that which is averaged, and what neither has
    "qwen2.5-vl": ("text_decoder", "vision_tower", "visual.merger"),
    "gemma3": ("vision_tower", "text_decoder", "multi_modal_projector"),
    "t5": ("decoder", "encoder", "shared"),
    "whisper": ("encoder", "decoder", "proj_out"),
}
BY_NAME = {family.name: family for family in FAMILIES}


def pair(family: Family, folder: Path) -> tuple[str, str]:
    for name in ("one", "other"):
        model = family.make()
        if name == "other":
            step(model, 0.01)
        model.save_pretrained(folder / name)
    return str(folder / "one"), str(folder / "other")


def recipe_for(one: str, other: str, grows: str, averaged: str) -> dict[str, Any]:
    whole = {"parameters": {"weight": 1}}
    return {
        "merge_method": "linear",
        "base_model": one,
        "modules": {
            grows: {
                "slices": [
                    {"sources": [{"model": one, "layer_range": [0, 2], **whole}]},
                    {"sources": [{"model": other, "layer_range": [1, 2], **whole}]},
                ]
            },
            averaged: {"models": [{"model": one}, {"model": other}], "parameters": {"weight": 0.5}},
        },
    }


def layer_of(name: str) -> int | None:
    found = re.search(r"\.(?:layers|block|blocks)\.(\d+)\.", name)
    return int(found[1]) if found else None


def expected(name: str, one: State, other: State, grown: str, averaged: str) -> torch.Tensor:
    if re.search(averaged, name):
        return ((one[name].double() + other[name].double()) / 2).to(one[name].dtype)
    if re.search(grown, name) and layer_of(name) == 2:
        return other[re.sub(r"(layers|blocks?)\.2\.", r"\1.1.", name, count=1)]
    if re.search(grown, name) and layer_of(name) is None and re.search(r"norm|head", name):
        return other[name]  # of the last slice
    return one[name]


IN_NAMES = {
    ("qwen2.5-vl", "text_decoder"): r"^(model\.(language_model\.|layers|embed|norm)|lm_head)",
    ("qwen2.5-vl", "vision_tower"): r"visual\.(?!merger)",
    ("gemma3", "text_decoder"): r"language_model|lm_head",
    ("gemma3", "vision_tower"): r"vision_tower",
    ("t5", "decoder"): r"^decoder",
    ("t5", "encoder"): r"^encoder",
    ("whisper", "decoder"): r"model\.decoder",
    ("whisper", "encoder"): r"model\.encoder",
}


@pytest.mark.parametrize("name", KINDS)
def test_every_tensor_is_accounted_for_and_it_loads(name: str, tmp_path: Path) -> None:
    family, (grows, averaged, outside) = BY_NAME[name], KINDS[name]
    one, other = pair(family, tmp_path)
    recipe = recipe_for(one, other, grows, averaged)
    plan = mergekit_lite.plan_merge(recipe, tmp_path / "out")
    told = [note for note in plan.notes if "in no module of the recipe" in note]
    copies = [job.name for job in plan.jobs if job.why == "in no module of the recipe"]
    assert bool(told) == bool(copies)
    assert (any(outside in copy for copy in copies) and outside in told[0]) or name == "whisper"
    mergekit_lite.merge(recipe, tmp_path / "out")
    made, first, second = weights(tmp_path / "out"), weights(Path(one)), weights(Path(other))
    assert first.keys() <= made.keys() and len(made) > len(first)
    for each, tensor in made.items():
        wanted = expected(each, first, second, IN_NAMES[name, grows], IN_NAMES[name, averaged])
        assert same_bytes(tensor, wanted), each
    loaded = family.load(tmp_path / "out")
    assert sum("layers.2." in each or "block.2." in each or "blocks.2." in each for each in loaded.state_dict())
    assert mergekit_lite.verify(tmp_path / "out").sound


@pytest.fixture(scope="module")
def t5(tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    return pair(BY_NAME["t5"], tmp_path_factory.mktemp("t5"))


def test_names_are_told_with_the_nearest(t5: tuple[str, str], tmp_path: Path) -> None:
    recipe = recipe_for(*t5, "decoder", "encodr")
    with pytest.raises(PlanError, match=r"line \d+: no module 'encodr' in .*Did you mean 'encoder'\?.*decoder, shared"):
        mergekit_lite.plan_merge(to_yaml_file(recipe, tmp_path), tmp_path / "out")
    both = recipe_for(*t5, "decoder", "encoder") | {"models": [{"model": t5[0]}]}
    with pytest.raises(RecipeError, match="has 'models' beside 'modules': it needs exactly one of them"):
        parse(to_yaml(both))
    both = recipe_for(*t5, "decoder", "encoder")
    both["modules"]["encoder"] = {"parameters": {"weight": 1}}
    with pytest.raises(RecipeError, match="the module 'encoder' has neither 'models' nor 'slices'"):
        parse(to_yaml(both))
    with pytest.raises(PlanError, match=r"module 'decoder': line \d+: layer_range \[0, 7\] goes too far"):
        far = recipe_for(*t5, "decoder", "encoder")
        far["modules"]["decoder"]["slices"][0]["sources"][0]["layer_range"] = [0, 7]
        mergekit_lite.plan_merge(far, tmp_path / "out")


def to_yaml_file(recipe: dict[str, Any], folder: Path) -> Path:
    path = folder / "recipe.yml"
    path.write_text(to_yaml(recipe))
    return path


def test_any_beginning_of_names_is_a_module(t5: tuple[str, str], tmp_path: Path) -> None:
    """And default is all that no other one has; the longest beginning decides; each has its own numbers."""
    one, other = t5
    models = [{"model": one, "parameters": {"weight": 0}}, {"model": other, "parameters": {"weight": 1}}]
    recipe: dict[str, Any] = {
        "merge_method": "linear",
        "base_model": one,
        "modules": {
            "encoder.block.1.": {"models": models},
            "encoder": {"models": [{"model": one}], "parameters": {"weight": 1}},
            "default": {"models": models},
        },
    }
    parsed = parse(to_yaml(recipe))
    assert parse(to_yaml(as_data(parsed))) == parsed
    assert not [job for job in mergekit_lite.plan_merge(recipe, tmp_path / "x").jobs if job.why]
    mergekit_lite.merge(recipe, tmp_path / "out")
    made, first, second = (weights(Path(folder)) for folder in (tmp_path / "out", one, other))
    for name, tensor in made.items():
        from_one = name.startswith("encoder.") and not name.startswith("encoder.block.1.")
        assert same_bytes(tensor, (first if from_one else second)[name]), name
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["num_layers"] == config["num_decoder_layers"] == 2
