"""The path through a GPU, on a simulated one: the CPU's bytes, and nothing that only a CPU would forgive."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from mergekit_lite.engine.pool import Workers
from mergekit_lite.engine.schedule import Schedule
from mergekit_lite.engine.sink import Records
from mergekit_lite.engine.tiling import GRAIN
from mergekit_lite.merging import plan_merge
from mergekit_lite.methods.registry import METHODS
from mergekit_lite.output.journal import Record
from mergekit_lite.planning import Plan
from tests.engine.simulated_gpu import SimulatedGpus
from tests.models import State, tuned, write_folder

SHAPES = {
    "model.embed_tokens.weight": (48, 8),
    "model.layers.0.mlp.up_proj.weight": (200, 250),  # two blocks
    "model.norm.weight": (8,),
}
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
WEIGHTS = {"weight": [0.5, 0.3, 0.4]}
SPARSE = WEIGHTS | {"density": 0.5}
RANKED = SPARSE | {"epsilon": 0.1}
CRUMBS = WEIGHTS | {"density": 0.7, "gamma": 0.05}
# Parameters by case; the method is the name up to a blank. As many models as it takes: two, or three.
CASES: dict[str, dict[str, Any]] = {
    "arcee_fusion": {},
    "breadcrumbs": CRUMBS,
    "breadcrumbs_ties": CRUMBS | {"rescale": "l1"},
    "chat_vector": {"scale": 0.7},
    "consensus": {"lambda": 0.8},
    "dare_linear": SPARSE,
    "dare_linear density": SPARSE | {"rescale": "density"},
    "dare_ties": SPARSE,
    "della": RANKED,
    "della_linear": RANKED | {"rescale": "density"},
    "ema": {"decay": 0.7},
    "expo": {"alpha": 0.3},
    "expo small": {"alpha": -0.7},
    "geometric_median": {},
    "karcher": {},
    "linear": WEIGHTS,
    "linear sum": WEIGHTS | {"normalize": False},
    "magmax": {"lambda": 0.9},
    "model_stock": {},
    "model_stock rows": {"filter_wise": True},
    "multislerp": WEIGHTS,
    "nearswap": {"t": 0.0005},
    "nuslerp": {"weight": [0.3, 0.7]},
    "nuslerp rows": {"weight": [0.3, 0.7], "nuslerp_flatten": False},
    "nuslerp columns": {"weight": [0.3, 0.7], "nuslerp_flatten": False, "nuslerp_row_wise": True},
    "passthrough": {"scale": 1.3},
    "ram": {},
    "ramplus_tl": {},
    "sce": {},
    "sce some": {"select_topk": 0.2},
    "sce fusechat": {"select_topk": 0.2, "variant": "fusechat"},
    "slerp": {"t": 0.4},
    "task_arithmetic": WEIGHTS,
    "ties": SPARSE,
    "ties global": SPARSE | {"trim": "global"},
    "ties rescaled": SPARSE | {"rescale": "l1"},
    "uniform_soup": {},
    "varm": {},
    "varm element": {"granularity": "element"},
    "varm warm": {"granularity": "model", "temperature": 1e-6},
    "wise_ft": {"alpha": 0.3},
}
# What depends on sums of floats, so that a device that adds in another order gives other last bits; and what is made by
# a method's own function, which is taken to do so too.
SUMMED = {
    "arcee_fusion", "breadcrumbs_ties", "dare_linear", "dare_ties", "della", "geometric_median", "karcher",
    "model_stock", "model_stock rows", "multislerp", "nuslerp", "nuslerp rows", "nuslerp columns", "sce", "sce some",
    "sce fusechat", "slerp", "ties rescaled", "varm", "varm element", "varm warm",
}  # fmt: skip
BY_THREE = ("geometric_median", "sce")
BY_FUNCTION = {"consensus", "magmax", "nearswap", "ram", "ramplus_tl"}


@pytest.fixture(scope="module", params=DTYPES)
def family(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a base and three models tuned from it."""
    folder: Path = tmp_path_factory.mktemp(request.param)
    write_family(folder, DTYPES[request.param])
    return folder


@pytest.fixture
def gpus(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimulatedGpus]:
    """One simulated GPU, on which no fault may be left."""
    simulated = SimulatedGpus()
    simulated.install(monkeypatch)
    yield simulated
    assert not simulated.faults
    assert not simulated.pinned


Made = dict[tuple[int, int], Record]


def write_family(folder: Path, dtype: torch.dtype, shapes: Mapping[str, tuple[int, ...]] = SHAPES) -> None:
    generator = torch.Generator().manual_seed(0)
    base: State = {name: (torch.randn(shape, generator=generator) * 0.02).to(dtype) for name, shape in shapes.items()}
    for name, state in {"base": base, **{f"tuned-{seed}": tuned(base, seed) for seed in (1, 2, 3)}}.items():
        write_folder(folder / name, state)


def write_recipe(folder: Path, case: str, rounding: str = "nearest") -> Path:
    method = METHODS[case.partition(" ")[0]]
    parameters = dict(CASES[case])
    numbers = {name: parameters.pop(name) for name in ("weight", "scale") if isinstance(parameters.get(name), list)}
    models = [
        {
            "model": str(folder / f"tuned-{seed}"),
            "parameters": {name: list_[seed - 1] for name, list_ in numbers.items()},
        }
        for seed in range(1, 1 + min(3 if method.name in BY_THREE else 2, method.models[1] or 3))
    ]
    recipe = {"merge_method": method.name, "models": models, "parameters": parameters, "rounding": rounding}
    if method.base == "required" or "rows" in case:
        recipe["base_model"] = str(folder / "base")
    path = folder / f"{case}.yml"
    path.write_text(yaml.safe_dump(recipe))
    return path


def made(plan: Plan, devices: tuple[str, ...], workers: int, block: int = GRAIN) -> Made:
    """Return what some devices make of a plan: digests, figures and coefficients of every span."""
    records = Records()
    Schedule(plan, {0: records}, Workers(workers, devices, block), None).run()
    return records.made


def digests(records: Made) -> dict[tuple[int, int], tuple[object, ...]]:
    """Return what must be the same on every device."""
    return {key: (record.inputs, record.output, record.bad) for key, record in records.items()}


def bytes_of(output: Path) -> bytes:
    return (output / "model.safetensors").read_bytes()


def test_cases_cover_every_method() -> None:
    assert {case.partition(" ")[0] for case in CASES} == METHODS.keys()


@pytest.mark.parametrize("rounding", ["nearest", "stochastic"])
def test_every_method_gives_the_bytes_of_the_cpu(family: Path, gpus: SimulatedGpus, rounding: str) -> None:
    for case in CASES if rounding == "nearest" else METHODS:
        plan = plan_merge(write_recipe(family, case, rounding), family / "out")
        on_cpu, on_gpu = made(plan, ("cpu",), workers=1), made(plan, ("cuda:0",), workers=3)
        assert digests(on_gpu) == digests(on_cpu), case
        assert not gpus.faults, case


@pytest.mark.parametrize("family", ["float32"], indirect=True)
def test_what_a_device_that_adds_in_another_order_makes_differently_is_known(family: Path, gpus: SimulatedGpus) -> None:
    gpus.last_bits = 2.0**-16
    for case in CASES:
        plan = plan_merge(write_recipe(family, case), family / "out")
        on_cpu, on_gpu = made(plan, ("cpu",), workers=1), made(plan, ("cuda:0",), workers=3)
        differing = {key for key, record in on_gpu.items() if record.output != on_cpu[key].output}
        known = {key for key, record in on_gpu.items() if record.device == "cuda"}
        assert known == {key for key, record in on_cpu.items() if record.device == "cpu"}, case
        assert differing <= known, case
        assert bool(known) is (case in SUMMED or case in BY_FUNCTION), case
        assert bool(differing) is (case in SUMMED), case
