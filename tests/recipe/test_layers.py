"""Layers found from names, and what the layers of the output are made of."""

# ruff: noqa: E501  (a complaint is one line)

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.recipe import Slice, Source, outputs
from mergekit_lite.recipe.layers import Place, is_behind, place, stacks

RESTS = ("self_attn.q_proj.weight", "mlp.up_proj.weight", "input_layernorm.weight")


def llama(layers: int, *more: str) -> list[str]:
    inside = [f"model.layers.{layer}.{rest}" for layer in range(layers) for rest in RESTS]
    return ["lm_head.weight", "model.embed_tokens.weight", *inside, "model.norm.weight", *more]


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("model.layers.12.mlp.up_proj.weight", Place("model.layers", 12, "mlp.up_proj.weight")),
        ("transformer.h.0.ln_1.bias", Place("transformer.h", 0, "ln_1.bias")),
        ("model.layers.3.mlp.experts.7.w1.weight", Place("model.layers", 3, "mlp.experts.7.w1.weight")),
        ("encoder.block.1.layer.0.SelfAttention.q.weight", Place("encoder.block", 1, "layer.0.SelfAttention.q.weight")),
        ("0.weight", Place("", 0, "weight")),
        ("model.norm.weight", None),
        ("model.layers.007.weight", None),
        ("model.layers.²", None),
        ("conv1", None),
        ("blocks.3", None),
    ],
)
def test_place(name: str, expected: Place | None) -> None:
    assert place(name) == expected


@pytest.mark.parametrize(
    ("names", "expected"),
    [
        (llama(3), {"model.layers": 3}),
        (["wte.weight", "h.0.ln_1.weight", "h.1.ln_1.weight", "ln_f.weight"], {"h": 2}),
        (["blocks.0.ln0.weight", "blocks.0.att.key.weight", "blocks.1.att.key.weight"], {"blocks": 2}),
        (["model.layers.0.mlp.experts.0.w1.weight", "model.layers.0.mlp.experts.1.w1.weight"], {"model.layers": 1}),
        (["encoder.block.0.layer.0.q.weight", "decoder.block.0.layer.0.q.weight"], {"encoder.block": 1, "decoder.block": 1}),
        (["vision.layers.0.mlp.weight", "model.layers.0.mlp.weight"], {"vision.layers": 1, "model.layers": 1}),
        (["classifier.0.weight", "classifier.1.weight"], {}),  # a sequence of modules
        (["mlp1.0.weight", "mlp1.1.weight", "mlp1.3.weight"], {}),
        (["layers.1.mlp.weight", "layers.2.mlp.weight"], {}),  # not from 0
        (["layers.0.mlp.weight", "layers.2.mlp.weight"], {}),  # with a gap
        (["layers.999999999999.mlp.weight"], {}),
        ([], {}),
    ],
)  # fmt: skip
def test_stacks(names: list[str], expected: dict[str, int]) -> None:
    assert stacks(names) == expected


@given(st.integers(1, 40), st.integers(0, 3))
def test_stacks_of_any_length(layers: int, experts: int) -> None:
    names = [f"m.layers.{n}.experts.{e}.w.weight" for n in range(layers) for e in range(experts)]
    assert stacks(names + [f"m.layers.{n}.attn.q.weight" for n in range(layers)]) == {"m.layers": layers}


@pytest.mark.parametrize(
    ("name", "behind"),
    [
        ("model.embed_tokens.weight", False),
        ("transformer.wpe.weight", False),
        ("embeddings.LayerNorm.weight", False),
        ("transformer.word_embeddings_layernorm.weight", False),
        ("model.norm.weight", True),
        ("transformer.ln_f.bias", True),
        ("backbone.norm_f.weight", True),
        ("gpt_neox.final_layer_norm.weight", True),
        ("lm_head.weight", True),
        ("embed_out.weight", True),
        ("output.weight", True),
        ("transformer.output_layer.weight", True),
        ("score.weight", True),
        ("visual.patch_proj.weight", False),
    ],
)
def test_before_or_behind_the_layers(name: str, behind: bool) -> None:
    assert is_behind(name) is behind


def test_models_keep_their_names() -> None:
    made = outputs(
        [Slice((Source("a"), Source("b"), Source("base")), 2)],
        {"a": llama(5), "b": llama(5, "b.extra"), "base": llama(5)},
    )
    assert (made.layers, made.problems) == (None, ())
    assert [output.spot.name for output in made.tensors] == [*llama(5), "b.extra"]
    by_name = {output.spot.name: output for output in made.tensors}
    third = by_name["model.layers.3.mlp.up_proj.weight"]
    assert (third.spot.layer, third.t, third.part) == (3, Fraction(3, 4), 0)
    assert [(index, spot.name) for index, spot in third.inputs] == [(n, third.spot.name) for n in range(3)]
    assert by_name["lm_head.weight"].t == by_name["model.norm.weight"].t == 0
    assert [index for index, _ in by_name["b.extra"].inputs] == [1]


def test_names_of_the_base_come_first() -> None:
    made = outputs([Slice((Source("a"), Source("base")), 1)], {"a": ["y", "x"], "base": ["x", "z"]})
    assert [output.spot.name for output in made.tensors] == ["x", "z", "y"]
    assert [[index for index, _ in output.inputs] for output in made.tensors] == [[0, 1], [1], [0]]


def test_each_stack_has_its_own_gradient() -> None:
    names = [f"vision.layers.{n}.mlp.weight" for n in range(2)] + [f"model.layers.{n}.mlp.weight" for n in range(3)]
    made = outputs([Slice((Source("a"),))], {"a": names})
    assert [output.t for output in made.tensors] == [0, 1, 0, Fraction(1, 2), 1]


def test_models_of_different_depth() -> None:
    made = outputs([Slice((Source("a"), Source("b")))], {"a": llama(2), "b": llama(3)})
    assert made.problems == (
        "model.layers has 2 layers in a and 3 layers in b: models with different numbers of layers are merged by "
        "'slices', each with its layer_range",
    )


def test_frankenmerge() -> None:
    slices = [Slice((Source("a", (0, 3)),)), Slice((Source("b", (1, 4)), Source("c", (0, 3))))]
    made = outputs(slices, {"a": llama(4), "b": llama(4), "c": llama(3)})
    assert (made.layers, made.problems) == (6, ())
    names = [output.spot.name for output in made.tensors]
    assert sorted(names) == sorted(llama(6))
    assert names == ["model.embed_tokens.weight", *llama(6)[2:-1], "lm_head.weight", "model.norm.weight"]
    by_name = {output.spot.name: output for output in made.tensors}
    fourth = by_name["model.layers.4.mlp.up_proj.weight"]
    assert (fourth.spot.layer, fourth.part, fourth.t) == (4, 1, Fraction(1, 2))
    assert [(index, *spot) for index, spot in fourth.inputs] == [
        (0, "model.layers.2.mlp.up_proj.weight", 2),
        (1, "model.layers.1.mlp.up_proj.weight", 1),
    ]
    before, behind = by_name["model.embed_tokens.weight"], by_name["lm_head.weight"]
    assert (before.part, before.t, len(before.sources)) == (0, 0, 1)
    assert (behind.part, behind.t, len(behind.sources)) == (
        1,
        0,
        2,
    )  # all sources of the last slice, not as many as the first has


def test_a_layer_may_come_twice() -> None:
    made = outputs([Slice((Source("a", (0, 2)),)), Slice((Source("a", (1, 2)),))], {"a": llama(2)})
    assert made.layers == 3
    assert [o.spots[0].layer for o in made.tensors if o.spot.name.endswith("q_proj.weight")] == [0, 1, 1]
    assert [o.t for o in made.tensors if o.spot.name.endswith("q_proj.weight")] == [0, 1, 1]


def test_tensors_that_not_every_layer_has() -> None:
    names = [*llama(2), "model.layers.0.self_attn.q_proj.bias", "model.layers.1.mlp.experts.3.w1.weight"]
    made = outputs([Slice((Source("a", (1, 2)), Source("b", (0, 1))))], {"a": names, "b": names})
    inputs = {output.spot.name: [index for index, _ in output.inputs] for output in made.tensors}
    assert inputs["model.layers.0.self_attn.q_proj.bias"] == [1]
    assert inputs["model.layers.0.mlp.experts.3.w1.weight"] == [0]


def test_all_problems_at_once() -> None:
    slices = [
        Slice((Source("a", (0, 9)),)),
        Slice((Source("a", (0, 2)), Source("b", (0, 1)))),
        Slice((Source("b", (2, 2)),)),
        Slice((Source("vision", (0, 1)),)),
        Slice((Source("none", (0, 1)),)),
        Slice((Source("gpt", (0, 1)),)),
    ]
    names = {
        "a": llama(4),
        "b": llama(2),
        "vision": llama(2, "visual.blocks.0.mlp.weight"),
        "none": ["model.layers.1.mlp.weight"],
        "gpt": ["h.0.mlp.weight"],
    }
    assert outputs(slices, names).problems == (
        "slices need a model with one stack of layers, and vision has several: model.layers (2 layers), visual.blocks (1 layer); to merge all its layers "
        "list it under 'models', without a layer_range",
        "slices need a model with one stack of layers, and none has none whose numbers run from 0 to n − 1",
        "line 1: layer_range [0, 9] goes too far, a has 4 layers",
        "all sources of a slice have the same number of layers, got a [0, 2], b [0, 1]",
        "line 1: layer_range [2, 2] of b is empty",
        "the layers have different names, so they can't stand behind each other: model.layers in a, model.layers in b, h in gpt",
    )


@given(st.data())
def test_every_tensor_is_accounted_for(data: st.DataObject) -> None:
    """Each output layer holds what its source layer holds, under its new number."""
    layers = data.draw(st.integers(1, 6))
    starts = data.draw(st.lists(st.tuples(st.integers(0, layers - 1), st.integers(1, layers)), min_size=1, max_size=4))
    ranges = [(start, min(start + length, layers)) for start, length in starts]
    made = outputs([Slice((Source("a", span),)) for span in ranges], {"a": llama(layers)})
    wanted = [layer for start, end in ranges for layer in range(start, end)]
    assert made.layers == len(wanted)
    inside = [output for output in made.tensors if output.spot.layer is not None]
    assert [(o.spot.layer, o.spots[0].layer) for o in inside] == [
        (new, old) for new, old in enumerate(wanted) for _ in RESTS
    ]
    assert sorted(o.spot.name for o in made.tensors) == sorted(llama(len(wanted)))
