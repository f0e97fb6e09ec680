"""The number of a parameter for one tensor."""

from __future__ import annotations

from textwrap import dedent
from typing import Any

import pytest

from mergekit_lite.recipe import Recipe, Resolved, outputs, parse, resolve
from tests.recipe.test_layers import llama

LAYERS = 5


def resolved(text: str, layers: int = LAYERS) -> tuple[Recipe, Resolved, dict[str, Any]]:
    recipe = parse(dedent(text))
    made = outputs(recipe.slices, {model: llama(layers) for model in recipe.models})
    assert not made.problems
    found = resolve(recipe, made.tensors)
    return recipe, found, {o.spot.name: n for o, n in zip(made.tensors, found.numbers, strict=True)}


def test_gradient_slerp() -> None:
    """The numbers of mergekit's example, worked out by hand for five layers."""
    _, _, numbers = resolved("""\
        slices:
          - sources:
              - {model: a, layer_range: [0, 5]}
              - {model: b, layer_range: [0, 5]}
        merge_method: slerp
        base_model: a
        parameters:
          t:
            - {filter: self_attn, value: [0, 0.5, 0.3, 0.7, 1]}
            - {filter: mlp, value: [1, 0.5, 0.7, 0.3, 0]}
            - value: 0.5
    """)
    attention = [numbers[f"model.layers.{n}.self_attn.q_proj.weight"].shared["t"] for n in range(5)]
    assert attention == [0, 0.5, 0.3, 0.7, 1]
    assert [numbers[f"model.layers.{n}.mlp.up_proj.weight"].shared["t"] for n in range(5)] == [1, 0.5, 0.7, 0.3, 0]
    for name in ("model.embed_tokens.weight", "lm_head.weight", "model.layers.3.input_layernorm.weight"):
        assert numbers[name].shared["t"] == 0.5
    assert numbers["lm_head.weight"].per_model == ({}, {})


def test_precedence() -> None:
    """Override, model, slice, recipe, default."""
    text = """\
        merge_method: ties
        base_model: base
        parameters: {weight: 4, density: 0.4, lambda: 0.4}
        slices:
          - sources:
              - {model: a, layer_range: [0, 5], parameters: {weight: [{filter: q_proj, value: 1}, {filter: mlp, value: 2}]}}
              - {model: b, layer_range: [0, 5]}
            parameters: {weight: [{filter: input_layernorm, value: 3}], lambda: [{filter: mlp, value: 0.3}]}
        overrides:
          - {layers: [1, 2], parameters: {weight: [{filter: q_proj, value: 0}], normalize: false}}
    """  # noqa: E501
    _, found, numbers = resolved(text)
    assert found.problems == found.notes == ()
    zero, one = (
        {
            rest: numbers[f"model.layers.{layer}.{rest}.weight"]
            for rest in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
        }
        for layer in (0, 1)
    )
    assert [[m.get("weight") for m in zero[rest].per_model] for rest in zero] == [
        [1, 4, None],
        [2, 4, None],
        [3, 3, None],
    ]
    assert [[m.get("weight") for m in one[rest].per_model] for rest in one] == [
        [0, 0, None],
        [2, 4, None],
        [3, 3, None],
    ]
    assert [zero[rest].shared["lambda"] for rest in zero] == [0.4, 0.3, 0.4]
    assert [rests["mlp.up_proj"].shared["normalize"] for rests in (zero, one)] == [True, False]
    assert zero["mlp.up_proj"].shared["rescale"] is False
    assert zero["mlp.up_proj"].per_model == ({"weight": 2, "density": 0.4}, {"weight": 4, "density": 0.4}, {})


def test_filters_of_a_model_match_its_own_names() -> None:
    """In a frankenmerge what models have each is looked up by the source's name and layer, all else by the output's."""
    text = """\
        merge_method: ties
        base_model: base
        slices:
          - sources: &first
              - {model: a, layer_range: [0, 2], parameters: {weight: 1}}
              - {model: base, layer_range: [0, 2]}
          - sources:
              - model: a
                layer_range: [3, 5]
                parameters:
                  weight:
                    - {filter: layers.3, value: 30}
                    - {layers: [4, 5], value: 40}
              - {model: base, layer_range: [3, 5]}
        parameters:
          lambda: [{filter: layers.3, value: 3}, {layers: [2, 3], value: 2}]
    """
    _, found, numbers = resolved(text)
    assert [numbers[f"model.layers.{n}.mlp.up_proj.weight"].per_model[0]["weight"] for n in range(4)] == [1, 1, 30, 40]
    assert [numbers[f"model.layers.{n}.mlp.up_proj.weight"].shared["lambda"] for n in range(4)] == [1, 1, 2, 3]
    assert found.problems == (
        "no filter gives ties the parameter 'weight' of a for lm_head.weight and model.norm.weight",
    )


def test_one_layer_takes_the_last_value_and_the_ends_the_first() -> None:
    _, _, numbers = resolved("""\
        merge_method: linear
        models: [{model: a, parameters: {weight: [1, 2]}}]
        """, layers=1)  # fmt: skip
    assert numbers["model.layers.0.mlp.up_proj.weight"].per_model[0]["weight"] == 2
    assert numbers["model.norm.weight"].per_model[0]["weight"] == 1
    assert numbers["lm_head.weight"].per_model[0]["weight"] == 1
    assert numbers["model.embed_tokens.weight"].per_model[0]["weight"] == 1


def test_truth_values_step() -> None:
    _, _, numbers = resolved("""\
        merge_method: linear
        parameters: {weight: 1, normalize: [true, false, true]}
        models: [{model: a}]
    """)
    found = [numbers[f"model.layers.{n}.mlp.up_proj.weight"].shared["normalize"] for n in range(5)]
    assert found == [True, True, False, False, True]


def test_whole_numbers() -> None:
    text = "merge_method: karcher\nmodels: [{model: a}, {model: b}]\nparameters: {max_iter: [10, 20]}\n"
    _, found, numbers = resolved(text, layers=3)
    assert [numbers[f"model.layers.{n}.mlp.up_proj.weight"].shared["max_iter"] for n in range(3)] == [10, 15, 20]
    assert found.problems == ()
    _, found, _ = resolved(text, layers=5)
    assert found.problems == tuple(
        f"3:24: 'max_iter' is a whole number, and its gradient gives {value} for "
        f"model.layers.{layer}.self_attn.q_proj.weight and 2 more tensors"
        for layer, value in ((1, 12.5), (3, 17.5))
    )


def test_overrides_and_exclusions() -> None:
    recipe, found, numbers = resolved("""\
        merge_method: sce
        base_model: base
        models:
          - {model: a, parameters: {weight: 0.25}}   # for the override
          - {model: b, parameters: {weight: 0.75}}
        parameters: {select_topk: 0.1}
        exclude: [embed, "regex:^lm_head"]
        overrides:
          - {filter: norm, merge_method: task_arithmetic, parameters: {lambda: 0.5}}
          - {filter: "*", layers: [0, 2], parameters: {select_topk: 1.0}}
    """)
    assert recipe.models == ("a", "b", "base")
    assert numbers["lm_head.weight"] is None
    assert numbers["model.embed_tokens.weight"] is None
    norm = numbers["model.layers.0.input_layernorm.weight"]
    assert (norm.merge_method, norm.shared["lambda"]) == ("task_arithmetic", 0.5)
    assert [values.get("weight") for values in norm.per_model] == [0.25, 0.75, None]
    mlp = [numbers[f"model.layers.{n}.mlp.up_proj.weight"] for n in range(3)]
    assert [(n.merge_method, n.shared["select_topk"]) for n in mlp] == [("sce", 1.0), ("sce", 1.0), ("sce", 0.1)]
    assert mlp[0].per_model == ({}, {}, {})
    assert found.problems == found.notes == ()


def test_idle_filters_are_noted() -> None:
    _, found, _ = resolved("""\
        merge_method: linear
        models:
          - model: a
            parameters:
              weight:
                - {filter: mpl, value: 1}
                - {layers: [7, 9], value: 1}
                - {value: 2}
        exclude: lmhead
        overrides: [{filter: nrom, parameters: {weight: 1}}]
    """)
    assert [str(note) for note in found.notes] == [
        "6:20: the filter 'mpl' of 'weight' decides for no tensor",
        "7:20: the filter layers [7, 9) of 'weight' decides for no tensor",
        "9:10: the filter 'lmhead' of exclude matches no tensor",
        "10:22: the filter 'nrom' of an override matches no tensor",
    ]


@pytest.mark.parametrize("default", ["mergekit", "fusechat"])
def test_default_and_choice(default: str) -> None:
    line = "" if default == "mergekit" else f"parameters: {{variant: {default}}}\n"
    _, _, numbers = resolved(f"merge_method: sce\nbase_model: base\nmodels: [{{model: a}}]\n{line}")
    assert numbers["lm_head.weight"].shared == {"select_topk": 1.0, "variant": default}


def test_numbers_that_are_shared_are_those_of_each_tensor_alone() -> None:
    """Tensors alike in all filters are looked up once; one at a time, where nothing is shared, it is the same."""
    recipe = parse(
        dedent("""\
        merge_method: ties
        base_model: base
        slices:
          - sources:
              - model: a
                layer_range: [0, 5]
                parameters: {weight: [{filter: "layers.3.", value: 7}, {value: [0, 1]}]}
              - {model: b, layer_range: [0, 5], parameters: {weight: {value: 1, layers: [2, 4]}}}
          - sources: [{model: b, layer_range: [2, 5], parameters: {density: [0.5, 1]}}]
        parameters: {weight: 3, normalize: [true, false], lambda: [{filter: norm, value: [1, 2]}, {value: 4}]}
        overrides: [{filter: up_proj, layers: [6, 8], merge_method: sce}]
        exclude: ["regex:^lm"]
        """),
    )
    made = outputs(recipe.slices, {model: llama(LAYERS) for model in recipe.models}).tensors
    alone = [resolve(recipe, [output]).numbers[0] for output in made]
    assert list(resolve(recipe, made).numbers) == alone
    assert len({str(numbers) for numbers in alone}) > 10
