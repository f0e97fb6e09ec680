"""DARE and DELLA: what is kept, how much of it, and that it depends on seed, name, model and element alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from mergekit_lite import draws
from mergekit_lite.methods import merge_tensors
from mergekit_lite.ops.torch_ops import LEVELS, _chances, _levels

METHODS = ["dare_linear", "dare_ties", "della", "della_linear"]
ROWS, COLUMNS = 200, 1000
SHAPE = (ROWS, COLUMNS)


def ones(count: int = 1) -> tuple[torch.Tensor, list[torch.Tensor]]:
    """A base of zeros and deltas of ones, which show what is done to each element."""
    return torch.zeros(SHAPE), [torch.ones(SHAPE) for _ in range(count)]


@pytest.mark.parametrize("density", [0.9, 0.5, 0.2])
@pytest.mark.parametrize("method", METHODS)
def test_the_right_share_is_kept(method: str, density: float) -> None:
    epsilon = {"epsilon": 0.05} if "della" in method else {}
    merged = merge_tensors(method, *ones(), weight=1.0, density=density, rescale=False, **epsilon)
    kept = (merged != 0).double().mean().item()
    assert abs(kept - density) < 5 * (density * (1 - density) / merged.numel()) ** 0.5


@pytest.mark.parametrize("rescale", ["l1", True, "density"])
@pytest.mark.parametrize("method", METHODS)
def test_rescaling_keeps_the_mean(method: str, rescale: str | bool) -> None:
    generator = torch.Generator().manual_seed(0)
    base, delta = torch.zeros(SHAPE), torch.rand(SHAPE, generator=generator)
    merged = merge_tensors(method, base, [delta], weight=1.0, density=0.4, rescale=rescale, normalize=False)
    tolerance = 0.02 if rescale == "density" else 1e-6
    assert merged.sum().item() == pytest.approx(delta.sum().item(), rel=tolerance)
    if rescale == "density" and "dare" in method:
        torch.testing.assert_close(merged[merged != 0], delta[merged != 0] / 0.4)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_same_bytes_for_any_block(method: str, dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    base, *models = [torch.randn(SHAPE, generator=generator).to(dtype) for _ in range(4)]
    once = merge_tensors(method, base, models, weight=[0.3, 0.5, 0.2], density=0.5, block=1 << 20)
    for block in (1, 777, 4096, 65536):
        if block > 1 or "della" in method:
            again = merge_tensors(method, base, models, weight=[0.3, 0.5, 0.2], density=0.5, block=block)
            assert torch.equal(once, again), block


@pytest.mark.parametrize("method", METHODS)
def test_seed_name_and_model_all_matter(method: str) -> None:
    def kept(seed: int = 0, name: str = "w", models: int = 1) -> torch.Tensor:
        base, tuned = ones(models)
        weights = [0.0] * (models - 1) + [1.0]  # the last one's alone
        return merge_tensors(
            method,
            base,
            tuned,
            weight=weights,
            density=0.5,
            rescale=False,
            normalize=False,
            seed=seed,
            tensor_name=name,
        )

    first = kept()
    assert torch.equal(first, kept())
    for other in (kept(seed=1), kept(name="v"), kept(models=2)):
        agree = (first == other).double().mean().item()
        assert abs(agree - 0.5) < 0.02  # della: 0.515, as likely elements are likely in both


def test_draws_are_not_those_of_stochastic_rounding() -> None:
    kept = merge_tensors("dare_linear", *ones(), weight=1.0, density=0.5, rescale=False, tensor_name="w") != 0
    rounding = draws.uniform(draws.stream_key(0, "w"), 0, ROWS * COLUMNS).view(SHAPE) < 0.5
    assert abs((kept == rounding).double().mean().item() - 0.5) < 0.01


def test_density_one_and_zero() -> None:
    for method in METHODS:
        base, (tuned,) = ones()
        assert torch.equal(merge_tensors(method, base, [tuned], weight=1.0, density=1.0), tuned)
    for method in ("dare_linear", "dare_ties"):
        for rescale in ("l1", "density", False):
            assert torch.equal(merge_tensors(method, base, [tuned], weight=1.0, density=0.0, rescale=rescale), base)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_della_keeps_large_elements_more_often(dtype: torch.dtype) -> None:
    """The share kept at each rank follows the line from density − epsilon to density + epsilon."""
    rows, columns = 20_000, 8
    generator = torch.Generator().manual_seed(0)
    order = torch.rand(rows, columns, generator=generator).argsort(1)
    delta = (2.0**order * (-1) ** order).to(dtype)
    merged = merge_tensors(
        "della_linear", torch.zeros_like(delta), [delta], weight=1.0, density=0.5, epsilon=0.3, rescale=False
    )
    for rank in range(columns):
        kept = (merged != 0)[order == rank].double().mean().item()
        assert abs(kept - (0.2 + 0.6 * rank / 7)) < 0.02, rank
    exact = merge_tensors(
        "della_linear", torch.zeros_like(delta), [delta], weight=1.0, density=0.5, epsilon=0.3, rescale="density"
    )
    chances = (0.2 + 0.6 * order / 7).double()
    torch.testing.assert_close(exact[merged != 0].double(), (delta.double() / chances)[merged != 0], rtol=5e-3, atol=0)


@pytest.mark.parametrize("columns", [1, 2, 9, LEVELS // 4 - 1, LEVELS // 4, 999])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_chances_follow_the_mean_rank(dtype: torch.dtype, columns: int) -> None:
    generator = torch.Generator().manual_seed(0)
    delta = torch.randn(50, columns, generator=generator).to(dtype)
    delta[:, 5::7] = 0
    delta[3] = 0
    levels = _levels(delta)
    chances = _chances(levels, 0.3, 0.7)
    less = (levels[:, :, None] > levels[:, None, :]).sum(2)
    same = (levels[:, :, None] == levels[:, None, :]).sum(2)
    rank = less + (same - 1) / 2
    torch.testing.assert_close(
        chances, 0.3 + 0.4 * rank / (columns - 1) if columns > 1 else torch.full_like(chances, 0.5)
    )
    torch.testing.assert_close(chances.mean(1), torch.full((50,), 0.5))


@pytest.mark.parametrize("scale", [1.0, 1e-6, 1e30, 2.0**-100])
def test_levels_order_like_magnitudes(scale: float) -> None:
    """Within 1/64 of an octave, whatever the scale; nothing but what is 2⁻¹⁶ of the largest is lumped together."""
    size = torch.logspace(-4.5, 0, 5000).flip(0)[None]
    levels = _levels(size * scale)
    assert (levels.diff() <= 0).all() and levels.max() == LEVELS - 1
    for level in levels.unique()[1:]:
        of_level = size[levels == level]
        assert of_level.max() / of_level.min() <= 1 + 1 / 64 + 1e-6


def test_a_row_of_one_element_is_kept_by_its_density() -> None:
    base, tuned = torch.zeros(100_000, 1), torch.ones(100_000, 1)
    merged = merge_tensors("della_linear", base, [tuned], weight=1.0, density=0.3, rescale=False)
    assert abs(merged.mean().item() - 0.3) < 0.01


def test_draws_go_on_beyond_the_32nd_bit() -> None:
    key, edge = draws.stream_key(1, "w", 1), 2 * draws.WORDS  # two elements share a word
    across = draws.halves(key, edge - 50, 100)
    assert torch.equal(across[:50], draws.halves(key, edge - 50, 50))
    assert torch.equal(across[50:], draws.halves(key, edge, 50))
    assert not torch.equal(across[50:], draws.halves(key, 0, 50))


def test_draws_are_the_same_wherever_a_block_begins() -> None:
    key = draws.stream_key(1, "w", 1)
    whole = draws.halves(key, 0, 1000)
    for start, count in ((0, 1), (1, 1), (1, 2), (7, 100), (500, 500), (999, 1), (3, 0)):
        assert torch.equal(whole[start : start + count], draws.halves(key, start, count)), (start, count)


@pytest.mark.parametrize("start", [0, 12345, (1 << 32) - 1000, (1 << 32) + 7, 5 << 32])
def test_draws_without_torch_are_the_same(start: int) -> None:
    key = draws.stream_key(3, "w", 1)
    assert (draws.words(key, start, 1000).view(np.int32) == draws.bits(key, start, 1000).numpy()).all()


def test_the_two_elements_of_a_word_are_drawn_independently() -> None:
    """So are neighbours of different words, and the values fill their range evenly."""
    drawn = draws.halves(draws.stream_key(3, "w", 1), 0, 1 << 20).double()
    assert drawn.min() == -32768 and drawn.max() == 32767
    steps = torch.histc(drawn, 256, -32768, 32768)
    assert ((steps - 4096) ** 2 / 4096).sum() < 256 + 6 * 512**0.5  # chi² with 255 degrees of freedom
    for lag in (1, 2, 3, 64):
        correlation = (drawn[lag:] * drawn[:-lag]).mean() / drawn.var()
        assert abs(correlation) < 5 / 2**10, lag
