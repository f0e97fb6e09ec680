"""Kernels against the torch expressions they stand for: the same bits, whatever is in the tensors."""

from __future__ import annotations

import math
import os
import random
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from unittest.mock import patch

import pytest
import torch

from mergekit_lite.checkpoint.reader import bytes_of
from mergekit_lite.methods import merge_tensors
from mergekit_lite.methods.statistics import WORTH_SAMPLING
from mergekit_lite.ops import TensorKind, c_ops, ops_for
from mergekit_lite.ops.operations import AllFinite, Cast, CompareSizes, DeltaSizes

SHARES = {"density": 0.4, "weight": 0.6}
CASES: list[tuple[str, dict[str, Any]]] = [
    ("linear", {"weight": 0.3}),
    ("linear", {"weight": [0.2, 0.5, -0.1, 0.7, 1.1], "normalize": False}),
    ("uniform_soup", {}),
    ("wise_ft", {"alpha": 0.3}),
    ("wise_ft", {"alpha": 0.7}),
    ("expo", {"alpha": 0.3}),
    ("expo", {"alpha": -0.9}),
    ("expo", {"alpha": 0.0}),
    ("expo", {"alpha": -1.0}),
    ("slerp", {"t": 0.3}),
    ("multislerp", {"weight": 0.5}),
    ("karcher", {}),
    ("task_arithmetic", {"weight": 0.7, "normalize": True}),
    ("model_stock", {}),
    ("varm", {}),
    ("varm", {"granularity": "model", "measure": "abs", "temperature": 0.01}),
    ("sce", {}),
    ("sce", {"variant": "paper"}),
    ("sce", {"variant": "fusechat", "select_topk": 0.3}),
    ("ties", SHARES),
    ("ties", {"weight": [0.5, -0.3, 0.2, 0.9, -1.0], "density": 0.7, "lambda": 1.3}),
    ("ties", {"weight": 1.0, "density": [0.0, 1.0, 0.5, 0.9, 0.1], "normalize": False, "rescale": True}),
    ("ties", {**SHARES, "trim": "global"}),
    ("breadcrumbs", {**SHARES, "gamma": 0.05}),
    ("breadcrumbs_ties", {**SHARES, "gamma": 0.05, "rescale": "l1"}),
    ("dare_linear", SHARES),
    ("dare_linear", {**SHARES, "rescale": "density", "seed": 5}),
    ("dare_ties", SHARES),
    ("della", {**SHARES, "epsilon": 0.1}),
    ("della", {"density": [0.5, 1.0, 0.2, 0.9, 0.3], "weight": 0.5, "epsilon": 0.05, "rescale": "density"}),
    ("della_linear", {**SHARES, "epsilon": 0.2, "rescale": False, "seed": 5}),
]


SIXTEEN_BITS = (BF16, F16) = torch.bfloat16, torch.float16
KINDS = ((F16, F16, F16, F16, F16), (F16, BF16, BF16, BF16, BF16), (BF16, F16, BF16, F16, BF16))  # out, base, models


@contextmanager
def without_kernels() -> Iterator[None]:
    with patch.object(c_ops, "compiled", lambda: None):
        yield


def models(
    method: str, shape: tuple[int, ...], count: int, seed: int
) -> tuple[torch.Tensor | None, list[torch.Tensor]]:
    """A base and so many models near it, as far as the method takes them."""
    print(f"seed {seed}")
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.02
    made = [(base + torch.randn(shape, generator=generator) * 3e-4).bfloat16() for _ in range(count)]
    if method in ("slerp", "wise_ft", "expo"):
        return base.bfloat16(), made[:1]
    return (None, made) if method in ("linear", "uniform_soup", "karcher") else (base.bfloat16(), made)


def cut(parameters: dict[str, Any], count: int) -> dict[str, Any]:
    return {name: value[:count] if isinstance(value, list) else value for name, value in parameters.items()}


def both(method: str, base: torch.Tensor | None, tuned: list[torch.Tensor], **parameters: Any) -> list[torch.Tensor]:
    parameters = cut(parameters, len(tuned))
    with_kernels = merge_tensors(method, base, tuned, **parameters)
    with without_kernels():
        return [with_kernels, merge_tensors(method, base, tuned, **parameters)]


def assert_same_bits(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    assert torch.equal(ours.isnan(), theirs.isnan())
    number = ~theirs.isnan()
    assert torch.equal(ours[number].view(torch.int16), theirs[number].view(torch.int16))


def test_they_are_there() -> None:
    """Where there is a compiler, an installation has them: without them the other tests here would show nothing."""
    if shutil.which("cc") is None and "CI" not in os.environ:
        pytest.skip("no C compiler")
    assert c_ops.compiled() is not None, "pip install -e . compiles them"


def test_a_library_of_older_sources_is_not_used() -> None:
    with patch.dict(c_ops.SIGNATURES, {"added_later": (None,)}):
        assert c_ops.compiled.__wrapped__() is None


@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize("numel", [1, 511, 513, 70_001])
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{','.join(case[1])}")
def test_same_bits(case: tuple[str, dict[str, Any]], numel: int, count: int) -> None:
    method, parameters = case
    if method == "model_stock" and count == 1:
        count = 2
    assert_same_bits(*both(method, *models(method, (numel,), count, seed=numel + count), **parameters))


@pytest.mark.parametrize("kinds", KINDS, ids=lambda kinds: "-".join(str(kind)[6:] for kind in kinds))
@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{','.join(case[1])}")
def test_same_bits_of_other_16_bit_floats(case: tuple[str, dict[str, Any]], kinds: tuple[torch.dtype, ...]) -> None:
    method, parameters = case
    base, tuned = models(method, (30, 700), 3, seed=8)
    output, of_base, *of_models = kinds
    base = base.to(of_base) if base is not None else None
    tuned = [tensor.to(kind) for tensor, kind in zip(tuned, of_models, strict=False)]
    assert_same_bits(*both(method, base, tuned, dtype=output, **parameters))


@pytest.mark.parametrize("scale", [1.0, 1 / 3, 1 + 2.0**-11, 3e-5, 2.0**-13, 7.7, -40000.0, 2.0**-120, 1e38])
@pytest.mark.parametrize("output", SIXTEEN_BITS)
@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_every_number_is_widened_and_rounded_as_by_torch(kind: torch.dtype, output: torch.dtype, scale: float) -> None:
    every = torch.arange(1 << 16, dtype=torch.int32).to(torch.uint16).view(kind)
    assert_same_bits(*both("passthrough", None, [every], dtype=output, scale=scale))


@pytest.mark.parametrize("output", SIXTEEN_BITS)
def test_float32_is_cast_as_by_torch(output: torch.dtype) -> None:
    seed = random.randrange(1000)
    print(f"seed {seed}")
    bits = torch.randint(-(1 << 31), 1 << 31, (70_001,), generator=torch.Generator().manual_seed(seed))
    ends = torch.arange(0, 1 << 16, 127) << 16  # ties, and what lies beside them
    every = torch.cat([bits, *(ends + beside for beside in (0, 1 << 12, 1 << 15, (1 << 15) - 1, 1))]).to(torch.int32)
    numbers, out = every.view(torch.float32), torch.empty(len(every), dtype=output)
    ops = ops_for(Cast(), TensorKind(("float32", str(output)[6:])))
    ops.merge(
        Cast(), [ops.of_bytes(bytes_of(numbers), "float32")], 0, ops.of_bytes(bytes_of(out), str(output)[6:]), 512
    )
    assert_same_bits(out, numbers.to(output))


@pytest.mark.parametrize("shape", [(), (3, 1), (7, 100), (3, 511), (5, 1500), (2, 3, 700)])
@pytest.mark.parametrize("case", CASES[-3:], ids=lambda case: f"{case[0]}-{','.join(case[1])}")
def test_same_bits_of_rows(case: tuple[str, dict[str, Any]], shape: tuple[int, ...]) -> None:
    method, parameters = case
    assert_same_bits(*both(method, *models(method, shape, 3, seed=6), **parameters))


@pytest.mark.parametrize("case", CASES, ids=lambda case: f"{case[0]}-{','.join(case[1])}")
def test_same_bits_with_thresholds_proven_from_a_sample(case: tuple[str, dict[str, Any]]) -> None:
    method, parameters = case
    assert_same_bits(*both(method, *models(method, (2, WORTH_SAMPLING // 2 + 999), 3, seed=1), **parameters))


@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf"), -0.0, 1e-40, 3e38])
@pytest.mark.parametrize(
    "case", [case for case in CASES if "rescale" not in case[1]], ids=lambda case: f"{case[0]}-{','.join(case[1])}"
)
def test_same_bits_of_odd_numbers(case: tuple[str, dict[str, Any]], odd: float) -> None:
    """In the base, in a model, in both. What isn't finite is never lost, even where no k-th largest can be told."""
    method, parameters = case
    base, tuned = models(method, (4, 300), 3, seed=2)
    for number, tensor in enumerate([*([] if base is None else [base]), *tuned]):
        tensor[0, 10 * number : 10 * number + 10] = odd
        tensor[1] = odd
    ours, theirs = both(method, base, tuned, **parameters)
    if "breadcrumbs" in method and not math.isfinite(odd):
        assert not ours.isfinite().all() and not theirs.isfinite().all()
    else:
        assert_same_bits(ours, theirs)


@pytest.mark.parametrize("method", ["dare_linear", "ties"])
def test_same_bits_for_any_block(method: str) -> None:
    base, tuned = models(method, (40_000,), 3, seed=3)
    whole, *parts = (
        merge_tensors(method, base, tuned, **SHARES, rescale=False, block=block)
        for block in (1 << 20, 1, 37, 513, 8192)
    )
    for part in parts:
        assert_same_bits(part, whole)


def test_sums_agree() -> None:
    base, tuned = models("ties", (100_003,), 4, seed=4)
    assert base is not None
    wide = [(tensor.double() - base.double()) for tensor in tuned]
    products = torch.stack([torch.dot(a, b) for i, a in enumerate(wide) for b in wide[: i + 1]])
    runs = [c_ops.C_OPS.of_tensor(tensor) for tensor in (base, *tuned)]
    assert c_ops.inner_products(runs, True) == pytest.approx(products.tolist(), rel=1e-12)
    keeps = [c_ops.Keep(c_ops.BY_SIZE, low=2.0**-12, low_end=0, high=float("inf"))] * 4
    kept = [delta * (delta.abs() > 2.0**-12) for delta in wide]
    sizes = [delta.abs().sum().item() for delta in (*wide, *kept)]
    assert c_ops.lengths(runs, keeps, 0) == pytest.approx(sizes, rel=1e-12)


def test_sizes_are_counted_by_index() -> None:
    base, [tuned] = models("ties", (10_000,), 1, seed=5)
    assert base is not None
    tuned[500:600] = base[500:600]
    sizes = (tuned.float() - base.float()).abs()
    threshold, start, step = sizes.median().item(), 777, 1000
    runs = [c_ops.C_OPS.of_tensor(tensor) for tensor in (base, tuned)]
    comparison = CompareSizes(DeltaSizes((0,)), ((threshold,),), start, step)
    [[[elements, *counts]]] = c_ops.C_OPS.sum(comparison, runs, 0, len(base)).tolist()
    equal = torch.zeros(11, dtype=torch.int64)
    for index in (sizes == threshold).nonzero().flatten().tolist():
        equal[(start + index) // step] += 1
    assert elements == len(base)
    assert counts[: 2 + len(equal)] == [int((sizes > 0).sum()), int((sizes > threshold).sum()), *equal.tolist()]
    assert not any(counts[2 + len(equal) :])


@pytest.mark.parametrize("place", [0, 31, 511, 1000])
@pytest.mark.parametrize("odd", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("kind", SIXTEEN_BITS)
def test_one_number_that_is_not_finite_is_found(kind: torch.dtype, odd: float, place: int) -> None:
    tensor = torch.full((1001,), torch.finfo(kind).max, dtype=kind)
    assert c_ops.C_OPS.figures(AllFinite(), [c_ops.C_OPS.of_tensor(tensor)]) == [1]
    tensor[place] = odd
    assert c_ops.C_OPS.figures(AllFinite(), [c_ops.C_OPS.of_tensor(tensor)]) == [0]


def test_what_they_do_not_take() -> None:
    fits = torch.zeros(4, 4, dtype=torch.bfloat16)
    assert c_ops.take(fits, fits.half())
    assert not c_ops.take(fits, fits.float())
    assert not c_ops.take(fits.T[1:])
    assert not c_ops.take(*[fits] * (c_ops.MOST_TENSORS + 1))
    with without_kernels():
        assert not c_ops.take(fits)
