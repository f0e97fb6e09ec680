"""The comparison with mergekit, as far as it goes without mergekit."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import yaml

from mergekit_lite.recipe import parse
from parity.borders import _of_tensor
from parity.fusechat import _sce, _varm
from parity.measures import apart, unit
from parity.recipes import Recipe, placed, recipes


@pytest.mark.parametrize("recipe", list(recipes()), ids=lambda recipe: recipe.name)
def test_recipes_are_ours_too(recipe: Recipe) -> None:
    parse(yaml.safe_dump(placed(recipe.body, Path("models"))))


def test_names_are_unique() -> None:
    names = [recipe.name for recipe in recipes()]
    assert len(names) == len(set(names))


def test_unit_is_the_spacing() -> None:
    x = torch.tensor([1.0, 1.5, 2.0], dtype=torch.bfloat16)
    assert unit(x).tolist() == [2**-7, 2**-7, 2**-6]
    assert unit(torch.tensor([1.0, 0.0]))[1] == 2**-24  # at the rms, 0.7


def test_apart_counts_in_units() -> None:
    ours, theirs = {"x": torch.tensor([1.0, 1.0 + 2**-6])}, {"x": torch.tensor([1.0, 1.0])}
    found = apart(ours, theirs, torch.bfloat16, allowed=1)
    assert (found.equal, found.most, found.beyond, found.unexplained) == (0.5, 2.0, 1, 1)
    assert apart(ours, theirs, torch.bfloat16, 1, {"x": torch.tensor([False, True])}).unexplained == 0
    nothing = {"x": torch.tensor([torch.nan, 1.0])}
    assert apart(nothing, theirs, torch.bfloat16, 1).most == torch.inf


def test_equal_magnitudes_are_at_the_border() -> None:
    delta = torch.tensor([4.0, 2.0, -2.0, 1.0], dtype=torch.float64)
    parameters = {"density": (0.5,), "weight": (1.0,)}
    found = _of_tensor("ties", parameters, torch.zeros(4, dtype=torch.float64), [delta], [delta])
    assert found.tolist() == [False, True, True, False]


def test_level_elections_are_at_the_border() -> None:
    deltas = [torch.tensor([1.0, 1.0], dtype=torch.float64), torch.tensor([-1.0, 1.0], dtype=torch.float64)]
    found = _of_tensor("ties", {"weight": (0.5, 0.5)}, torch.zeros(2, dtype=torch.float64), deltas, deltas)
    assert found.tolist() == [True, False]


def test_fusechats_formulas() -> None:
    """The numbers that the released code gave."""
    first, second, third = [0.4, -0.2, 0, 0.1, 0.3, -0.1], [0.2, 0.2, 0, -0.3, 0.3, -0.1], [-0.1, 0.4, 0, 0.2, 0.3, 0.5]
    deltas = torch.tensor([first, second, third], dtype=torch.float64)
    for topk, expected in (
        (1.0, [0.30689655, 0.33414634, 0, 0.16395349, 0.3, 0.5]),
        (0.5, [0.3, 0.37826087, 0, 0.18913043, 0.3, 0.5]),
        (0.25, [0.3, 0.39230769, 0, 0.19615385, 0.3, 0.5]),
        (0.2, [0.3, 0.3, 0, 0.15, 0.3, 0.5]),
    ):
        torch.testing.assert_close(_sce(deltas, topk), torch.tensor(expected).double(), atol=6e-8, rtol=0)
    q = torch.tensor([[0.1, 0, 0, -0.1], [0.2, 0.2, 0, 0]], dtype=torch.float64)
    torch.testing.assert_close(_varm(q), torch.tensor([0.18, 0.16, 0, -0.02]).double())
