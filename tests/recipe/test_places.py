"""A model is one in a recipe, however it is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from mergekit_lite.mixtures.building.recipe import parse as parse_mixture
from mergekit_lite.recipe import parse
from mergekit_lite.recipe.documents import parse_documents
from mergekit_lite.yaml_document import RecipeError

SAME = ("./b", "./b/", "./x/../b", "link", "~/b")


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    for name in "abcx":
        (tmp_path / name).mkdir()
    (tmp_path / "link").symlink_to("b")
    (tmp_path / "v.safetensors").touch()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize("written", SAME)
def test_the_base_is_the_base_and_a_tokenizer_its_models(written: str) -> None:
    recipe = parse(
        f"merge_method: task_arithmetic\nbase_model: {written}\nparameters: {{weight: 1}}\n"
        "models: [{model: b}, {model: a}, {model: c}]\ntokenizer_source: ./c\n"
    )
    assert recipe.models == (written, "a", "c")
    assert recipe.slices[0].base == 0
    assert recipe.tokenizer == "c"


@pytest.mark.parametrize("written", SAME)
def test_a_model_goes_in_once(written: str) -> None:
    head = "merge_method: linear\nparameters: {weight: 1}\n"
    with pytest.raises(RecipeError, match="'b' is listed twice: a model goes in once"):
        parse(f"{head}models: [{{model: b}}, {{model: {written}}}]\n")
    with pytest.raises(RecipeError, match="is listed twice"):
        parse(f"{head}models: [{{model: b+a:0.5}}, {{model: '{written}+./a:0.5'}}]\n")


def test_what_differs_or_is_not_here_stays_as_it_is_written() -> None:
    models = ("b", "b+a", "b+a:0.5", "part=m.:b", "a", "org/b", "./org/b", "s3://b/a", "s3://b//a", "b@main")
    listed = ", ".join(f"{{model: '{model}'}}" for model in models)
    recipe = parse(f"merge_method: linear\nparameters: {{weight: 1}}\nmodels: [{listed}]\n")
    assert recipe.models == models


def test_a_document_is_not_the_folder_of_its_name() -> None:
    text = (
        "name: b\nmerge_method: linear\nparameters: {weight: 1}\nmodels: [{model: a}, {model: c}]\n---\n"
        "merge_method: linear\nparameters: {weight: 1}\nmodels: [{model: ./b}, {model: b}]\n"
    )
    assert parse_documents(text)[-1].recipe.models == ("./b", "b")


def test_experts_of_a_mixture_are_one_model() -> None:
    recipe = parse_mixture(
        "base_model: b\ngate_mode: random\nexperts: [{source_model: ./b/}, {source_model: a}, {source_model: link}]\n"
    )
    assert recipe.models == ("b", "a")
