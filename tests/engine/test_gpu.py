"""The path through a GPU, on a simulated one: the CPU's bytes, and nothing that only a CPU would forgive."""

from __future__ import annotations

import json
import re
import threading
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
import xxhash
import yaml
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite import draws
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.commands import main
from mergekit_lite.engine.buffers import WorkerBuffers
from mergekit_lite.engine.devices import chosen_device, chosen_devices, explained
from mergekit_lite.engine.memory import memory_estimate, pinned_bytes
from mergekit_lite.engine.pool import Pool, Workers
from mergekit_lite.engine.run import GPU_BLOCK
from mergekit_lite.engine.schedule import Schedule
from mergekit_lite.engine.sink import Records
from mergekit_lite.engine.tiling import GRAIN
from mergekit_lite.errors import RunError, UsageError
from mergekit_lite.extrapolation import plan_extrapolation
from mergekit_lite.merging import plan_merge
from mergekit_lite.methods.registry import METHODS
from mergekit_lite.output.journal import Record
from mergekit_lite.output.workspace import OutputWorkspace
from mergekit_lite.planning import Plan
from mergekit_lite.resident.model import Built
from mergekit_lite.resident.weights import Weights
from tests.engine.simulated_gpu import SimulatedGpus, Stream
from tests.models import State, tuned, write_folder
from tests.statistics_files import write_those_of

SHAPES = {
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
    "cart": {},
    "consensus": {"lambda": 0.8},
    "dare_linear": SPARSE,
    "dare_linear density": SPARSE | {"rescale": "density"},
    "dare_ties": SPARSE,
    "della": RANKED,
    "della_linear": RANKED | {"rescale": "density"},
    "ema": {"decay": 0.7},
    "fisher": {},
    "fisher balanced": {"balance": True},
    "expo": {"alpha": 0.3},
    "expo small": {"alpha": -0.7},
    "geometric_median": {},
    "iso_c": {},
    "iso_cts": {},
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
    "regmean": {},
    "regmean_plus": {},
    "relex": {"step": [10, 20], "to_step": 50},
    "sce": {},
    "sce some": {"select_topk": 0.2},
    "sce fusechat": {"select_topk": 0.2, "variant": "fusechat"},
    "schedule_average": {"schedule": "cosine"},
    "slerp": {"t": 0.4},
    "task_arithmetic": WEIGHTS,
    "ties": SPARSE,
    "ties global": SPARSE | {"trim": "global"},
    "ties rescaled": SPARSE | {"rescale": "l1"},
    "tsv": {},
    "tsv lossless": {"lossless": True},
    "uniform_soup": {},
    "varm": {},
    "varm element": {"granularity": "element"},
    "varm warm": {"granularity": "model", "temperature": 1e-6},
    "wudi": {},
    "wise_ft": {"alpha": 0.3},
}
# What depends on sums of floats, so that a device that adds in another order gives other last bits; and what is made by
# a method's own function, which is taken to do so too.
SUMMED = {
    "arcee_fusion", "breadcrumbs_ties", "cart", "dare_linear", "dare_ties", "della", "geometric_median", "iso_c",
    "iso_cts", "karcher", "model_stock", "model_stock rows", "multislerp", "nuslerp", "nuslerp rows", "nuslerp columns",
    "relex", "sce", "sce some", "sce fusechat", "slerp", "ties rescaled", "tsv", "tsv lossless", "varm", "varm element",
    "varm warm", "wudi",
}  # fmt: skip
BY_LENGTH = {"breadcrumbs_ties", "dare_linear", "dare_ties", "della", "ties rescaled"}  # of those, by rescaling alone
BY_THREE = ("geometric_median", "sce")
# The simulated device adds in another order in sums, by the same share in all of them, and not in products of matrices:
# that cancels in "fisher balanced", and leaves "regmean" and "regmean_plus" alone.
BY_FUNCTION = {
    "consensus",
    "fisher",
    "fisher balanced",
    "magmax",
    "nearswap",
    "ram",
    "ramplus_tl",
    "regmean",
    "regmean_plus",
}


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
    numbers = {
        name: parameters.pop(name) for name in ("weight", "scale", "step") if isinstance(parameters.get(name), list)
    }
    models: list[dict[str, Any]] = [
        {
            "model": str(folder / f"tuned-{seed}"),
            "parameters": {name: list_[seed - 1] for name, list_ in numbers.items()},
        }
        for seed in range(1, 1 + min(3 if method.name in BY_THREE else 2, method.models[1] or 3))
    ]
    recipe = {"merge_method": method.name, "models": models, "parameters": parameters, "rounding": rounding}
    if method.statistics:
        for model in models:
            model["statistics"] = f"{model['model']}-{method.name}.safetensors"
        write_those_of(recipe)
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
    is_first = rounding == "nearest" and family.name.startswith("bfloat16")
    for case in CASES if is_first else METHODS:  # variants of a method once
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


def test_draws_on_two_streams_share_nothing(gpus: SimulatedGpus) -> None:
    drawn = []
    for stream in (Stream(gpus, "cuda:0"), Stream(gpus, "cuda:0")):
        with torch.cuda.stream(stream):
            drawn.append(draws.halves(1, 7, 100, "cuda:0"))
    assert not gpus.faults
    torch.cuda.synchronize()
    assert [each.tolist() for each in drawn] == [draws.halves(1, 7, 100).tolist()] * 2


def expo(family: Path, count: int = 1 << 18) -> tuple[Path, Path]:
    """Return the folders of a pair with one tensor."""
    base: State = {"w": torch.arange(count).sin().to(torch.bfloat16)}
    return write_folder(family / "sft", base), write_folder(family / "aligned", tuned(base, 1))


def test_the_effective_alpha_costs_no_upload_and_a_wait_for_each_chunk(tmp_path: Path, gpus: SimulatedGpus) -> None:
    plan = plan_extrapolation(*expo(tmp_path), tmp_path / "out", 0.3)
    [record] = made(plan, ("cuda:0",), workers=1, block=1 << 17).values()
    assert record.sums[-1] == 1 << 18  # every element was looked at
    assert gpus.uploads == [1 << 18] * 4  # two blocks of two inputs, 2 bytes an element
    assert gpus.waits <= 4  # one for the chunk's figures, one for its bytes, one at the end


def test_statistics_move_in_large_pieces(tmp_path: Path, gpus: SimulatedGpus) -> None:
    expo(tmp_path, 1 << 22)
    recipe = {"merge_method": "slerp", "base_model": str(tmp_path / "sft"), "parameters": {"t": 0.3}}
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe | {"models": [{"model": str(tmp_path / "aligned")}]}))
    plan = plan_merge(tmp_path / "r.yml", tmp_path / "out")
    on_gpu = made(plan, ("cuda:0",), workers=1, block=1 << 22)
    assert gpus.uploads == [1 << 23] * 4  # each input whole, once to be summed and once to be merged
    assert digests(on_gpu) == digests(made(plan, ("cpu",), workers=1))


def test_all_gpus_share_the_work_and_no_other_is_touched(family: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = SimulatedGpus(3)
    gpus.install(monkeypatch)
    plan = plan_merge(write_recipe(family, "dare_ties", "stochastic"), family / "out")
    on_cpu = digests(made(plan, ("cpu",), workers=1))
    assert digests(made(plan, chosen_devices("cuda:1"), workers=2)) == on_cpu
    assert gpus.contexts == {torch.device("cuda:1")}
    assert chosen_devices("cuda:all") == ("cuda:0", "cuda:1", "cuda:2")
    assert digests(made(plan, chosen_devices("cuda:all"), workers=7)) == on_cpu
    assert gpus.contexts <= {torch.device(device) for device in chosen_devices("cuda:all")}  # small: few may do it all
    assert not gpus.faults
    assert not gpus.pinned


def test_workers_are_spread_over_all_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    SimulatedGpus(3).install(monkeypatch)
    together = threading.Barrier(7)  # each worker waits in its task until all have one

    def device(buffers: WorkerBuffers, reader: Reader, task: int) -> str:
        together.wait(60)
        return buffers.device

    devices = Pool(7, chosen_devices("cuda:all"), 1, 64).run(range(7), device)
    assert Counter(devices) == {"cuda:0": 3, "cuda:1": 2, "cuda:2": 2}


@pytest.mark.parametrize("case", ["linear", "della", "model_stock rows"])
def test_pinned_memory_is_what_the_plan_says(family: Path, gpus: SimulatedGpus, case: str) -> None:
    plan = plan_merge(write_recipe(family, case), family / "out")
    made(plan, ("cuda:0",), workers=3)
    one_buffer = pinned_bytes(plan, GRAIN) // (plan.most_inputs + 1)  # a worker that ends gives them back one by one
    assert gpus.most_pinned >= pinned_bytes(plan, GRAIN) and gpus.most_pinned % one_buffer == 0
    assert gpus.most_pinned <= 3 * pinned_bytes(plan, GRAIN)  # fewer where one worker ended before another began
    told = memory_estimate(plan, 3, ("cuda:0",)) - memory_estimate(plan, 2, ("cuda:0",))
    assert told == pinned_bytes(plan, GPU_BLOCK)


def test_weights_set_in_place_are_there_for_the_default_stream(tmp_path: Path, gpus: SimulatedGpus) -> None:
    """A model's parameters are written on the workers' streams and read on the default one."""
    plan = plan_extrapolation(*expo(tmp_path, 64), tmp_path / "out", 0.3)
    [written] = made(plan, ("cpu",), workers=1).values()
    parameter = torch.zeros(8, 8, dtype=torch.bfloat16, device="cuda:0")
    for place in (parameter.view(-1), parameter.t()):  # as it lies, and with gaps
        Weights(Built(None, {"w": place}, ()), "cuda:0", threads=1).set(plan)
        shown = place.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        assert xxhash.xxh3_128_hexdigest(shown) == written.output


def test_the_page_names_the_methods_whose_last_bits_may_differ() -> None:
    page = (Path(__file__).parents[2] / "docs" / "gpu.md").read_text(encoding="utf-8")
    [paragraph] = [part for part in page.split("\n\n") if part.startswith("Sums of floats")]
    named = set(re.findall(r"`(\w+)`", paragraph)) & METHODS.keys()
    assert named == {case.partition(" ")[0] for case in SUMMED - BY_LENGTH | BY_FUNCTION}


# --- errors and resuming ----------------------------------------------------------------------------------------------


def failing_after(operations: int, error: Exception) -> Callable[[str], None]:
    """Return what a device does before each operation: after some of them it fails."""
    left = iter(range(operations))

    def before(operation: str) -> None:
        if next(left, None) is None:
            raise error

    return before


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 96.00 MiB.\nMore"), "Fewer --threads"),
        (RuntimeError("CUDA error: an illegal memory access was encountered\nCUDA kernel errors"), "illegal memory"),
        (RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"), "CUBLAS"),
    ],
)
def test_an_error_of_the_device_is_a_line_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception, said: str
) -> None:
    gpus = SimulatedGpus()
    gpus.install(monkeypatch)
    gpus.before = failing_after(5, error)
    sft, aligned = expo(tmp_path, 64)
    command = ["extrapolate", sft, aligned, "-a", 0.3, "-o", tmp_path / "out", "--device", "cuda"]
    ran = CliRunner().invoke(main, [str(argument) for argument in command])
    assert ran.exit_code == 1
    assert ran.exception is None or isinstance(ran.exception, SystemExit)
    [line] = [line for line in ran.output.splitlines() if line.startswith("Error")]
    assert "cuda:0" in line and said in line and "--device cpu" in line and "--resume" in line


def test_a_device_that_is_missing_is_a_line_with_a_remedy(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    for name in ("cuda", "cuda:1", "cuda:all"):
        with pytest.raises(UsageError, match=r"is not there: .* --device cpu needs none\.$"):
            chosen_devices(name)
    with pytest.raises(UsageError, match="this takes one device"):
        chosen_device("cuda:all")


def test_other_errors_are_not_taken_for_the_device_s(gpus: SimulatedGpus) -> None:
    with pytest.raises(RuntimeError, match="shape"), explained("cuda:0"):
        raise RuntimeError("shape mismatch")


@pytest.mark.parametrize(("case", "again"), [("ties", False), ("ties rescaled", True)])
def test_resuming_on_the_cpu_mixes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, again: bool
) -> None:
    """What a GPU finished stays where the CPU would give the same bits; else the CPU makes it again."""
    shapes = {"model.embed_tokens.weight": (48, 8)} | SHAPES
    write_family(tmp_path, torch.bfloat16, shapes)
    recipe = write_recipe(tmp_path, case)
    mergekit_lite.merge(recipe, tmp_path / "cpu", threads=1)
    gpus = SimulatedGpus(last_bits=2.0**-12)
    gpus.install(monkeypatch)
    gpus.before = failing_after(200, torch.OutOfMemoryError("CUDA out of memory."))
    with pytest.raises(RunError, match="memory"):
        mergekit_lite.merge(recipe, tmp_path / "out", device="cuda", threads=1)
    journal = (tmp_path / ".out.partial" / "journal.jsonl").read_text().splitlines()
    assert len(journal) > 1  # some tensors were finished
    writes: list[str] = []
    written = OutputWorkspace.write
    monkeypatch.setattr(
        OutputWorkspace, "write", lambda self, name, *how: (writes.append(name), written(self, name, *how))
    )
    mergekit_lite.merge(recipe, tmp_path / "out", threads=1, resume=True)
    assert (len(set(writes)) == len(shapes)) is again
    assert bytes_of(tmp_path / "out") == bytes_of(tmp_path / "cpu")


# --- verification -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["float32"], indirect=True)
@pytest.mark.parametrize(("case", "differs"), [("expo", False), ("dare_ties", True), ("slerp", True)])
def test_outputs_verify_on_the_other_kind_of_device(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, case: str, differs: bool
) -> None:
    """A difference in last bits is a note, on the kind of device that made it there is none."""
    recipe = write_recipe(family, case)
    SimulatedGpus(last_bits=2.0**-31).install(monkeypatch)
    for device in ("cpu", "cuda"):
        output = tmp_path / device
        mergekit_lite.merge(recipe, output, device=device, threads=2)
        assert json.loads((output / "mergekit_lite_manifest.json").read_text())["device"] == device
        for place in ("cpu", "cuda"):
            verdict = mergekit_lite.verify(output, samples="all", device=place)
            assert verdict.sound, verdict.findings
            assert any("made on" in note for note in verdict.notes) is (differs and place != device)


def test_what_differs_by_more_than_a_rounding_step_is_found(
    family: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    gpus = SimulatedGpus(last_bits=0.1)  # no device adds as badly as this one
    gpus.install(monkeypatch)
    mergekit_lite.merge(write_recipe(family, "dare_ties"), tmp_path / "out", device="cuda", threads=2)
    verdict = mergekit_lite.verify(tmp_path / "out", samples="all")
    assert not verdict.sound
    assert any("--device cuda makes it again" in str(finding) for finding in verdict.findings)


# --- the simulation itself --------------------------------------------------------------------------------------------


def test_the_simulation_notices_what_a_gpu_would_not_forgive(monkeypatch: pytest.MonkeyPatch) -> None:
    gpus = SimulatedGpus(2)
    gpus.install(monkeypatch)
    first, second = Stream(gpus, "cuda:0"), Stream(gpus, "cuda:0")
    host = torch.zeros(4)
    with torch.cuda.stream(first):
        one = torch.arange(4.0, device="cuda:0")
    with torch.cuda.stream(second):
        one + 1
    assert fault(gpus) == {"add: uses what another stream was not waited for"}
    first.synchronize()
    with torch.cuda.stream(second):
        one.mul_(2)
    with torch.cuda.stream(first):
        assert one.sum().item() == 12
    assert len(fault(gpus)) == 1
    second.synchronize()
    with torch.cuda.stream(second):
        one + 1
    del one
    assert fault(gpus) == {"memory given back while another stream may still use it"}
    with torch.cuda.stream(first):
        host.to("cuda:0", non_blocking=True)
    assert fault(gpus) == {"a copy that should not wait, from or to memory that is not pinned"}
    torch.cuda.cudart().cudaHostRegister(host.data_ptr(), host.nbytes, 0)
    with torch.cuda.stream(first):
        host.to("cuda:0", non_blocking=True)
        host[0] = 1
        first.synchronize()
    assert fault(gpus) == {"memory changed while a copy to the device might still read it"}
    with torch.cuda.stream(first):
        host.copy_(torch.arange(4.0, device="cuda:0"), non_blocking=True)
        assert host.view(torch.uint8).tolist() == [0xAA] * 16
        first.synchronize()
        assert host.tolist() == [0, 1, 2, 3]
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda:0") + torch.ones(2)
    with pytest.raises(RuntimeError, match="same device"):
        torch.ones(2, device="cuda:0") + torch.ones(2, device="cuda:1")


def fault(gpus: SimulatedGpus) -> set[str]:
    """Return the faults since the last look."""
    gpus.faults, found = set(), gpus.faults
    return found
