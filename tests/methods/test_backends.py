"""Who does an operation: C where it can, for the tensor at hand, else torch; and what is not contiguous is copied."""

from __future__ import annotations

import pytest
import torch

from mergekit_lite import draws
from mergekit_lite.methods import merge_tensors
from mergekit_lite.ops import TensorKind, c_ops, ops_for
from mergekit_lite.ops.operations import (
    AllFinite,
    ByChance,
    Cast,
    CountUpperBits,
    DeltaSizes,
    Election,
    InnerProducts,
    Lengths,
    Merge,
    Statistic,
    WeightedSum,
)

SIXTEEN = ("bfloat16", "float16", "bfloat16")
DRAWN = (ByChance(1, 0.5), None)


def by_c(operation: Merge | Statistic, kind: TensorKind, device: str = "cpu") -> bool:
    return not ops_for(operation, kind, device).needs_torch


@pytest.mark.parametrize(
    "operation",
    [
        WeightedSum((1.0, 1.0)),
        Election((1.0,), (1.0,)),
        InnerProducts(from_base=True),
        Lengths((None,)),
        AllFinite(),
        CountUpperBits(DeltaSizes((0,))),
    ],
    ids=lambda operation: type(operation).__name__,
)
def test_c_takes_16_bits_on_the_cpu(operation: Merge | Statistic) -> None:
    assert by_c(operation, TensorKind(SIXTEEN)) is (c_ops.compiled() is not None)
    assert not by_c(operation, TensorKind((*SIXTEEN, "float32")))
    assert not by_c(operation, TensorKind(SIXTEEN), "cuda")


def test_c_casts_float32_to_16_bits() -> None:
    for dtype in SIXTEEN:
        assert by_c(Cast(), TensorKind(("float32", dtype))) is (c_ops.compiled() is not None)


def test_what_c_lacks_torch_does() -> None:
    assert not by_c(Cast(), TensorKind(("bfloat16", "float16")))
    assert not by_c(Cast(), TensorKind(("float32", "bfloat16"), rounding_key=7))
    assert not by_c(lambda block, _: block[0], TensorKind(SIXTEEN))
    assert not by_c(Election((1.0,), (1.0,), kept=lambda block, _: block[1:]), TensorKind(SIXTEEN))
    assert not by_c(CountUpperBits(lambda block, _: block), TensorKind(SIXTEEN))
    assert not by_c(WeightedSum((1.0, 1.0)), TensorKind(SIXTEEN, rounding_key=7))
    assert not by_c(WeightedSum((1.0, 1.0), True, masks=DRAWN), TensorKind(SIXTEEN, 2 * draws.WORDS + 1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_strided_inputs(dtype: torch.dtype) -> None:
    print("seed 3")
    both = torch.randn(2, 400, generator=torch.Generator().manual_seed(3)).to(dtype)
    for every in (both[:, ::2], both.T[::3].T):
        assert torch.equal(
            merge_tensors("linear", None, list(every), weight=[0.3, 0.9]),
            merge_tensors("linear", None, [one.clone() for one in every], weight=[0.3, 0.9]),
        )
