"""Stochastic rounding and the draws behind it."""

from __future__ import annotations

import math

import pytest
import torch

from mergekit_lite import draws, rounding

KEY = draws.stream_key(7, "model.norm.weight")


def test_draws_depend_on_the_index_alone() -> None:
    whole = draws.bits(KEY, 0, 10_000)
    assert torch.equal(whole[1234:5678], draws.bits(KEY, 1234, 5678 - 1234))


def test_draws_are_known_values() -> None:
    """A plain-Python second implementation with 32-bit words."""

    def mixed(index: int) -> int:
        x = (index + KEY) & 0xFFFFFFFF
        x ^= x >> 16
        x = x * 0x7FEB352D & 0xFFFFFFFF
        x ^= KEY >> 32
        x ^= x >> 15
        x = x * 0x846CA68B & 0xFFFFFFFF
        return x ^ x >> 16

    for start in (0, 999_999, 2**31 - 3, 2**32 - 4):
        expected = [mixed(start + k) for k in range(4)]
        assert [word & 0xFFFFFFFF for word in draws.bits(KEY, start, 4).tolist()] == expected


def test_draws_beyond_32_bits_differ_from_those_below() -> None:
    assert not torch.equal(draws.bits(KEY, 5, 100), draws.bits(KEY, 2**32 + 5, 100))


def test_each_stream_is_uniform() -> None:
    n = 1 << 20
    draw = draws.uniform(KEY, 0, n).double()
    assert abs(draw.mean() - 0.5) < 5 * math.sqrt(1 / 12 / n)
    assert abs(torch.corrcoef(torch.stack((draw[1:], draw[:-1])))[0, 1]) < 5 / math.sqrt(n)
    counts = torch.histc(draw, 256, 0, 1)
    chi_square = ((counts - n / 256) ** 2 / (n / 256)).sum()
    assert abs(chi_square - 255) < 5 * math.sqrt(2 * 255)


def test_streams_of_seeds_tensors_and_models_are_uncorrelated() -> None:
    n = 1 << 18
    keys = [draws.stream_key(seed, name, model) for seed in (0, 1) for name in ("a", "b", "c") for model in (0, 1, 2)]
    streams = torch.stack([draws.uniform(key, 0, n) for key in keys])
    correlation = torch.corrcoef(streams) - torch.eye(len(keys))
    assert correlation.abs().max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_rounds_to_a_neighbour_and_is_right_on_average(dtype: torch.dtype) -> None:
    n = 1 << 18
    for value in (1.0, -0.3, 1e-5, 6e-8, 3.3e-41 if dtype == torch.bfloat16 else 2e-8, 300.7):
        values = torch.full((n,), value, dtype=torch.float64)
        got = rounding.stochastic(values, dtype, KEY, 0).double()
        neighbours = got.unique()
        assert len(neighbours) <= 2
        assert neighbours.min() <= value <= neighbours.max()
        step = float(neighbours.max() - neighbours.min())
        assert abs(got.mean() - value) <= 5 * step / 2 / math.sqrt(n) + abs(value) * 1e-12


def test_what_is_representable_stays() -> None:
    patterns = torch.arange(-(2**15), 2**15, dtype=torch.int32).to(torch.int16)
    for dtype in (torch.bfloat16, torch.float16):
        every = patterns.view(dtype)
        got = rounding.stochastic(every.float(), dtype, KEY, 0)
        finite = torch.isfinite(every)
        assert torch.equal(got[finite].view(torch.int16), every[finite].view(torch.int16))
        assert torch.equal(got.isnan(), every.isnan())
        assert torch.equal(got.isinf(), every.isinf())


def test_float64_is_left_alone() -> None:
    values = torch.tensor([0.1, 0.2], dtype=torch.float64)
    assert torch.equal(rounding.stochastic(values, torch.float64, KEY, 0), values)
