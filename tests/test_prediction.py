"""What a run is predicted to take: properties of the prediction, and its bytes and memory beside real runs."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from statistics import fmean
from types import SimpleNamespace
from typing import Any, cast

import pytest
import yaml
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite import Plan, plan_merge
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.stores.files import StorePath
from mergekit_lite.commands import main
from mergekit_lite.commands.prediction import predicted
from mergekit_lite.engine.tiling import SPAN
from mergekit_lite.layout import OutputTensor, grouped_by_size, index_json, safetensors_layout, shard_names
from mergekit_lite.methods import METHODS
from mergekit_lite.object_stores import Place
from mergekit_lite.prediction import Cluster, cluster, measured_costs, predict, predict_in_turn, this_cluster
from mergekit_lite.prediction.cluster import COPY_OUT, FETCH, MOST_CROWDED, PIECE, Way, cached, memory_at_hand
from mergekit_lite.prediction.costs import Costs
from mergekit_lite.prediction.prediction import busiest_share
from mergekit_lite.prediction.steps import BY_RAY
from tests.models import state, tuned, write_folder
from tests.statistics_files import write_those_of
from tests.test_memory import children, held

GB = 1e9
LARGE = (("model.embed_tokens.weight", (1 << 17, 8192)), ("model.norm.weight", (8192,)))
MATRICES = [(f"model.layers.{n}.mlp.up_proj.weight", (28_672, 8192)) for n in range(40)]
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"weight": 0.5},
    "slerp": {"t": 0.4},
    "karcher": {},
    "ties": {"weight": 0.5, "density": 0.5},
    "dare_ties": {"weight": 0.5, "density": 0.5},
    "expo": {"alpha": 0.3},
}


def write_holes(folder: Path, shapes: Sequence[tuple[str, tuple[int, ...]]], dtype: str = "bfloat16") -> None:
    """Write a checkpoint of headers with holes behind them: it takes no room on the disk, whatever its size."""
    tensors = [OutputTensor(name, dtype, shape) for name, shape in shapes]
    groups = grouped_by_size(tensors, 5 * 10**9)
    layout = safetensors_layout(groups, shard_names(len(groups)))
    folder.mkdir()
    for shard in layout.files:
        with (folder / shard.name).open("wb") as file:
            file.write(shard.header)
            file.truncate(shard.size)
    if len(layout.files) > 1:
        (folder / "model.safetensors.index.json").write_text(json.dumps(index_json(layout.files)))
    (folder / "config.json").write_text('{"model_type": "llama", "torch_dtype": "bfloat16"}')


def recipe(folder: Path, method: str, **parameters: object) -> Path:
    """Write a recipe for the models ``base`` and ``a``, and ``b`` where the method takes one more."""
    names = ["a"] if method in ("slerp", "expo") else ["a", "b"]
    content = {
        "merge_method": method,
        "models": [{"model": str(folder / name)} for name in names],
        "parameters": RECIPES.get(method, {}) | parameters,
        **({} if method in ("linear", "karcher") else {"base_model": str(folder / "base")}),
    }
    path = folder / f"{method}.yml"
    path.write_text(json.dumps(content))
    return path


@pytest.fixture(scope="module")
def large(tmp_path_factory: pytest.TempPathFactory) -> tuple[Plan, Costs]:
    """TIES of three models of 21 GB each, of which there are only headers, and its costs."""
    folder = tmp_path_factory.mktemp("large")
    for name in ("base", "a", "b"):
        write_holes(folder / name, [*LARGE, *MATRICES])
    plan = plan_merge(recipe(folder, "ties"), folder / "merged")
    return plan, measured_costs(plan)


def write_models(folder: Path) -> None:
    base = state(0, hidden=64, vocabulary=4096)
    write_folder(folder / "base", base)
    for seed, name in enumerate(("a", "b"), start=1):
        write_folder(folder / name, tuned(base, seed, 1e-4))


def test_more_nodes_are_never_slower_and_no_better_than_as_many_times_faster(large: tuple[Plan, Costs]) -> None:
    plan, costs = large
    kinds: list[dict[str, Any]] = [
        {"read": 2 * GB, "write": GB}, {"net": GB}, {"read": GB, "net": GB, "is_shared": True}
    ]  # fmt: skip
    for rates in kinds:
        counts = [*range(1, 20), 100, 1000]
        times = [predict(plan, Cluster(8, nodes, **rates), 8, 1.0, costs).seconds for nodes in counts]
        assert all(a >= b for a, b in pairwise(times))
        assert all(times[0] <= nodes * time * 1.001 for nodes, time in zip(counts, times, strict=True))


def test_few_files_in_a_store_keep_few_workers_busy(large: tuple[Plan, Costs]) -> None:
    """There one worker makes a whole file, so nodes beyond the files have nothing to do; spans are for all."""
    plan, costs = large
    sizes, net = [file.size for file in plan.layout.files], 0.1 * GB
    assert len(sizes) > 3
    as_many, more, alone = (
        predict(plan, Cluster(8, nodes, net=net), workers, 1.0, costs)
        for nodes, workers in ((len(sizes), 8), (10 * len(sizes), 8), (len(sizes), 1))
    )
    assert as_many.merging == pytest.approx(3 * max(sizes) / net, rel=0.02)  # it reads three models
    assert more.merging == alone.merging == as_many.merging
    slow = Costs(costs.kinds, {kind: replace(cost, points=tuple(point._replace(merging=1e-5 * point.elements)
                 for point in cost.points)) for kind, cost in costs.of_kind.items()}, 0.0, 0.0)  # fmt: skip
    assert predict(plan, Cluster(8, len(sizes), net=net), 8, 1.0, slow).limit == "files"
    assert predict(plan, Cluster(8, 1, net=net), 8, 1.0, slow).limit == "compute"
    shared = predict(plan, Cluster(8, 10 * len(sizes), net=net, is_shared=True), 8, 1.0, costs)
    assert shared.merging < more.merging / 5


@pytest.mark.parametrize("what", ["read", "write", "net", "cores", "workers"])
def test_what_is_faster_never_makes_it_slower(large: tuple[Plan, Costs], what: str) -> None:
    plan, costs = large
    times = []
    for faster in (1, 2, 3, 8, 100):
        rates: dict[str, Any] = {} if what in ("cores", "workers") else {what: 0.01 * GB * faster}
        cluster = Cluster(faster if what == "cores" else 64, **rates)
        times.append(predict(plan, cluster, faster if what == "workers" else 64, 1.0, costs).seconds)
    assert all(a >= b for a, b in pairwise(times)), times
    assert times[-1] < times[0] / 2


def test_time_is_at_least_that_of_each_resource(large: tuple[Plan, Costs]) -> None:
    plan, costs = large
    told = predict(plan, Cluster(4, 3, read=GB, write=GB), None, 1.0, costs)
    assert told.seconds >= max(told.compute, told.disk, told.net)
    assert told.from_disk >= told.read == plan.bytes_to_read and told.written == plan.bytes_to_write
    assert 1 / 3 <= told.share <= 1
    slow = predict(plan, Cluster(64, read=0.01 * GB, write=GB), None, 1.0, costs)
    assert slow.limit == "disk" and slow.seconds == pytest.approx(slow.from_disk / (0.01 * GB), rel=0.01)
    assert predict(plan, Cluster(64, net=0.01 * GB), None, 1.0, costs).limit == "net"
    assert predict(plan, Cluster(1), None, 1.0, costs).limit == "compute"


def test_a_node_is_never_given_more_where_there_are_more() -> None:
    """Random tasks; with one node it does everything, with very many the largest task is what one does."""
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw = random.Random(seed)
    for _ in range(50):
        tasks = [(draw.choice([draw.random(), 1.0]), draw.randint(1, 9)) for _ in range(draw.randint(1, 12))]
        total, most = sum(time * count for time, count in tasks), max(time for time, _ in tasks)
        shares = [busiest_share(tasks, nodes) for nodes in range(1, 40)]
        assert shares[0] == 1.0 and all(a >= b - 1e-12 for a, b in pairwise(shares))
        for nodes, share in enumerate(shares, start=1):
            assert max(1 / nodes, most / total) <= share + 1e-12 <= 1 / nodes + most / total + 2e-12
        assert busiest_share(tasks, 10**15) == pytest.approx(most / total)


def test_cores_that_move_bytes_at_once_hold_each_other_up(tmp_path: Path) -> None:
    write_models(tmp_path)
    plan = plan_merge(recipe(tmp_path, "expo"), tmp_path / "merged")
    costs = measured_costs(plan)

    def processor(workers: int, crowding: float) -> float:
        return predict(plan, Cluster(2, crowding=crowding), workers, 1.0, costs).processor

    assert processor(1, 3.0) == processor(1, 1.0)
    moving = plan.bytes_to_read * FETCH + plan.bytes_to_write * COPY_OUT
    assert processor(2, 3.0) - processor(2, 1.0) == pytest.approx(2 * moving, rel=1e-3)  # headers aside
    alone, crowded = (predict(plan, Cluster(1, crowding=by), 2, 1.0, costs).processor for by in (1.0, 3.0))
    assert crowded == alone, "one core moves all"


@pytest.mark.parametrize("at", [1, 9, 100])
def test_where_memory_at_hand_ends_is_seen_by_the_times_of_writes(at: int) -> None:
    seed = random.randrange(1 << 30)
    print("seed", seed)
    draw = random.Random(seed)

    def times(count: int, typical: float) -> list[float]:
        return [typical * draw.uniform(0.8, 1.3) for _ in range(count)]

    quick, slow = times(at, 0.3e-9), times(30, 2.3e-9)
    nbytes, more = memory_at_hand([*quick, *slow])
    assert nbytes == at * PIECE and more == pytest.approx(fmean(slow) - fmean(quick))
    nothing = (math.inf, 0.0)
    assert memory_at_hand([*quick, *times(30, 0.3e-9)]) == nothing, "all of it is at hand"
    assert memory_at_hand(slow) == nothing, "nothing of it is: that is what a write takes"
    assert memory_at_hand([*slow, *times(30, 0.3e-9)]) == nothing, "it got quicker"
    assert memory_at_hand([*times(30, 0.3e-9), 20e-9]) == nothing, "one piece waited for something else"
    assert memory_at_hand([]) == memory_at_hand(slow[:3]) == nothing


@pytest.mark.parametrize(("waiting", "directly"), [(1e-9, True), (4e-9, False)])
def test_beyond_the_memory_at_hand_the_cheaper_way_to_write_counts(waiting: float, directly: bool) -> None:
    here = Cluster(2, copy_out=0.3e-9, at_hand=1e8, from_host=2e-9, past_cache=Way(0.2e-9, waiting), buffered=1e9)
    few = here.met_by(1, 10**8)
    assert (few.copy_out, few.write_wait, few.buffered) == (pytest.approx(0.3e-9), 0, 1e8)
    many = here.met_by(1, 10**10)  # a hundredth of it at hand
    beyond = 0.2e-9 if directly else 2.3e-9
    assert many.copy_out == pytest.approx(0.01 * 0.3e-9 + 0.99 * beyond)
    assert many.write_wait == pytest.approx(0.99 * waiting if directly else 0.0)
    assert many.buffered == pytest.approx(1e8 if directly else 1e9)
    plain = replace(here, past_cache=None, from_host=0.0).met_by(1, 10**10)
    assert (plain.copy_out, plain.write_wait) == (pytest.approx(0.3e-9), 0)


def test_what_brings_tasks_to_workers_takes_time(large: tuple[Plan, Costs]) -> None:
    """For threads nothing does, processes are sent them, and Ray brings them from machine to machine."""
    plan, costs = large
    alone, apart, by_ray = (
        predict(plan, Cluster(1, nodes), workers, 1.0, costs).processor for nodes, workers in ((1, 1), (1, 2), (2, 1))
    )
    assert alone < apart < by_ray
    tasks = sum(-(-job.numel // SPAN) for job in plan.jobs if job.numel > SPAN)
    assert by_ray - apart >= 0.99 * tasks * BY_RAY


@pytest.mark.parametrize("method", RECIPES)
def test_bytes_are_those_that_the_engine_reads(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str) -> None:
    write_models(tmp_path)
    plan = plan_merge(recipe(tmp_path, method), tmp_path / "merged")
    told = predict(plan, Cluster(2))
    read = 0
    fill = Reader.fill

    def counting(self: Reader, path: Path, offset: int, out: memoryview, tensor: str) -> None:
        nonlocal read
        read += len(out)
        fill(self, path, offset, out, tensor)

    monkeypatch.setattr(Reader, "fill", counting)
    mergekit_lite.run(plan, threads=1)
    written = sum(path.stat().st_size for path in (tmp_path / "merged").glob("*.safetensors"))
    assert told.written == written
    # passes over tied sizes depend on the weights, all others don't
    tolerance = 0.1 if method == "ties" else 0.0
    assert read == pytest.approx(told.read + told.read_again, rel=tolerance)
    assert (told.read_again == 0) == (method in ("linear", "expo"))


def test_where_python_is_slower_a_run_begins_and_ends_later(large: tuple[Plan, Costs]) -> None:
    plan, costs = large
    quick, slow = (predict(plan, Cluster(2), 2, 1.0, replace(costs, step=step, importing=0.0)) for step in (1e-8, 2e-8))
    assert slow.start - 1 == pytest.approx(2 * (quick.start - 1)) and slow.finish == pytest.approx(2 * quick.finish)
    assert slow.processor > quick.processor and slow.merging >= quick.merging


def test_nothing_of_the_weights_is_read(large: tuple[Plan, Costs], monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object) -> None:
        raise AssertionError("a weight was read")

    monkeypatch.setattr(Reader, "fill", refuse)
    plan, _ = large
    told = predict(plan, Cluster(2, read=GB, write=GB))
    assert told.seconds > told.read / GB


MEASURED = [name for name, about in METHODS.items() if name != "passthrough" and about.statistics != "gram"]


@pytest.mark.parametrize("method", MEASURED)  # the time of those with Gram matrices is not predicted
def test_every_method_can_be_measured(tmp_path: Path, method: str) -> None:
    about = METHODS[method]
    count = about.models[0] if about.models[0] == about.models[1] else max(2, about.models[0])
    with_base = about.base == "required"
    names = ["base", *(f"m{number}" for number in range(count))]
    for name in names:
        write_holes(tmp_path / name, [("model.norm.weight", (8,)), ("model.layers.0.mlp.up_proj.weight", (64, 64))])
    numbers = {key: 0.5 for key, each in about.parameters.items() if each.required and key != "step"}
    steps = [{"parameters": {"step": number}} if method == "relex" else {} for number in range(1, 1 + count)]
    content = {
        "merge_method": method,
        "models": [
            {"model": str(tmp_path / name)}
            | of
            | ({"statistics": str(tmp_path / f"{name}.safetensors")} if about.statistics else {})
            for name, of in zip(names[1:], steps, strict=True)
        ],
        "parameters": numbers,
        **({"base_model": str(tmp_path / "base")} if with_base else {}),
    }
    write_those_of(content)
    (tmp_path / "r.yml").write_text(json.dumps(content))
    told = predict(plan_merge(tmp_path / "r.yml", tmp_path / "merged"), Cluster(2), started=0.0)
    assert 0 < told.seconds < 60 and told.processor > 0


@pytest.mark.parametrize("format", ["sparse", "sign", "dense", "lowrank"])
def test_what_is_added_to_a_model_can_be_measured(tmp_path: Path, format: str) -> None:
    write_models(tmp_path)
    chosen: dict[str, dict[str, Any]] = {"sparse": {"density": 0.1}, "lowrank": {"rank": 2}}
    options: Any = chosen.get(format, {})
    vector = tmp_path / "a.safetensors"
    options |= {"format": format}
    mergekit_lite.extract_vector(tmp_path / "base", tmp_path / "a", vector, **options)
    plan = mergekit_lite.plan_extrapolation(tmp_path / "b", f"{tmp_path / 'base'}+{vector}:0.5", tmp_path / "out", 0.3)
    told = predict(plan, Cluster(2), started=0.0)
    assert told.read == plan.bytes_to_read and told.compute > 0


@pytest.mark.parametrize("dtype", ["float32", "float16", "float64"])
def test_wider_elements_cost_more_bytes(tmp_path: Path, dtype: str) -> None:
    for name in ("a", "b"):
        write_holes(tmp_path / name, [("w", (1024, 256))], dtype)
    told = predict(plan_merge(recipe(tmp_path, "linear"), tmp_path / "merged"), Cluster(2), started=0.0)
    assert told.read == 2 * 1024 * 256 * {"float16": 2, "float32": 4, "float64": 8}[dtype]
    assert math.isfinite(told.seconds) and told.compute > 0


def test_readers_whose_file_is_closed_end_without_a_word(monkeypatch: pytest.MonkeyPatch) -> None:
    """As after Ctrl-C, which leaves them behind."""
    failed: list[object] = []
    monkeypatch.setattr(threading, "excepthook", failed.append)
    for closed in (ends := os.pipe()):
        os.close(closed)
    assert cluster._crowding(ends[0], 2, 1e-9) == 1.0 and not failed


def test_this_machine_is_measured_without_a_trace(tmp_path: Path) -> None:
    here = this_cluster(tmp_path / "merged")
    assert here.is_measured and here.cores >= 1 and here.copy_in > 0 and here.copy_out > 0
    assert 1 <= here.crowding <= MOST_CROWDED and this_cluster(tmp_path / "merged", workers=1).crowding == 1
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_bytes(bytes(2 * PIECE))
    there = cached([(tmp_path / "file", 2 * PIECE)])
    assert 0 <= there.share <= 1 and (there.copying is None or 0 < there.copying < 1e-6)
    half = cached([(tmp_path / "file", 2 * PIECE), (tmp_path / "missing", 2 * PIECE)])
    assert half.share == there.share / 2
    assert cached([(tmp_path / "missing", 10)]) == (0, None)


def test_a_system_without_positioned_reads_is_predicted_by_usual_times(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delattr("os.preadv")
    assert this_cluster(tmp_path / "merged") == Cluster(this_cluster(tmp_path / "merged").cores)
    (tmp_path / "file").write_bytes(bytes(10))
    assert cached([(tmp_path / "file", 10)]) == (0, None)


def test_plan_and_dry_run_tell_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    command = ["plan", str(recipe(tmp_path, "ties")), "--nodes", "4", "--cores", "8", "--disk", "2,1"]
    told = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)["prediction"]
    assert (told["nodes"], told["cores"], told["workers"]) == (4, 8, 8)
    assert told["rates"] == {"measured": False, "read": 2 * GB, "write": GB, "net": None}
    assert told["bytes"]["received"] == told["bytes"]["sent"] == 0
    text = CliRunner().invoke(main, command).stdout
    assert "on 4 nodes of 8 cores, 8 workers each; " in text and " limits" in text and "2.00 GB/s" in text
    over_net = json.loads(CliRunner().invoke(main, [*command[:2], "--net", "1.25", "--json"]).stdout)["prediction"]
    bytes_told = over_net["bytes"]
    assert bytes_told["received"] == bytes_told["read"] + bytes_told["read_again"] and bytes_told["from_disk"] == 0
    few, many = (
        json.loads(CliRunner().invoke(main, [*command[:4], "--net=1", f"--shard-size={most}", "--json"]).stdout)
        for most in ("600KB", "10KB")
    )
    assert few["prediction"]["busiest_node"] > many["prediction"]["busiest_node"]
    run = ["merge", "ties.yml", "-o", "merged", "--threads", "2", "--dry-run"]
    dry = json.loads(CliRunner().invoke(main, [*run, "--json"]).stdout)
    assert dry["prediction"]["workers"] == 2 and dry["prediction"]["memory"] == dry["memory"]
    assert dry["prediction"]["bytes"]["read"] == dry["bytes_to_read"]
    assert "on this machine" in CliRunner().invoke(main, run).stdout


def test_several_documents_are_predicted_one_after_the_other(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each that is made by itself; what one of them reads again, or another one wrote, is in the page cache."""
    write_models(tmp_path)
    monkeypatch.chdir(tmp_path)
    two = [{"model": name, "parameters": {"weight": 0.5}} for name in ("a", "b")]
    further = {"model": "twice", "parameters": {"weight": 1}}
    documents: list[dict[str, Any]] = [
        {"name": "twice", "merge_method": "linear", "models": two},
        {"name": "fused", "merge_method": "linear", "models": [*two, further]},
        {"merge_method": "task_arithmetic", "base_model": "twice", "models": [{**further, "model": "fused"}]},
    ]
    Path("r.yml").write_text("\n---\n".join(map(json.dumps, documents)))
    for command in (["plan", "r.yml"], ["merge", "r.yml", "-o", "merged", "--dry-run", "--threads", "2"]):
        told = json.loads(CliRunner().invoke(main, [*command, "--json"]).stdout)
        assert [each["fused"] for each in told["documents"]] == [False, True, False]
        first, fused, last = (each.get("prediction") for each in told["documents"])
        assert fused is None and last["seconds"]["start"] < first["seconds"]["start"]
        for key in ("seconds", "bytes"):
            for part, value in told["prediction"][key].items():
                assert value == pytest.approx(first[key][part] + last[key][part], abs=0.01)
        assert last["bytes"]["read"] == told["documents"][2]["bytes_to_read"]
        assert told["prediction"]["memory"] == max(first["memory"], last["memory"])
    assert "all documents: about" in CliRunner().invoke(main, ["plan", "r.yml"]).stdout
    elsewhere = json.loads(CliRunner().invoke(main, ["plan", "r.yml", "--nodes=2", "--disk=1", "--json"]).stdout)
    assert [each["prediction"]["nodes"] for each in elsewhere["documents"] if not each["fused"]] == [2, 2]
    assert elsewhere["prediction"]["bytes"]["from_disk"] == elsewhere["prediction"]["bytes"]["read"]


def test_what_an_earlier_plan_read_or_wrote_is_in_the_page_cache(
    large: tuple[Plan, Costs], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mergekit_lite.prediction.cluster._from_cache", lambda *_: 0)
    plan, _ = large
    roomy = Cluster(2, read=GB, write=GB, buffered=1e15, free_memory=1e15, is_measured=True)
    once, again = predict_in_turn([plan, plan], roomy, started=1.0).predictions
    assert once.from_disk == once.read and again.from_disk == 0 and again.start < once.start
    small = replace(roomy, free_memory=1e6)
    assert all(each.from_disk >= each.read for each in predict_in_turn([plan, plan], small, started=1.0).predictions)


@pytest.mark.parametrize("wrong", ["--disk=0", "--disk=1,2,3", "--net=-1", "--net=x", "--nodes=0", "--cores=0"])
def test_wrong_machines_are_wrong_usage(tmp_path: Path, wrong: str) -> None:
    path = tmp_path / "r.yml"
    path.write_text("")
    assert CliRunner().invoke(main, ["plan", str(path), wrong]).exit_code == 2


@pytest.mark.slow
@pytest.mark.parametrize(
    ("method", "dtype"), [("expo", "bfloat16"), ("ties", "bfloat16"), ("karcher", "bfloat16"), ("ties", "float32")]
)
def test_no_run_holds_more_memory_than_predicted(tmp_path: Path, method: str, dtype: str) -> None:
    shapes = [(f"model.layers.{n}.mlp.up_proj.weight", (4096, 4096)) for n in range(8)]
    shapes += [(f"model.layers.{n}.norm.weight", (4096,)) for n in range(2000)]
    for name in ("base", "a", "b"):
        write_holes(tmp_path / name, shapes, dtype)
    path = recipe(tmp_path, method)
    told = predict(plan_merge(path, tmp_path / "merged"), Cluster(2), 3)
    command = [sys.executable, "-m", "mergekit_lite", "merge", str(path), "-o", str(tmp_path / "out"), "-q"]
    most = 0
    with subprocess.Popen([*command, "--threads", "3"]) as run:
        while run.poll() is None:
            most = max(most, sum(map(held, [run.pid, *children(run.pid)])))
            time.sleep(0.03)
    assert run.returncode == 0
    assert 30e6 < most <= told.memory


def test_what_lies_elsewhere_is_not_predicted_as_if_it_were_here(tmp_path: Path) -> None:
    """With --stream a plain name of a repository is read over the network, too."""
    for path, output in ((StorePath(tmp_path), tmp_path), (tmp_path, Place("s3", "bucket", "out"))):
        source = SimpleNamespace(reference="org/name", files=[SimpleNamespace(path=path)])
        assert predicted(cast(Any, SimpleNamespace(inputs=[source], outputs=[output]))) is None


@pytest.mark.parametrize("method", ["iso_c", "tsv", "iso_cts", "cart", "wudi"])
def test_the_time_of_singular_vectors_is_not_predicted(tmp_path: Path, method: str) -> None:
    """It grows faster than a matrix, and small ones are measured: the plan says so. Where none is taken, it is told."""
    base = state(0)
    for seed, name in enumerate(("base", "a", "b")):
        write_folder(tmp_path / name, tuned(base, seed) if seed else base)
    for matrices, told in (("linear", False), ("none", True)):
        models = [{"model": str(tmp_path / name)} for name in "ab"]
        content = {"merge_method": method, "base_model": str(tmp_path / "base"), "models": models}
        (tmp_path / "r.yml").write_text(yaml.safe_dump(content | {"parameters": {"matrices": matrices}}))
        shown = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yml")])
        assert shown.exit_code == 0 and ("time is not predicted" in shown.stdout) != told
        assert ("this machine" in shown.stdout) == told
        plain = json.loads(CliRunner().invoke(main, ["plan", str(tmp_path / "r.yml"), "--json"]).stdout)
        assert ("prediction" in plain) == told and ("not_predicted" in plain) != told
