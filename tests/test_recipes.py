"""Every recipe of the repository plans and runs: tiny models stand where its names point to."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

import mergekit_lite
from mergekit_lite.checkpoint.references import plain_reference
from mergekit_lite.multimerge import plan_documents
from mergekit_lite.recipe import Recipe, text_of
from mergekit_lite.recipe.documents import parse_documents
from tests.models import State, read_folder, state, tuned, write_folder
from tests.shipped import FILES
from tests.statistics_files import write_those_of

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


def with_a_tower(language: State) -> State:
    """The state of a vision model with such a language part."""
    made = {name.replace("model.", "model.language_model."): tensor for name, tensor in language.items()}
    return made | {"model.visual.blocks.0.attn.proj.weight": language["model.layers.0.self_attn.o_proj.weight"].clone()}


def layers_of(recipe: Recipe) -> int:
    """How deep the models have to be."""
    ends = [source.layers[1] for part in recipe.slices for source in part.sources if source.layers]
    return max([LAYERS, *ends])


@pytest.mark.parametrize("file", FILES, ids=lambda file: f"{file.parent.name}/{file.stem}")
def test_runs(file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    documents = parse_documents(text_of(file), str(file))
    made_here = {document.name for document in documents}
    layers = max(layers_of(document.recipe) for document in documents)
    config = {
        "model_type": "llama",
        "num_hidden_layers": layers,
        "torch_dtype": "bfloat16",
        "tie_word_embeddings": False,
    }
    base = llama(layers)
    models = dict.fromkeys(model for document in documents for model in document.recipe.models)
    for number, model in enumerate(model for model in models if model not in made_here):
        # A path that exists goes before a repository of the hub.
        tensors = base if model == documents[-1].recipe.base_model else tuned(base, number + 1)
        if file.parent.name == "parts" and not model.startswith("part="):
            tensors = with_a_tower(tensors)
        write_folder(tmp_path / plain_reference(model).partition("@")[0], tensors, config=config)
    monkeypatch.chdir(tmp_path)
    if len(documents) == 1:
        write_those_of(yaml.safe_load(file.read_text()))
    steps = plan_documents(documents, "out")
    for document, step in zip(documents, steps, strict=True):
        assert not [note for note in step.plan.notes if "under other names: model. → model.language" not in note]
        assert not step.plan.left_out or len(document.recipe.slices) > 1 or document.recipe.exclude
        assert any(job.merged_elements for job in step.plan.jobs)
    mergekit_lite.merge(file, "out")
    merged = read_folder(tmp_path / "out")
    assert merged.keys() == {job.name for job in steps[-1].plan.jobs}
    assert all(tensor.isfinite().all() for tensor in merged.values())


def test_recipes_are_found() -> None:
    assert len(FILES) > 60
