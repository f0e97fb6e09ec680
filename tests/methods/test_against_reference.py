"""Each deterministic method against its naive reference: with defaults, with all parameters set, along the layers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch

import mergekit_lite
from mergekit_lite.methods import METHODS, merge_tensors
from tests.methods import reference
from tests.methods.reference import REFERENCES
from tests.models import read_folder, write_folder

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
    Case("nuslerp", True, (3, 5), {"weight": [0.3, 0.9, 0.4, -0.2, 0.5]}),
    Case("nuslerp", False, (4,), {"weight": 1.0}),
    *(
        Case("nuslerp", True, (2, 3), {"weight": [0.3, 0.9, 0.5], "nuslerp_flatten": False, "nuslerp_row_wise": along})
        for along in (False, True)
    ),
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
    Case("relex", True, MANY, {"step": [5.0, 30.0, 31.0, 60.0, 100.0], "to_step": 150.0}),
    Case("schedule_average", False, MANY, {}),
    *(Case("schedule_average", False, MANY, {"schedule": name}) for name in ("linear", "cosine", "inverse-sqrt")),
    Case("schedule_average", False, (5,), {"schedule": "linear", "weight": WEIGHTS}),
    Case("cart", True, MANY, {}),
    Case("cart", True, MANY, {"p": 0.3, "lambda": 0.6, "matrices": "all"}),
    Case("wudi", True, MANY, {}),
    Case("wudi", True, MANY, {"steps": 20, "matrices": "all"}),
    Case("iso_c", True, MANY, {}),
    Case("iso_c", True, MANY, {"lambda": 0.6, "matrices": "all"}),
    Case("tsv", True, MANY, {}),
    Case("tsv", True, MANY, {"lossless": True, "lambda": 0.6, "matrices": "all"}),
    Case("iso_cts", True, MANY, {}),
    Case("iso_cts", True, MANY, {"common_space_fraction": 0.3, "lambda": 0.6, "matrices": "all"}),
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


def fine_tunes(
    method: str, count: int, dtype: torch.dtype, shape: tuple[int, ...], seed: int = 0
) -> list[torch.Tensor]:
    """A base and its fine-tunes; for methods of whole models also unlike each other enough for angles to matter."""
    generator = torch.Generator().manual_seed(1000 * seed + count)
    apart = 0.02 if method in {"slerp", "karcher", "geometric_median"} else 0.002
    base = torch.randn(shape, generator=generator) * 0.02
    models = [base + torch.randn(shape, generator=generator) * apart * (1 + i / 2) for i in range(count)]
    return [tensor.to(dtype) for tensor in [base, *models]]


def by_reference(
    method: str, base: torch.Tensor | None, models: list[torch.Tensor], parameters: dict[str, Any]
) -> tuple[torch.Tensor, torch.Tensor]:
    """What the reference gives, and for which elements it is sure."""
    reference.doubtful.clear()
    wide = None if base is None else base.double()
    expected = REFERENCES[method](wide, [model.double() for model in models], **parameters)
    sure = torch.ones(expected.shape, dtype=torch.bool)
    for doubt in reference.doubtful:
        sure &= ~doubt
    return expected, sure


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
    base, *models = fine_tunes(case.method, count, dtype, shape)
    known = METHODS[case.method].parameters
    parameters = {
        name: value[: count + (case.base and known[name].each == "input")] if isinstance(value, list) else value
        for name, value in case.parameters.items()
    }
    start = base if case.base else None
    got = merge_tensors(case.method, start, models, block=500, **parameters)
    expected, sure = by_reference(case.method, start, models, parameters)
    assert_equal(got, expected, sure, [base, *models])


def assert_equal(got: torch.Tensor, expected: torch.Tensor, sure: torch.Tensor, inputs: list[torch.Tensor]) -> None:
    """To a relative 1e-6 in float32, once rounded in bfloat16, where the reference is sure."""
    assert (~sure).sum() <= 0.02 * sure.numel(), "the reference is in doubt about too many elements"
    assert got.dtype == inputs[0].dtype
    if got.dtype == torch.float32:
        assert ((got - expected).abs() <= 1e-6 * expected.abs())[sure].all()
    else:
        size = torch.stack(inputs).double().abs().amax(0)
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


# --- whole recipes: numbers along the layers, by filters ------------------------------------------------------------

# in the first, the second and the third layer
ALONG: dict[str, tuple[float, float, float]] = {
    "weight": (0.3, 0.9, 0.5), "density": (0.3, 1.0, 0.6), "gamma": (0.02, 0.0, 0.1), "lambda": (0.5, 1.0, 0.7),
    "t": (0.2, 1.3, 0.6), "alpha": (0.3, 0.9, 0.1), "scale": (0.7, 1.0, -0.4), "decay": (0.4, 0.9, 0.6),
    "select_topk": (0.2, 1.0, 0.5), "temperature": (4e-6, 9e-6, 2e-6), "threshold": (0.2, 0.6, 0.4),
    "epsilon": (1e-3, 2e-3, 5e-4), "r": (0.1, 0.5, 0.3), "step": (90, 100, 80), "to_step": (150, 300, 120),
    "common_space_fraction": (0.8, 0.3, 1.0), "p": (0.04, 0.3, 0.1),
}  # fmt: skip
FIXED = {"eps", "tol", "max_iter", "agree"}  # whole numbers and tolerances, set above
LAYERS = 3
RESTS = {"self_attn.q_proj.weight": (24, 24), "mlp.up_proj.weight": (40, 24), "input_layernorm.weight": (24,)}
TENSORS = {
    **{f"model.layers.{layer}.{rest}": shape for layer in range(LAYERS) for rest, shape in RESTS.items()},
    "model.embed_tokens.weight": (31, 24),
    "model.norm.weight": (24,),
    "lm_head.weight": (31, 24),
}


def rule(values: tuple[Any, Any, Any]) -> list[dict[str, Any]]:
    """Along the layers in MLPs, backwards in attention, one value elsewhere."""
    mlp, attention = {"filter": "mlp", "value": list(values)}, {"filter": "self_attn", "value": [*values][::-1]}
    return [mlp, attention, {"value": values[1]}]


def by_rule(values: tuple[Any, Any, Any], name: str) -> Any:
    """What the rule means for a tensor."""
    if "mlp" not in name and "self_attn" not in name:
        return values[1]
    layer = int(name.split(".")[2])
    return values[layer] if "mlp" in name else values[LAYERS - 1 - layer]


def rules(method: str, count: int) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The values along the layers of the parameters that all models share, and of each model's own."""
    shared: dict[str, Any] = {}
    each: list[dict[str, Any]] = [{} for _ in range(count)]
    for name, about in METHODS[method].parameters.items():
        if about.types == (bool,):
            shared[name] = (True, False, True)
        elif about.each:
            for number, own in enumerate(each):
                own[name] = tuple(value * (1 - number / 10) for value in ALONG[name])
        elif about.types in ((float,), (int,)) and name not in FIXED:
            shared[name] = tuple(value / 1000 for value in ALONG[name]) if method == "nearswap" else ALONG[name]
    return shared, each


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize(
    ("method", "count"),
    sorted({(case.method, count) for case in CASES for count in case.models}),
)
def test_gradients_and_filters(method: str, count: int, dtype: torch.dtype, tmp_path: Path) -> None:
    has_base = METHODS[method].base == "required"
    drawn = {name: fine_tunes(method, count, dtype, shape, i) for i, (name, shape) in enumerate(TENSORS.items())}
    places = [tmp_path / f"m{number}" for number in range(count + 1)]
    for number, place in enumerate(places):
        write_folder(place, {name: tensors[number] for name, tensors in drawn.items()})
    shared, each = rules(method, count)
    recipe: dict[str, Any] = {
        "merge_method": method,
        "models": [
            {"model": str(place), "parameters": {name: rule(values) for name, values in own.items()}}
            for place, own in zip(places[1:], each, strict=True)
        ],
        "parameters": {name: rule(values) for name, values in shared.items()},
    } | ({"base_model": str(places[0])} if has_base else {})
    (tmp_path / "recipe.yml").write_text(json.dumps(recipe))
    mergekit_lite.merge(tmp_path / "recipe.yml", tmp_path / "out", threads=2, block=500)
    merged = read_folder(tmp_path / "out")
    assert merged.keys() == TENSORS.keys()
    results = []
    for name, (base, *models) in drawn.items():
        parameters = {key: by_rule(values, name) for key, values in shared.items()}
        for key in each[0]:
            values = [by_rule(own[key], name) for own in each]
            parameters[key] = values[0] if method == "passthrough" else values
        if "matrices" in METHODS[method].parameters and ("embed" in name or "head" in name):
            parameters["matrices"] = "none"  # unless asked for, embeddings and heads are left to the mean
        results.append((merged[name], *by_reference(method, base if has_base else None, models, parameters)))
    got, expected, sure = (torch.cat([tensor.flatten() for tensor in kind]) for kind in zip(*results, strict=True))
    inputs = [torch.cat([tensors[number].flatten() for tensors in drawn.values()]) for number in range(count + 1)]
    assert_equal(got, expected, sure, inputs)


def test_the_table_is_complete() -> None:
    """Every deterministic method is here with its defaults, and with each of its parameters set.

    Those that read statistics have tests of their own.
    """
    deterministic = {name for name, method in METHODS.items() if not method.statistics} - RANDOM
    assert set(REFERENCES) == deterministic
    for name in deterministic:
        known = METHODS[name].parameters
        required = {p for p, about in known.items() if about.required}
        cases = [set(case.parameters) for case in CASES if case.method == name]
        assert any(given == required for given in cases), f"{name} with its defaults"
        assert set().union(*cases) >= set(known), f"{name} with all parameters"
