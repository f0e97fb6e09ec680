"""Gradients and filters against closed forms."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.recipe.layers import depth
from mergekit_lite.recipe.rules import Filter, Rule, Spot, along, first, rule_for

FLOATS = st.floats(-1e6, 1e6)


@pytest.mark.parametrize(
    ("values", "t", "expected"),
    [
        ([0.5], 0, 0.5),
        ([0.5], 1, 0.5),
        ([0, 1], Fraction(1, 4), 0.25),
        ([0, 10, 30], Fraction(1, 4), 5),
        ([0, 10, 30], Fraction(1, 2), 10),
        ([0, 10, 30], Fraction(3, 4), 20),
        ([0, 10, 30], 1, 30),
        ([1, 0.5, 0.7, 0.3, 0], Fraction(1, 8), 0.75),
        ([True, False], Fraction(999, 1000), True),
        ([True, False], 1, False),
        (["a", "b", "c"], Fraction(1, 2), "b"),
    ],
)
def test_along(values: list, t: Fraction, expected: object) -> None:
    assert along(values, Fraction(t)) == expected


@given(st.lists(FLOATS, min_size=1, max_size=9), st.fractions(0, 1))
def test_gradient_stays_between_its_neighbours(values: list[float], t: Fraction) -> None:
    index = int(t * (len(values) - 1))
    around = values[index : index + 2]
    assert min(around) - 1e-9 <= along(values, t) <= max(around) + 1e-9


@given(FLOATS, st.integers(1, 9), st.fractions(0, 1))
def test_equal_values_give_themselves(value: float, count: int, t: Fraction) -> None:
    assert along([value] * count, t) == value


@given(st.lists(FLOATS, min_size=2, max_size=60))
def test_as_many_values_as_layers(values: list[float]) -> None:
    """Each layer takes its own, also where j/(n − 1)·(n − 1) is not j in floating point."""
    assert [along(values, depth(layer, len(values))) for layer in range(len(values))] == values
    texts = list(map(str, values))
    assert [along(texts, depth(layer, len(values))) for layer in range(len(values))] == texts


def test_depth() -> None:
    assert [depth(layer, 5) for layer in range(5)] == [0, Fraction(1, 4), Fraction(1, 2), Fraction(3, 4), 1]
    assert depth(0, 1) == 1


@pytest.mark.parametrize(
    ("pattern", "spot", "expected"),
    [
        (Filter(), Spot("lm_head.weight"), True),
        (Filter("self_attn"), Spot("model.layers.0.self_attn.q_proj.weight", 0), True),
        (Filter("Self_attn"), Spot("model.layers.0.self_attn.q_proj.weight", 0), False),
        (Filter("layers.1"), Spot("model.layers.12.mlp.weight", 12), True),  # a part of the name, as in mergekit
        (Filter("q.proj"), Spot("q_proj"), False),
        (Filter("regex:q.proj"), Spot("q_proj"), True),
        (Filter("regex:^lm_head"), Spot("model.lm_head"), False),
        (Filter(layers=(2, 4)), Spot("model.layers.2.w", 2), True),
        (Filter(layers=(2, 4)), Spot("model.layers.4.w", 4), False),
        (Filter(layers=(0, 4)), Spot("model.norm.weight"), False),
        (Filter("mlp", (0, 4)), Spot("model.layers.1.mlp.w", 1), True),
        (Filter("mlp", (0, 4)), Spot("model.layers.5.mlp.w", 5), False),
        (Filter("mlp", (0, 4)), Spot("model.layers.1.attn.w", 1), False),
    ],
)
def test_filter(pattern: Filter, spot: Spot, expected: bool) -> None:
    assert pattern.matches(spot) is expected


def test_first_rule_wins() -> None:
    rules = (Rule((1,), Filter("a")), Rule((2,), Filter("b")), Rule((3,)))
    assert [first(rules, Spot(name)).values for name in ("ab", "b", "c")] == [(1,), (2,), (3,)]
    assert first(rules[:2], Spot("c")) is None


def test_nothing_matched_falls_through() -> None:
    model = {"weight": (Rule((1,), Filter("mlp")),)}
    slices: dict = {}
    recipe = {"weight": (Rule((2,), Filter("attn")), Rule((3,)))}
    levels = [model, slices, recipe]
    assert [rule_for("weight", levels, Spot(name)).values for name in ("mlp", "attn", "norm")] == [(1,), (2,), (3,)]
    assert rule_for("density", levels, Spot("mlp")) is None


@pytest.mark.parametrize(
    ("pattern", "text"),
    [
        (Filter("mlp"), "'mlp'"),
        (Filter("mlp", (0, 2)), "'mlp' in layers [0, 2)"),
        (Filter(layers=(0, 2)), "layers [0, 2)"),
    ],
)
def test_filter_in_words(pattern: Filter, text: str) -> None:
    assert str(pattern) == text
