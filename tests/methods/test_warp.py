"""WARP's merges: spherical interpolation of several policies one after the other, and some way back to their start."""

from __future__ import annotations

from math import cos, pi, sin, sqrt
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml

import mergekit_lite
from mergekit_lite import merge_tensors
from tests.models import read_folder, write_folder

RECIPE = Path(__file__).parents[2] / "recipes" / "documents" / "warp.yml"
BASE = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=torch.float64)
# Task vectors of length 2 at right angles, of equal weights: the m-th is met at 1/m of a quarter turn.
EQUAL = {
    2: [sqrt(2), sqrt(2), 0, 0],
    3: [2 * sqrt(3 / 8), 2 * sqrt(3 / 8), 1, 0],  # cos 30° / √2 = √(3/8), sin 30° = 1/2
    4: [*[2 * cos(pi / 8) * part for part in (sqrt(3 / 8), sqrt(3 / 8), 1 / 2)], 2 * sin(pi / 8)],
}


def policies(count: int) -> list[torch.Tensor]:
    return [BASE + 2 * row for row in torch.eye(4, dtype=torch.float64)[:count]]


@pytest.mark.parametrize("count", EQUAL)
def test_policies_at_right_angles_by_hand(count: int) -> None:
    merged = merge_tensors("nuslerp", BASE, policies(count), weight=1)
    np.testing.assert_allclose(merged - BASE, EQUAL[count], atol=1e-12)
    assert float((merged - BASE).norm()) == pytest.approx(2)  # the paper's lemma 1: their length stays


def test_two_have_no_order() -> None:
    a, b, _ = policies(3)
    for rows in (True, False):
        shaped = [BASE.view(2, 2), *(each.view(2, 2) for each in (a, b))]
        once = merge_tensors("nuslerp", shaped[0], shaped[1:], weight=[1, 3], nuslerp_flatten=not rows)
        again = merge_tensors("nuslerp", shaped[0], shaped[:0:-1], weight=[3, 1], nuslerp_flatten=not rows)
        np.testing.assert_allclose(once, again, atol=1e-12)


def test_three_is_two_met_with_the_third() -> None:
    a, b, c = policies(3)
    first = merge_tensors("nuslerp", BASE, [a, b], weight=1)
    second = merge_tensors("nuslerp", BASE, [first, c], weight=[2, 1])
    np.testing.assert_allclose(merge_tensors("nuslerp", BASE, [a, b, c], weight=1), second, atol=1e-12)


def test_unequal_weights_are_shares_of_the_weights_so_far() -> None:
    """The second at 3/4 of a quarter turn, the third at 4/8 of one: 67.5° and 45°."""
    merged = merge_tensors("nuslerp", BASE, policies(3), weight=[1, 3, 4])
    half = sqrt(1 / 2)
    expected = [2 * half * cos(3 * pi / 8), 2 * half * sin(3 * pi / 8), 2 * half, 0]
    np.testing.assert_allclose(merged - BASE, expected, atol=1e-12)


@pytest.mark.parametrize("how", [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}])
def test_weights_that_cancel_but_for_rounding_mean_equal_ones(how: dict[str, Any]) -> None:
    base, *tuned = (each.view(2, 2) for each in (BASE, *policies(3)))
    equal = merge_tensors("nuslerp", base, tuned[:2], weight=1, **how)
    cancelled = merge_tensors("nuslerp", base, tuned[:2], weight=[0.1 + 0.2, -0.3], **how)
    np.testing.assert_allclose(cancelled, equal, atol=1e-12)
    met = merge_tensors("nuslerp", base, [equal, tuned[2]], weight=[2, 1], **how)
    third = merge_tensors("nuslerp", base, tuned, weight=[0.1, -0.1, 0.0], **how)
    np.testing.assert_allclose(third, met, atol=1e-12)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("how", [{}, {"nuslerp_flatten": False}, {"nuslerp_flatten": False, "nuslerp_row_wise": True}])
def test_equal_opposite_and_no_vectors_have_an_arc(how: dict[str, Any]) -> None:
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(2, 64, 48, generator=generator, dtype=torch.float64)
    np.testing.assert_allclose(merge_tensors("nuslerp", None, [x, x, x], weight=[1, 2, 3], **how), x, atol=1e-12)
    # what opposite ones leave is nothing but rounding, and all others are at right angles to that: sin 30° of the third
    opposite = merge_tensors("nuslerp", None, [x, -x * (1 + 1e-15), y], weight=1, **how)
    np.testing.assert_allclose(opposite, y / 2, atol=1e-6)


def test_the_recipe_goes_back_to_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name, tensor in zip(("base", "tuned-a", "tuned-b", "tuned-c"), (BASE, *policies(3)), strict=True):
        write_folder(tmp_path / "org" / name, {"model.norm.weight": tensor.float()})
    documents = list(yaml.safe_load_all(RECIPE.read_text(encoding="utf-8")))
    documents[1]["dtype"] = "float32"
    (tmp_path / "warp.yml").write_text(yaml.safe_dump_all(documents))
    mergekit_lite.merge(tmp_path / "warp.yml", tmp_path / "merged")
    [merged] = read_folder(tmp_path / "merged").values()
    np.testing.assert_allclose(merged - BASE, 0.3 * np.array(EQUAL[3]), atol=1e-6)
