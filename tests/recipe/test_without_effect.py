"""Keys that mergekit ignores: the recipe runs as if they weren't there, and says so at their place."""

from __future__ import annotations

import pytest

from mergekit_lite.recipe import parse
from mergekit_lite.yaml_document import RecipeError

TIES = "merge_method: ties\nbase_model: base\n"
MODELS = "models:\n- {model: a, parameters: {weight: 1}}\n- {model: b, parameters: {weight: 1}}\n"
SLICE = "merge_method: linear\nslices:\n- sources:\n  - {model: a, layer_range: [0, 8], parameters: {weight: 1}}\n"
BESIDE = "has no effect beside 'parameters', nor in mergekit: put it under 'parameters'"
SHARED = "is one value for all models and has no effect under a model, nor in mergekit: put it under the recipe's"

# (the recipe with the key, the one that it equals, the note)
IGNORED = {
    "a label": (
        TIES + MODELS + "name: mine\n",
        TIES + MODELS,
        "6:1: 'name' has no effect: it is for recipes of several",
    ),
    "architecture": (TIES + MODELS + "architecture: x\n", TIES + MODELS, "6:1: 'architecture' has no effect"),
    "a parameter at the root": (TIES + MODELS + "normalize: false\n", TIES + MODELS, f"6:1: 'normalize' {BESIDE}"),
    "int8_mask at the root": (TIES + MODELS + "int8_mask: true\n", TIES + MODELS, f"6:1: 'int8_mask' {BESIDE}"),
    "a parameter in a model": (
        TIES + MODELS.replace("model: a,", "model: a, density: 0.5,"),
        TIES + MODELS,
        f"4:14: 'density' {BESIDE}",
    ),
    "one value for all under a model": (
        TIES + MODELS.replace("weight: 1}", "weight: 1, lambda: 2}", 1),
        TIES + MODELS,
        f"4:38: 'lambda' {SHARED}",
    ),
    "of the base": (
        TIES + MODELS + "- {model: base, parameters: {weight: 0.5}}\n",
        TIES + MODELS + "- {model: base}\n",
        "6:30: ties takes no 'weight' of the base model 'base': no effect",
    ),
    "of another method": (
        "merge_method: arcee_fusion\nbase_model: base\nmodels: [{model: a}]\nparameters: {rescale: true}\n",
        "merge_method: arcee_fusion\nbase_model: base\nmodels: [{model: a}]\n",
        "4:14: arcee_fusion takes no 'rescale': no effect",
    ),
    "of no method of the recipe": (
        TIES + MODELS + "overrides: [{filter: norm, merge_method: sce}]\nparameters: {t: 1}\n",
        TIES + MODELS + "overrides: [{filter: norm, merge_method: sce}]\n",
        "7:14: ties and sce take no 't': no effect",
    ),
    "override_architecture": (
        TIES + MODELS.replace("model: a,", "model: {model: a, override_architecture: X},"),
        TIES + MODELS,
        "4:45: 'override_architecture' has no effect",
    ),
    "residual_weight": (
        SLICE.replace("- sources", "- residual_weight: 1\n  sources"),
        SLICE,
        "3:3: 'residual_weight' has no effect",
    ),
    "residual_weight among parameters": (
        SLICE + "parameters: {residual_weight: 0}\n",
        SLICE,
        "5:14: residual_weight has no effect, as in mergekit",
    ),
    "embed_slerp": (
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5, embed_slerp: true}\n",
        "merge_method: slerp\nbase_model: a\nmodels: [{model: b}]\nparameters: {t: 0.5}\n",
        "4:22: embed_slerp has no effect",
    ),
    "what aliases stand for": (
        "half: &half {weight: 0.5}\n" + TIES + MODELS.replace("{weight: 1}", "*half"),
        TIES + MODELS.replace("weight: 1", "weight: 0.5"),
        "1:1: 'half' has no effect but through its aliases",
    ),
    "what is merged into parameters": (
        "half: &half {weight: 0.5}\n" + TIES + MODELS.replace("{weight: 1}", "{<<: *half, density: 0.3}"),
        TIES + MODELS.replace("weight: 1", "weight: 0.5, density: 0.3"),
        "1:1: 'half' has no effect but through its aliases",
    ),
}


@pytest.mark.parametrize(("text", "without", "note"), IGNORED.values(), ids=IGNORED)
def test_what_mergekit_ignores_is_a_note(text: str, without: str, note: str) -> None:
    recipe = parse(text)
    assert recipe == parse(without)
    [remark] = recipe.notes
    assert str(remark).startswith(note)


@pytest.mark.parametrize("key", ["half: {weight: 0.5}", "parameter: &half {weight: 0.5}"])
def test_a_key_that_nothing_refers_to_or_that_is_misspelt_is_an_error(key: str) -> None:
    models = MODELS.replace("{weight: 1}", "*half") if "&" in key else MODELS
    with pytest.raises(RecipeError, match=f"1:1: unknown key {key.partition(':')[0]!r}"):
        parse(f"{key}\n{TIES}{models}")


def test_the_default_module_is_the_whole_model() -> None:
    models = "".join(f"    {line}\n" for line in MODELS.splitlines())
    assert parse(TIES + "modules:\n  default:\n" + models) == parse(TIES + MODELS)
    inner = "    parameters: {density: 0.5}\n"
    assert parse(TIES + "modules:\n  default:\n" + models + inner) == parse(TIES + MODELS + inner.strip())


@pytest.mark.parametrize("written", ["tokenizer_source: union", "tokenizer: {source: union}", "tokenizer: {}"])
def test_union(written: str) -> None:
    assert parse(TIES + MODELS + written).tokenizer == "union"
