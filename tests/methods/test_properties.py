"""What holds for any models: symmetry, scale, identity, blocks, degenerate inputs."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from mergekit_lite.methods import METHODS, Method, merge_states, merge_tensors
from tests.methods.whole import coefficients

# parameters under which a method gives identical models back, where its defaults don't
SPECIAL: dict[str, dict[str, Any]] = {
    "chat_vector": {"scale": 0.0},
    "consensus": {"lambda": 1 / 3},
    "expo": {"alpha": 0.0},
    "iso_c": {"matrices": "none"},
    "iso_cts": {"matrices": "none"},
    "tsv": {"lossless": True},
    "nearswap": {"t": 100.0},
    "ram": {"epsilon": 0.0},
    "ramplus_tl": {"epsilon": 0.0},
    "relex": {"step": [1, 2, 3], "to_step": 4},
    "wise_ft": {"alpha": 1.0},
}


def identity(method: Method) -> dict[str, Any]:
    """Every number that has to be given is 1, sums are divided by the weights, and what is special about the method."""
    required = {name: 1.0 for name, parameter in method.parameters.items() if parameter.required}
    divided = {"normalize": True} if "normalize" in method.parameters else {}
    return required | divided | SPECIAL.get(method.name, {})


IDENTITY = {name: identity(method) for name, method in METHODS.items()}
# where all parameters are at work and statistics are gathered
BUSY: dict[str, dict[str, Any]] = {
    "cart": {"p": 0.3},
    "breadcrumbs": {"weight": 0.5, "density": 0.5, "gamma": 0.1, "rescale": "l1"},
    "breadcrumbs_ties": {"weight": 0.5, "density": 0.5, "gamma": 0.1},
    "chat_vector": {"scale": 0.5},
    "consensus": {},
    "dare_linear": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "della": {"weight": 0.5, "density": 0.5},
    "della_linear": {"weight": 0.5, "density": 0.5},
    "expo": {"alpha": 0.5},
    "iso_c": {"matrices": "linear"},
    "iso_cts": {"matrices": "linear"},
    "tsv": {"lossless": False},
    "model_stock": {"filter_wise": True},
    "nearswap": {"t": 0.01},
    "nuslerp": {"weight": 1.0, "nuslerp_flatten": False, "nuslerp_row_wise": True},
    "passthrough": {"scale": 0.5},
    "ram": {"epsilon": 0.01},
    "ramplus_tl": {"epsilon": 0.01},
    "sce": {"select_topk": 0.3},
    "schedule_average": {"schedule": "cosine"},
    "slerp": {"t": 0.3},
    "ties": {"weight": 0.5, "density": 0.3, "rescale": "l1"},
    "wise_ft": {"alpha": 0.3},
}
# where the order of the models matters: by the formula, or because each has draws of its own
ORDERED = {
    "chat_vector",
    "dare_linear",
    "dare_ties",
    "della",
    "della_linear",
    "ema",
    "magmax",
    "nuslerp",
    "relex",
    "schedule_average",
}
SYMMETRIC = [name for name, method in METHODS.items() if method.models[1] != 1 and name not in ORDERED]
ABSOLUTE = {"arcee_fusion", "multislerp", "nearswap", "ram", "ramplus_tl"}  # a parameter or a softmax has their scale


def models_of(method: str, most: int = 3) -> int:
    fewest, limit = METHODS[method].models
    return max(fewest, min(most, limit or most))


def merge(method: str, base: torch.Tensor, models: list[torch.Tensor], **parameters: Any) -> torch.Tensor:
    """Merge with a base where the method takes one."""
    return merge_tensors(method, None if METHODS[method].base == "none" else base, models, **parameters)


def drawn(
    seed: int, count: int, shape: tuple[int, ...] = (13, 37), dtype: torch.dtype = torch.bfloat16
) -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    base = torch.randn(shape, generator=generator) * 0.1
    return [(base + torch.randn(shape, generator=generator) * 0.02 * bool(i)).to(dtype) for i in range(count + 1)]


seeds = st.integers(0, 2**32)


def test_nothing_is_special_about_methods_that_are_gone() -> None:
    assert {*SPECIAL, *BUSY, *ORDERED, *ABSOLUTE} <= METHODS.keys()


@pytest.mark.parametrize("method", sorted(IDENTITY))
@settings(max_examples=5)
@given(seed=seeds)
def test_identical_models_give_themselves(method: str, seed: int) -> None:
    count = models_of(method)
    # a base that takes part in the mean is one of the identical ones
    base, model = drawn(seed, 1)
    alone = METHODS[method].base == "optional" and method not in ("multislerp", "nuslerp")
    merged = merge(method, model if alone else base, [model] * count, **IDENTITY[method])
    if method == "arcee_fusion":
        assert ((merged == model) | (merged == base)).all()
    else:
        torch.testing.assert_close(merged, model, rtol=0.005, atol=0.002)
        assert (merged == model).double().mean() > 0.9  # all but base + (x − base) rounded in float32


@pytest.mark.parametrize("method", sorted(IDENTITY))
def test_all_inputs_the_same_give_it_to_the_bit(method: str) -> None:
    for dtype in (torch.bfloat16, torch.float32):
        (model, _) = drawn(1, 1, dtype=dtype)
        merged = merge(method, model, [model] * models_of(method), **{**IDENTITY[method], **BUSY.get(method, {})})
        expected = model * 0.5 if method == "passthrough" else model
        assert torch.equal(merged, expected), (merged - expected).abs().max()


@pytest.mark.parametrize("method", SYMMETRIC)
@settings(max_examples=5)
@given(seed=seeds, order=st.permutations(range(3)))
def test_order_of_models_does_not_matter(method: str, seed: int, order: list[int]) -> None:
    base, *models = drawn(seed, models_of(method), dtype=torch.float32)
    parameters = {**IDENTITY[method], **BUSY.get(method, {}), **({"lambda": 1.0} if method == "consensus" else {})}
    once = merge(method, base, models, **parameters)
    again = merge(method, base, [models[i] for i in order if i < len(models)], **parameters)
    torch.testing.assert_close(once, again, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("method", ["sce", "varm"])
@settings(max_examples=10)
@given(seed=seeds, power=st.integers(-20, 20))
def test_scaling_all_deltas_leaves_coefficients(method: str, seed: int, power: int) -> None:
    _, *deltas = drawn(seed, 3, dtype=torch.float32)
    zero = torch.zeros_like(deltas[0])
    once = coefficients(method, zero, deltas)
    assert coefficients(method, zero, [delta * 2.0**power for delta in deltas]) == once
    assert once == pytest.approx(coefficients(method, zero, [delta * 1e-3 for delta in deltas]))


@pytest.mark.parametrize("method", sorted(set(METHODS) - ABSOLUTE))
@settings(max_examples=5)
@given(seed=seeds, power=st.integers(-30, 30))
def test_scaling_the_models_scales_the_merge(method: str, seed: int, power: int) -> None:
    """To the bit: no threshold, draw or tolerance depends on how large the weights and the deltas are."""
    base, *models = drawn(seed, models_of(method), dtype=torch.float32)
    for parameters in (IDENTITY[method], {**IDENTITY[method], **BUSY.get(method, {})}):
        once = merge(method, base, models, **parameters)
        scaled = merge(method, base * 2.0**power, [model * 2.0**power for model in models], **parameters)
        assert torch.equal(scaled, once * 2.0**power), parameters


@pytest.mark.parametrize("method", [name for name in METHODS if "weight" in METHODS[name].parameters])
def test_weight_zero_leaves_a_model_out(method: str) -> None:
    base, *models = drawn(3, 2, dtype=torch.float32)
    both = merge_tensors(method, base if METHODS[method].base == "required" else None, models, weight=[1.0, 0.0])
    if METHODS[method].models[0] == 2 or method in ("karcher", "geometric_median", "multislerp"):
        torch.testing.assert_close(both, models[0], rtol=1e-5, atol=1e-7)
    else:
        alone = merge_tensors(method, base if METHODS[method].base == "required" else None, models[:1], weight=1.0)
        assert torch.equal(both, alone)


@pytest.mark.parametrize("method", [name for name in METHODS if "density" in METHODS[name].parameters])
def test_density_one_drops_nothing(method: str) -> None:
    base, *models = drawn(4, 3)
    plain = "ties" if METHODS[method].function.__name__ in ("ties", "breadcrumbs_ties", "dare_ties", "della") else None
    expected = merge_tensors(plain or "task_arithmetic", base, models, weight=0.4, normalize=False)
    assert torch.equal(merge_tensors(method, base, models, weight=0.4, density=1.0, normalize=False), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_no_bit_depends_on_the_blocks(method: str, dtype: torch.dtype) -> None:
    for shape in ((13, 37), (501,), (3, 5, 7), ()):
        base, *models = drawn(5, models_of(method), shape, dtype)
        parameters = {**IDENTITY[method], **BUSY.get(method, {})}
        once = merge(method, base, models, **parameters)
        assert once.shape == shape and once.dtype == dtype
        for block in (1, 64, 100, 10_000):
            assert torch.equal(once, merge(method, base, models, block=block, **parameters)), (shape, block)


@pytest.mark.parametrize("method", sorted(METHODS))
def test_constant_and_zero_tensors_give_numbers(method: str) -> None:
    count = models_of(method)
    zero, one = torch.zeros(4, 6), torch.ones(4, 6)
    for dtype in (torch.bfloat16, torch.float32):
        for base in (zero, one):
            for models in (
                [zero] * count,
                [one] * count,
                [-one] * count,
                [zero, one, -one][:count],
                [one, -one, zero][:count],
            ):
                for parameters in (IDENTITY[method], {**IDENTITY[method], **BUSY.get(method, {})}):
                    merged = merge(method, base.to(dtype), [model.to(dtype) for model in models], **parameters)
                    assert merged.isfinite().all(), (base, models, parameters)


def test_empty_tensors_stay_empty() -> None:
    for method in METHODS:
        empty = torch.zeros(0, 3)
        assert merge(method, empty, [empty] * models_of(method), **IDENTITY[method]).shape == (0, 3)


# --- selection ------------------------------------------------------------------------------------------------------


@settings(max_examples=150)
@given(
    method=st.sampled_from(["ties", "breadcrumbs", "sce"]),
    values=st.lists(st.integers(-4, 4), min_size=1, max_size=60),
    share=st.floats(0, 1),
    block=st.integers(1, 70),
    scale=st.sampled_from([1.0, 1e-3, 1e-15]),
)
def test_the_lowest_indices_of_a_tie_are_the_largest(
    method: str, values: list[int], share: float, block: int, scale: float
) -> None:
    delta = torch.tensor(values, dtype=torch.float32) * scale
    nothing, count = torch.zeros_like(delta), len(values)
    ranked = sorted(range(count), key=lambda i: (-abs(values[i]), i))
    if method == "sce":  # of those that differ
        merged = merge_tensors("sce", nothing, [delta, nothing], select_topk=share, block=block)
        chosen = ranked[: int(share * sum(map(bool, values))) if share < 1 else count]
    elif method == "ties":
        merged = merge_tensors("ties", nothing, [delta], weight=1.0, density=share, block=block)
        chosen = ranked[: max(1, int(share * count)) if share > 0 else 0]
    else:
        merged = merge_tensors("breadcrumbs", nothing, [delta], weight=1.0, density=share, gamma=0.2, block=block)
        kept = int(share * count)
        last = min(count, kept + int(0.2 * count))
        chosen = ranked[last - kept : last]
    assert torch.equal(merged, torch.tensor([delta[i] if i in chosen else 0.0 for i in range(count)]))


@settings(max_examples=30)
@given(seed=seeds, density=st.floats(0.01, 1), coarse=st.booleans(), method=st.sampled_from(["ties", "breadcrumbs"]))
def test_global_trim_is_that_of_the_model_in_one_piece(seed: int, density: float, coarse: bool, method: str) -> None:
    generator = torch.Generator().manual_seed(seed)
    deltas = [torch.randn(300, generator=generator) for _ in range(2)]
    if coarse:  # many ties, over the borders of tensors
        deltas = [(delta * 2).round() for delta in deltas]
    cuts = [("a", slice(0, 100)), ("b", slice(100, 101)), ("c", slice(101, 300))]
    models = [{name: delta[part] for name, part in cuts} for delta in deltas]
    base = {name: torch.zeros_like(tensor) for name, tensor in models[0].items()}
    merged = merge_states(method, base, models, weight=0.5, density=density, trim="global", block=64)
    whole = merge_tensors(method, torch.zeros(300), deltas, weight=0.5, density=density)
    assert torch.equal(torch.cat([merged[name] for name, _ in cuts]), whole)


def test_global_trim_keeps_densities_apart() -> None:
    """The largest of a small tensor goes where all the model's largest are elsewhere."""
    base = {"a": torch.zeros(10), "b": torch.zeros(10)}
    model = {"a": torch.arange(10.0), "b": torch.arange(10.0) * 100}
    merged = merge_states("ties", base, [model], weight=1.0, density=0.2, trim="global")
    assert (merged["a"] != 0).sum() == 0 and (merged["b"] != 0).sum() == 4


def test_select_nothing() -> None:
    base, *models = drawn(6, 3)
    assert torch.equal(merge_tensors("sce", base, models, select_topk=0.0), base)
    assert torch.equal(merge_tensors("ties", base, models, weight=1.0, density=0.0), base)
    for method in ("breadcrumbs", "breadcrumbs_ties"):
        assert torch.equal(merge_tensors(method, base, models, weight=1.0, density=0.0), base)


def test_geometric_median_is_the_point_that_holds_on() -> None:
    """Weiszfeld's step divides by zero at an input; the median of a triangle with an angle over 120° is that corner."""
    corner, left, right = torch.tensor([0.0, 0.1]), torch.tensor([-1.0, 0.0]), torch.tensor([1.0, 0.0])
    for order in ([corner, left, right], [left, corner, right], [left, right, corner]):
        torch.testing.assert_close(merge_tensors("geometric_median", None, order), corner, atol=1e-4, rtol=0)
    pair = merge_tensors("geometric_median", None, [left, left, right])
    torch.testing.assert_close(pair, left, atol=1e-4, rtol=0)
    assert torch.equal(merge_tensors("geometric_median", None, [right]), right)
