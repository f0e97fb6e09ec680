"""Each deterministic method, with defaults and with every parameter set, against the naive reference in float64."""

from __future__ import annotations

from typing import Any, NamedTuple

import pytest
import torch

from mergekit_lite.methods import METHODS, merge_tensors
from tests.methods import reference
from tests.methods.reference import REFERENCES

UNUSED = {"int8_mask"}
RANDOM = {"dare_linear", "dare_ties", "della", "della_linear"}
SHAPE = (37, 53)


class Case(NamedTuple):
    """Lists stand for a number for each input and are cut to as many as there are."""

    method: str
    base: bool
    models: tuple[int, ...]
    parameters: dict[str, Any]


WEIGHTS = [0.7, 0.4, -0.2, 0.9, 0.35, 0.6]
DENSITIES = [0.3, 0.8, 1.0, 0.1, 0.5]
GTA = {"rescale": "l1", "lambda": 0.7, "trim": "global"}
MANY = (2, 3, 5)
CASES = [
    Case("linear", False, MANY, {"weight": 1.0}),
    Case("linear", False, MANY, {"weight": WEIGHTS, "normalize": False}),
    Case("linear", True, MANY, {"weight": WEIGHTS}),
    Case("uniform_soup", False, MANY, {}),
    Case("uniform_soup", True, MANY, {}),
    Case("ema", False, MANY, {}),
    Case("ema", True, MANY, {"decay": 0.6}),
    Case("wise_ft", True, (1,), {}),
    Case("wise_ft", True, (1,), {"alpha": 0.3}),
    Case("chat_vector", True, (2,), {}),
    Case("chat_vector", True, (2,), {"scale": 0.7}),
    Case("passthrough", False, (1,), {}),
    Case("passthrough", False, (1,), {"scale": 0.7}),
    Case("expo", True, (1,), {"alpha": 0.3}),
    Case("slerp", True, (1,), {"t": 0.3}),
    Case("slerp", True, (1,), {"t": 1.4}),
    Case("nuslerp", False, (2,), {"weight": [0.3, 0.9]}),
    Case("nuslerp", True, (2,), {"weight": [0.3, 0.9]}),
    Case("nuslerp", True, (2,), {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": False}),
    Case("nuslerp", True, (2,), {"weight": [0.3, 0.9], "nuslerp_flatten": False, "nuslerp_row_wise": True}),
    Case("nuslerp", False, (2,), {"weight": 1.0, "nuslerp_flatten": False}),
    Case("multislerp", False, MANY, {"weight": 1.0}),
    Case("multislerp", True, MANY, {"weight": WEIGHTS, "normalize_weights": False, "eps": 1e-7}),
    Case("karcher", False, MANY, {}),
    Case("karcher", True, MANY, {"weight": [0.3, 0.9, 0.5, 0.4, 0.2, 0.1], "max_iter": 4, "tol": 1e-9}),
    Case("geometric_median", False, (3, 5), {}),
    Case("geometric_median", True, (3, 5), {"weight": [0.4, 0.5, 0.5, 0.4, 0.6, 0.3], "max_iter": 7, "tol": 1e-3}),
    Case("model_stock", True, MANY, {}),
    Case("model_stock", True, MANY, {"filter_wise": True}),
    Case("task_arithmetic", True, MANY, {"weight": 1.0}),
    Case("task_arithmetic", True, MANY, {"weight": WEIGHTS, "normalize": True, "lambda": 0.8}),
    Case("ties", True, MANY, {"weight": 1.0}),
    Case("ties", True, MANY, {"weight": WEIGHTS, "density": 0.5}),
    Case("ties", True, MANY, {"weight": [0.5, 0.3, 0.2, 0.4, 0.1], "density": DENSITIES, "normalize": False, **GTA}),
    Case("ties", True, MANY, {"weight": 0.3, "density": 0.2, "rescale": "density", "trim": "global"}),
    Case("breadcrumbs", True, MANY, {"weight": 1.0}),
    Case("breadcrumbs", True, MANY, {"weight": WEIGHTS, "density": DENSITIES, "gamma": 0.03, "normalize": True, **GTA}),
    Case("breadcrumbs", True, MANY, {"weight": 1.0, "density": 0.9, "gamma": [0.2, 0.0, 0.1, 0.2, 0.3]}),
    Case("breadcrumbs_ties", True, MANY, {"weight": 1.0}),
    Case("breadcrumbs_ties", True, MANY, {"weight": WEIGHTS, "density": 0.7, "gamma": 0.1, "normalize": True, **GTA}),
    Case("sce", True, MANY, {}),
    *(
        Case("sce", True, MANY, {"select_topk": topk, "variant": variant})
        for topk in (0.5, 0.1)
        for variant in ("mergekit", "fusechat", "paper")
    ),
    Case("varm", True, MANY, {}),
    *(
        Case("varm", True, MANY, {"granularity": granularity, "measure": "abs", "temperature": 2e-3})
        for granularity in ("model", "layer", "module", "tensor", "element")
    ),
    Case("varm", True, MANY, {"granularity": "element"}),
    Case("nearswap", True, (1,), {"t": 0.001}),
    Case("magmax", True, MANY, {}),
    Case("magmax", True, MANY, {"lambda": 0.4}),
    Case("consensus", True, MANY, {}),
    Case("consensus", True, MANY, {"threshold": [0.2, 0.6, 0.4, 0.5, 0.3], "agree": 1, "lambda": 0.5}),
    Case("ram", True, MANY, {}),
    Case("ram", True, MANY, {"epsilon": 0.002}),
    Case("ramplus_tl", True, MANY, {}),
    Case("ramplus_tl", True, MANY, {"epsilon": 0.002, "r": 0.3, "alpha": 0.9}),
    Case("arcee_fusion", True, (1,), {}),
]


def tensors(case: Case, count: int, dtype: torch.dtype, shape: tuple[int, ...]) -> list[torch.Tensor]:
    """Fine-tunes of one base; for methods of whole models also unlike each other enough for angles to matter."""
    generator = torch.Generator().manual_seed(count)
    apart = 0.02 if case.method in {"slerp", "karcher", "geometric_median"} else 0.002
    base = torch.randn(shape, generator=generator) * 0.02
    models = [base + torch.randn(shape, generator=generator) * apart * (1 + i / 2) for i in range(count)]
    return [tensor.to(dtype) for tensor in [base, *models]]


@pytest.mark.parametrize("shape", [SHAPE, (401,)], ids=["matrix", "vector"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("case", "count"),
    [
        pytest.param(case, count, id=f"{i}-{case.method}-{count}{'+base' if case.base else ''}")
        for i, case in enumerate(CASES)
        for count in case.models
    ],
)
def test_equals_the_reference(case: Case, count: int, dtype: torch.dtype, shape: tuple[int, ...]) -> None:
    base, *models = tensors(case, count, dtype, shape)
    kinds = {name: str(p.annotation) for name, p in METHODS[case.method].parameters.items()}
    parameters = {
        name: value[: count + (case.base and "input" in kinds[name])] if isinstance(value, list) else value
        for name, value in case.parameters.items()
    }
    got = merge_tensors(case.method, base if case.base else None, models, block=500, **parameters)
    reference.doubtful.clear()
    expected = REFERENCES[case.method](
        base.double() if case.base else None, [model.double() for model in models], **parameters
    )
    sure = torch.ones(shape, dtype=torch.bool)
    for doubt in reference.doubtful:
        sure &= ~doubt
    assert (~sure).sum() <= 0.02 * sure.numel(), "the reference is in doubt about too many elements"
    assert got.dtype == dtype
    if dtype == torch.float32:
        assert ((got - expected).abs() <= 1e-6 * expected.abs())[sure].all()
    else:
        size = torch.stack([base, *models]).double().abs().amax(0)
        same_once_rounded(got[sure], expected[sure], size[sure])


def same_once_rounded(got: torch.Tensor, expected: torch.Tensor, size: torch.Tensor) -> None:
    """Equal to the float64 values rounded once, but where the border between the two roundings is a hair away.

    That is not as rare as it sounds: 0.7·a + 0.4·b of two bfloat16 values lies exactly on a border for one element in
    a hundred. A hair is 1e-6 of the largest input's size; 5 % of the elements may be that near.
    """
    rounded = expected.to(got.dtype)
    off = got != rounded
    border = (got[off].double() + rounded[off].double()) / 2
    assert off.sum() <= 0.05 * off.numel(), f"{int(off.sum())} of {off.numel()} differ"
    assert ((border - expected[off]).abs() <= 1e-6 * size[off]).all()


def test_the_table_is_complete() -> None:
    """Every deterministic method is here with its defaults, and with each of its parameters set."""
    deterministic = set(METHODS) - RANDOM
    assert set(REFERENCES) == deterministic
    for name in deterministic:
        known = METHODS[name].parameters
        required = {p for p, about in known.items() if about.default is about.empty}
        cases = [set(case.parameters) for case in CASES if case.method == name]
        assert any(given == required for given in cases), f"{name} with its defaults"
        assert set().union(*cases) >= set(known) - UNUSED, f"{name} with all parameters"
