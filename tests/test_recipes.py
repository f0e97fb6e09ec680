"""Every recipe of the repository plans and runs: tiny models stand where its names point to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import mergekit_lite
from mergekit_lite.recipe import Recipe, parse, text_of
from tests.models import State, read_folder, state, tuned, write_folder

ROOT = Path(__file__).parents[1]
FILES = sorted((ROOT / "recipes").rglob("*.yml"))
LAYERS, HIDDEN = 6, 8
BESIDE_STATE = ("self_attn.o_proj", "mlp.gate_proj", "mlp.down_proj")  # what the recipes' filters name


def llama(layers: int) -> State:
    """The state of a tiny model, with all kinds of tensors that the recipes tell apart."""
    made = state(0, layers=layers, hidden=HIDDEN)
    generator = torch.Generator().manual_seed(9)
    for layer in range(layers):
        for name in BESIDE_STATE:
            weight = torch.randn((HIDDEN, HIDDEN), generator=generator) * 0.02
            made[f"model.layers.{layer}.{name}.weight"] = weight.bfloat16()
    return made


def layers_of(recipe: Recipe) -> int:
    """How deep the models have to be."""
    ends = [source.layers[1] for part in recipe.slices for source in part.sources if source.layers]
    return max([LAYERS, *ends])


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = parse(text_of(file), str(file))
    layers = layers_of(recipe)
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    base = llama(layers)
    for number, model in enumerate(recipe.models):
        # A path that exists goes before a repository of the hub.
        tensors = base if model == recipe.base_model else tuned(base, number + 1)
        write_folder(tmp_path / model.partition("@")[0], tensors, config=config)
    monkeypatch.chdir(tmp_path)
    plan = mergekit_lite.plan_merge(file, "out")
    assert plan.notes == ()
    assert not plan.left_out or len(recipe.slices) > 1 or recipe.exclude
    mergekit_lite.merge(file, "out")
    merged = read_folder(tmp_path / "out")
    assert merged.keys() == {job.name for job in plan.jobs}
    assert all(tensor.isfinite().all() for tensor in merged.values())
    assert any(job.merged_elements for job in plan.jobs)


def test_recipes_are_found() -> None:
    assert len(FILES) > 60
