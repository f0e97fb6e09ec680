"""mergekit's own example recipes, by what they exercise."""

from __future__ import annotations

from fractions import Fraction
from textwrap import dedent

from mergekit_lite.recipe import Output, Recipe, Resolved, outputs, parse, resolve
from tests.recipe.test_layers import llama


def planned(text: str, layers: int) -> tuple[Recipe, tuple[Output, ...], Resolved]:
    recipe = parse(dedent(text))
    made = outputs(recipe.slices, {model: llama(layers) for model in recipe.models})
    assert made.problems == ()
    found = resolve(recipe, made.tensors)
    assert found.problems == found.notes == ()
    return recipe, made.tensors, found


def weights(found: Resolved, name: str = "weight") -> set[tuple[object, ...]]:
    return {tuple(values.get(name) for values in n.per_model) for n in found.numbers if n}


def test_linear() -> None:
    """Three models, unequal weights, no base: the first one listed gives the config, always."""
    recipe, _, found = planned("""\
        models:
          - {model: orca, parameters: {weight: 1.0}}
          - {model: wizard, parameters: {weight: 0.3}}
          - {model: platypus, parameters: {weight: 0.5}}
        merge_method: linear
        dtype: float16
    """, 4)  # fmt: skip
    assert (recipe.config_source, recipe.dtype, recipe.out_dtype) == ("orca", "float16", None)
    assert weights(found) == {(1.0, 0.3, 0.5)}
    assert all(n is not None and n.shared == {"normalize": True} for n in found.numbers)


def test_ties() -> None:
    """Gradients of density and weight, a filtered weight with 0 for the rest, the base not among the models."""
    recipe, made, found = planned("""\
        models:
          - model: orca
            parameters:
              density: [1, 0.7, 0.1]   # gradient along the layers
              weight: 1.0
          - model: wizard
            parameters:
              density: 0.5
              weight: [0, 0.3, 0.7, 1]
          - model: platypus
            parameters:
              density: 0.33
              weight:
                - filter: mlp
                  value: 0.5
                - value: 0
        merge_method: ties
        base_model: llama
        parameters:
          normalize: true
          int8_mask: true
        dtype: float16
    """, 4)  # fmt: skip
    assert [source.model for source in recipe.slices[0].sources] == ["orca", "wizard", "platypus", "llama"]
    assert [str(note.text) for note in recipe.notes] == ["int8_mask has no effect and is ignored"]
    numbers = {o.spot.name: n for o, n in zip(made, found.numbers, strict=True) if n}
    mlp = [numbers[f"model.layers.{n}.mlp.up_proj.weight"].per_model for n in range(4)]
    assert [[m.get("weight") for m in layer] for layer in mlp] == [
        [1, 0, 0.5, None], [1, 0.3, 0.5, None], [1, 0.7, 0.5, None], [1, 1, 0.5, None],
    ]  # fmt: skip
    third = float(Fraction(2, 3))
    expected = [1, 1 + (0.7 - 1) * third, 0.7 + (0.1 - 0.7) * float(Fraction(1, 3)), 0.1]
    assert [layer[0]["density"] for layer in mlp] == expected
    assert numbers["lm_head.weight"].per_model[2] == {"weight": 0.0, "density": 0.33}


def test_bio_merge() -> None:
    recipe, _, found = planned("""\
        models:
          - {model: mistral-instruct, parameters: {density: 0.5, weight: 0.5}}
          - {model: biomistral, parameters: {density: 0.5, weight: 0.5}}
        merge_method: ties
        base_model: mistral
        parameters: {normalize: false, int8_mask: true}
        dtype: float16
    """, 3)  # fmt: skip
    assert recipe.config_source == "mistral"
    assert weights(found) == weights(found, "density") == {(0.5, 0.5, None)}
    assert {n.shared["normalize"] for n in found.numbers if n} == {False}


def test_orcamini_platy() -> None:
    """44 layers out of two models with 40."""
    _, made, found = planned("""\
        slices:
          - sources:
            - model: orca
              layer_range: [0, 24]
          - sources:
            - model: platypus
              layer_range: [20, 40]
        merge_method: passthrough
        dtype: float16
    """, 40)  # fmt: skip
    from_layer = {o.spot.layer: (o.part, o.spots[0].layer) for o in made if o.spot.layer is not None}
    assert from_layer == {n: (0, n) if n < 24 else (1, n - 4) for n in range(44)}
    assert {o.spot.name: o.part for o in made if o.spot.layer is None} == {
        "model.embed_tokens.weight": 0, "model.norm.weight": 1, "lm_head.weight": 1,
    }  # fmt: skip
    assert weights(found, "scale") == {(1.0,)}


def test_arcee_fusion() -> None:
    recipe, made, _ = planned("""\
        models:
          - model: a
          - model: b
        merge_method: arcee_fusion
        base_model: a
        dtype: bfloat16
    """, 2)  # fmt: skip
    assert (recipe.config_source, recipe.slices[0].base) == ("a", 0)
    assert {tuple(index for index, _ in output.inputs) for output in made} == {(0, 1)}
