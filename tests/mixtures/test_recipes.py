"""Recipes of mixtures: every shipped one builds, and wrong ones tell everything that is wrong."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch

import mergekit_lite
from mergekit_lite import build_moe
from mergekit_lite.mixtures.building.recipe import GATE_MODES, KEYS, parse
from mergekit_lite.yaml_document import RecipeError, text_of
from tests.mixtures.models import dense_model, loaded, logits, write

FILES = sorted((Path(__file__).parents[2] / "recipes/moe").glob("*.yml"))
KINDS = {"mixtral": "mistral", "qwen2-shared": "qwen2", "qwen3": "qwen3", "deepseek": "llama", "flexolmo": "olmo2"}
BASE = "base_model: b\n"
PROMPT = "positive_prompts: [x]"
EXPERTS = "experts:\n- {source_model: a, positive_prompts: [x]}\n- {source_model: c, positive_prompts: [y]}\n"
WRONG = [
    ("empty", "", ["1:1: the recipe is empty: it needs base_model and experts"]),
    ("nothing", "dtype: bfloat16", ["1:1: the recipe has no 'base_model'", "1:1: the recipe has no 'experts'"]),
    ("of a merge", BASE + EXPERTS + "merge_method: ties", [
        "5:1: 'merge_method' is a key of merges: this recipe builds a mixture of experts; merge it with mergekit-lite "
        "merge"]),
    ("misspelt mode", BASE + EXPERTS + "gate_mode: hiden", [
        f"5:12: 'gate_mode' expects one of {', '.join(GATE_MODES)}, got the text 'hiden'. Did you mean 'hidden'?"]),
    ("misspelt architecture", "architecture: mixtrl\n" + BASE + EXPERTS, [
        "1:15: 'architecture' expects one of Mixtral, DeepSeek MoE, Qwen MoE, Qwen3 MoE, FlexOlmo, got the text "
        "'mixtrl'. Did you mean 'Mixtral'?"]),
    ("an architecture that nothing becomes", "architecture: OLMoE\n" + BASE + EXPERTS, [
        "1:15: 'architecture' expects one of Mixtral, DeepSeek MoE, Qwen MoE, Qwen3 MoE, FlexOlmo, got the text "
        "'OLMoE'. OLMoE's attention is that of no dense model: the mixture of OLMo 2 is FlexOlmo"]),
    ("misspelt keys", BASE + "expert: []\n" + EXPERTS.replace("source_model: a", "source_modle: a"), [
        "2:1: unknown key 'expert' in the recipe of a mixture. Did you mean 'experts'?",
        "4:3: the expert has no 'source_model'",
        "4:4: unknown key 'source_modle' in an expert. Did you mean 'source_model'?"]),
    ("no prompts", BASE + EXPERTS.replace("positive_prompts: [y]", "positive_prompts: []"), [
        "4:3: the expert has no 'positive_prompts', which gate_mode hidden makes its router of"]),
    ("the same prompts", BASE + EXPERTS.replace("[y]", "[x]"), [
        "3:1: the prompts of all experts are the same, so the router can't tell them apart: give each expert texts "
        "that are to go to it, or take gate_mode: random"]),
    ("the same models", BASE + EXPERTS.replace("source_model: c", "source_model: a"), [
        "3:1: all experts are the same model: the mixture answers as that model, and takes more room. To train it "
        "further, mergekit-lite upcycle makes one with noise; or give --i-understand-this-is-not-useful-without-"
        "training"]),
    ("too many per token", BASE + EXPERTS + "experts_per_token: 3", [
        "5:20: more experts per token than experts: each token goes through 3, there are 2"]),
    ("none per token", BASE + EXPERTS + "experts_per_token: 0", [
        "5:20: 'experts_per_token' expects a whole number from 1 on, got the number 0"]),
    ("noise", BASE + EXPERTS.replace("[y]", "[y], noise_scale: -1, residual_scale: x"), [
        "4:57: 'noise_scale' expects a number from 0 on, got the number -1",
        "4:77: 'residual_scale' expects a number, got the text 'x'"]),
    ("a prompt that is a number", BASE + EXPERTS.replace("[y]", "[7]"), [
        "4:40: 'positive_prompts' expects text, got the number 7: put it in quotes, '7', if it is one"]),
]  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_shipped_recipe_builds(file: Path) -> None:
    kind, recipe = KINDS[file.stem], parse(text_of(file))
    for seed, model in enumerate(recipe.models):
        write(dense_model(kind, seed), Path(model), "llama-3")
    build_moe(file, "out")
    assert mergekit_lite.verify("out", samples=2, seed=0).findings == ()
    config = json.loads(Path("out/config.json").read_text())
    if "auto_map" not in config:
        made = loaded(Path("out"))
        assert logits(made).isfinite().all()
        assert made.generate(torch.tensor([[5, 6]]), max_new_tokens=2, do_sample=False).shape == (1, 4)
    said = file.read_text()
    assert f"mergekit-lite moe recipes/moe/{file.name}" in said
    assert set(re.findall(r"^(\w+):", said, re.MULTILINE)) <= {*KEYS}


@pytest.mark.parametrize(("text", "told"), [row[1:] for row in WRONG], ids=[row[0] for row in WRONG])
def test_wrong_recipes_tell_everything(text: str, told: list[str]) -> None:
    with pytest.raises(RecipeError) as refused:
        parse(text)
    assert [f"{remark.at}: {remark.text}" for remark in refused.value.problems] == told


def test_equal_experts_are_accepted_where_they_differ_or_are_wanted() -> None:
    same = BASE + EXPERTS.replace("source_model: c", "source_model: a")
    assert parse(same, equal_experts=True).are_equal
    assert not parse(same.replace("[y]", "[y], noise_scale: 0.1")).are_equal
    assert not parse(same.replace("[y]", "[y], residual_scale: 0.1")).are_equal
    (note,) = parse(same + "gate_mode: random\nshared_experts: []").notes[1:]
    assert "useful only where it is trained further" in note.text


def test_what_no_recipe_holds_is_told() -> None:
    with pytest.raises(
        mergekit_lite.UsageError, match=r"holds texts, numbers, lists and mappings, got PosixPath\('m'\)"
    ):
        build_moe({"base_model": Path("m"), "experts": []}, "out")


def test_references_are_those_of_merges() -> None:
    text = BASE + EXPERTS.replace("source_model: a", "source_model: {model: {path: org/a, revision: 1234567}, lora: l}")
    assert parse(text).experts[0].model == "org/a@1234567+l"
