"""Recipes as people publish them, down to the plan: what mergekit runs, runs here."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mergekit_lite
from mergekit_lite.errors import PlanError
from tests.models import State, read_folder, same_bytes, state, tuned, write_folder
from tests.tokenizers import tokenizer

TIES = {"merge_method": "ties", "base_model": "base", "parameters": {"weight": 0.5, "density": 0.5}}
LAYERS = 3


@pytest.fixture
def models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with models ``base``, ``a`` and ``b`` that have a vision tower of one layer beside the text's three."""
    base: State = state(0, layers=LAYERS)
    base["visual.blocks.0.mlp.fc.weight"] = torch.randn(8, 8).bfloat16()
    for seed, name in enumerate(("base", "a", "b")):
        write_folder(tmp_path / name, tuned(base, seed) if seed else base)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def listed(*names: str) -> list[dict[str, object]]:
    return [{"model": name} for name in names]


def test_a_template_that_nobody_has_is_a_note(models: Path) -> None:
    recipe = TIES | {"models": listed("a", "b"), "chat_template": "auto"}
    notes = mergekit_lite.plan_merge(recipe, "out").notes
    assert "chat_template: auto finds no template in any model and has no effect" in notes
    mergekit_lite.merge(recipe, "out")
    assert not (models / "out" / "chat_template.jinja").exists()


def test_union_of_one_tokenizer_is_that_tokenizer(models: Path) -> None:
    for name in ("base", "a", "b"):
        tokenizer().save_pretrained(models / name)
    mergekit_lite.merge(TIES | {"models": listed("a", "b"), "tokenizer_source": "union"}, "out")
    assert (models / "out" / "tokenizer.json").read_bytes() == (models / "base" / "tokenizer.json").read_bytes()
    more = tokenizer()
    more.add_tokens(["<another>"])
    more.save_pretrained(models / "b")
    plan = mergekit_lite.plan_merge(TIES | {"models": listed("a", "b"), "tokenizer_source": "union"}, "more")
    assert plan.tokenizer is not None and plan.inputs[plan.tokenizer].reference == "b"


@pytest.mark.parametrize("files", [("vocab.json", "merges.txt"), ("tokenizer.model",)])
def test_union_where_tokens_are_in_other_files(models: Path, files: tuple[str, ...]) -> None:
    recipe = TIES | {"models": listed("a", "b"), "tokenizer_source": "union"}
    for name in ("base", "a", "b"):
        for file in files:
            (models / name / file).write_text("same")
    assert mergekit_lite.plan_merge(recipe, "out").tokenizer is None
    (models / "a" / files[-1]).write_text("other")
    with pytest.raises(PlanError, match=r"has no tokenizer\.json to tell which row is which"):
        mergekit_lite.plan_merge(recipe, "out")


def test_nothing_but_the_base_is_a_copy(models: Path) -> None:
    recipe = TIES | {"models": listed("base")}
    notes = mergekit_lite.plan_merge(recipe, "out").notes
    mergekit_lite.merge(recipe, "out")
    assert notes == ("No tensor goes through the method: the output is a copy of base.",)
    base, out = read_folder(models / "base"), read_folder(models / "out")
    assert out.keys() == base.keys()
    assert all(same_bytes(out[name], base[name]) for name in base)


def test_a_slice_of_all_layers_is_the_whole_model(models: Path) -> None:
    sources = [{"model": name, "layer_range": [0, LAYERS]} for name in ("a", "b")]
    mergekit_lite.merge(TIES | {"slices": [{"sources": sources}]}, "sliced")
    mergekit_lite.merge(TIES | {"models": listed("a", "b")}, "whole")
    sliced, whole = read_folder(models / "sliced"), read_folder(models / "whole")
    assert sliced.keys() == whole.keys()
    assert all(same_bytes(sliced[name], whole[name]) for name in whole)
    fewer = [{"model": name, "layer_range": [0, LAYERS - 1]} for name in ("a", "b")]
    with pytest.raises(PlanError, match="list it under 'models', without a layer_range"):
        mergekit_lite.plan_merge(TIES | {"slices": [{"sources": fewer}]}, "out")
