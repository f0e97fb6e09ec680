"""ExPO's formula, on numbers worked out by hand and in exact arithmetic."""

from __future__ import annotations

from fractions import Fraction

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.methods import merge_tensors
from mergekit_lite.ops import TensorKind, ops_for
from mergekit_lite.ops.operations import Step


def expo(aligned: torch.Tensor, sft: torch.Tensor, *, alpha: float) -> torch.Tensor:
    return merge_tensors("expo", sft, [aligned], alpha=alpha)


SFT = torch.tensor([[1.0, -0.5], [0.25, 0.0]])
ALIGNED = torch.tensor([[1.5, -0.75], [0.25, 0.125]])


@pytest.mark.parametrize(
    ("alpha", "expected"),
    [
        (0.3, [[1.65, -0.825], [0.25, 0.1625]]),
        (0.5, [[1.75, -0.875], [0.25, 0.1875]]),
        (8.0, [[5.5, -2.75], [0.25, 1.125]]),
        (-1.0, [[1.0, -0.5], [0.25, 0.0]]),
        (0.0, [[1.5, -0.75], [0.25, 0.125]]),
    ],
)
def test_worked_examples(alpha: float, expected: list[list[float]]) -> None:
    torch.testing.assert_close(expo(ALIGNED, SFT, alpha=alpha), torch.tensor(expected), rtol=1e-7, atol=0)


def test_one_ulp_is_lost_in_bfloat16() -> None:
    """A change of one bfloat16 step: alpha 0.3 rounds back to nothing, 0.5 ties to even, 1.0 is exact."""
    sft, aligned = torch.tensor([1.0]).bfloat16(), torch.tensor([1.0078125]).bfloat16()
    assert expo(aligned, sft, alpha=0.3).item() == 1.0078125
    assert expo(aligned, sft, alpha=0.5).item() == 1.015625
    assert expo(aligned, sft, alpha=1.0).item() == 1.015625


def test_rounded_once_where_the_released_script_rounds_three_times() -> None:
    sft = torch.tensor([-0.0002899169921875]).bfloat16()
    aligned = torch.tensor([0.00016117095947265625]).bfloat16()
    assert expo(aligned, sft, alpha=0.3).item() == 0.0002956390380859375
    three_times = aligned + 0.3 * (aligned - sft)
    assert three_times.item() == 0.00029754638671875


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_16_bit_inputs_are_computed_in_float32(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(1)
    sft = torch.randn(100_003, generator=generator).to(dtype)
    aligned = (sft.float() + torch.randn(100_003, generator=generator) * 0.01).to(dtype)
    for alpha in (0.1, 0.3, 0.5, 1.7, 25.0, -0.4):
        wide = expo(aligned.float(), sft.float(), alpha=alpha).to(dtype)
        ours = expo(aligned, sft, alpha=alpha)
        other = ours.view(torch.int16) != wide.view(torch.int16)  # float32 inputs are computed in float64
        assert other.float().mean() < 1e-3, alpha
        torch.testing.assert_close(ours[other], wide[other], rtol=torch.finfo(dtype).eps, atol=0)


@given(
    a=st.floats(-1e3, 1e3, width=32),
    s=st.floats(-1e3, 1e3, width=32),
    alpha=st.floats(-3, 30).filter(lambda x: abs(x) > 1e-6),
)
def test_float64_agrees_with_exact_fractions(a: float, s: float, alpha: float) -> None:
    exact = Fraction(a) + Fraction(alpha) * (Fraction(a) - Fraction(s))
    got = expo(torch.tensor([a], dtype=torch.float64), torch.tensor([s], dtype=torch.float64), alpha=alpha).item()
    scale = abs(a) + abs(alpha) * abs(a - s)
    assert abs(Fraction(got) - exact) <= Fraction(4 * 2**-53 * scale)


def test_effect_of_an_exact_result_is_alpha() -> None:
    block = [tensor.flatten() for tensor in (expo(ALIGNED, SFT, alpha=0.5), SFT, ALIGNED)]
    moved, square = ops_for(Step(), TensorKind(("float32",) * 3)).figures(Step(), block)
    assert square == 0.25 + 0.0625 + 0.015625
    assert moved / square == pytest.approx(0.5, rel=1e-7)
