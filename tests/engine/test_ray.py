"""Work on the machines of a Ray cluster: the bytes of a plain run, whatever dies meanwhile.

One start of Ray takes ten seconds, and on a busy machine it gives up after thirty, so nearly all of this is slow.
"""

from __future__ import annotations

import json
import os
import pickle
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner

from mergekit_lite import merge
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.commands import main
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.ray_cluster import TRIES, _short_folder, _start
from mergekit_lite.engine.ray_workers import LOOK_AROUND
from mergekit_lite.engine.tensor_merge import JobMerge
from mergekit_lite.errors import RunError
from mergekit_lite.merging import plan_merge
from mergekit_lite.methods import METHODS
from mergekit_lite.methods.tensor_merge import joined
from tests.answers.test_local import write_model
from tests.distill.recipes import recipe_data
from tests.models import write_folder
from tests.ray_nodes import RayNodes, end_group, processes_in, wait_for
from tests.statistics_files import write_those_of
from tests.test_golden import LARGE, RECIPES, model, shapes, write_models

TILE = {"tile": (2048, 1024)}
COMMAND = [sys.executable, "-m", "mergekit_lite"]
TIES = {
    "merge_method": "ties",
    "base_model": "base",
    "models": [{"model": name, "parameters": {"density": 0.4, "weight": 0.5}} for name in "ab"],
    "parameters": {"trim": "global"},
}
NETWORK = "10.213.77"
SPOKEN = re.compile(r"\bray(let|::)?\b", re.I)  # what Ray would say of itself


def run(place: Path, *arguments: object, expected: int = 0) -> subprocess.CompletedProcess[str]:
    """Run the command in a folder."""
    ended = subprocess.run([*COMMAND, *map(str, arguments)], cwd=place, capture_output=True, text=True, timeout=900)
    assert ended.returncode == expected, ended.stderr
    return ended


def models(place: Path, layers: int = 0) -> None:
    """Write a base, two models tuned from it, and a recipe that needs sums over all of their tensors."""
    config = {"model_type": "llama", "num_hidden_layers": max(3, layers), "torch_dtype": "bfloat16"}
    for seed, name in enumerate(("base", "a", "b")):
        tile = model(TILE, "float32", seed)["tile"]
        large = {
            f"model.layers.{layer}.mlp.{part}.weight": (tile * (1 + layer / 64)).bfloat16()
            for layer in range(layers)
            for part in ("up_proj", "down_proj")
        }
        write_folder(place / name, model(shapes(3), "bfloat16", seed) | large, shards=2, config=config)
    (place / "ties.yml").write_text(yaml.safe_dump(TIES))


def weights(output: Path) -> dict[str, bytes]:
    """Return the bytes of all files but those that tell the output's name."""
    return {path.name: path.read_bytes() for path in sorted(output.iterdir()) if path.suffix in (".safetensors", ".pt")}


@contextmanager
def running(place: Path, *arguments: object) -> Iterator[subprocess.Popen[str]]:
    """Give a command that runs in a session of its own, once it has journalled something; it ends with the context."""
    process = subprocess.Popen(
        [*COMMAND, *map(str, arguments)],
        cwd=place,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        written = lines(place)
        wait_for(lambda: process.poll() is not None or lines(place) > written + 5)
        assert process.poll() is None, process.communicate()
        yield process
    finally:
        end_group(process)
        process.communicate()


def refused(count: int, place: Path, *arguments: object) -> tuple[subprocess.CompletedProcess[str], list[str]]:
    """Run a command until so many machines were refused work: the first runs may end before they have looked around."""
    for _ in range(20):
        ended = run(place, *arguments, "--json", "--force")
        told = sorted(filter(None, (node.get("refused") for node in json.loads(ended.stdout)["nodes"])))
        if len(told) == count:
            return ended, told
    raise AssertionError(ended)


def lines(place: Path) -> int:
    """Return the lines in the journal of an output."""
    journal = place / ".out.partial" / "journal.jsonl"
    return journal.read_bytes().count(b"\n") if journal.exists() else 0


@pytest.mark.parametrize(
    ("arguments", "told"),
    [
        (("--ray", "local"), "local:N"),
        (("--ray", "local:0"), "local:N"),
        (("--ray", "somewhere"), "HOST:PORT"),
        (("--ray", "127.0.0.1:1"), "127.0.0.1:1 takes no connection"),
        (("--ray", "auto", "--device", "cuda:1"), "all GPUs"),
        (("--ray", "local:2", "--fetch-cache", "1GB"), "fetch for themselves"),
    ],
)
def test_what_is_no_cluster(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, arguments: tuple[str, ...], told: str):
    models(tmp_path)
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(main, ["merge", "ties.yml", "-o", "out", *arguments])
    assert result.exit_code == 2
    assert told in result.output
    assert not list(tmp_path.glob(".out*"))


def test_without_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    models(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    result = CliRunner().invoke(main, ["merge", "ties.yml", "-o", "out", "--ray", "local:2"])
    assert result.exit_code == 2
    assert "pip install 'mergekit-lite[ray]'" in result.output


def test_a_merge_under_way_travels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method that waits for a sum goes on elsewhere from where it stands, by what it was sent."""
    models(tmp_path)
    monkeypatch.chdir(tmp_path)
    plan = plan_merge("ties.yml", "out")
    merge = JobMerge(plan, plan.merged[0], 0, 0, plan.merged[0].numel)
    buffers, rounds = WorkerBuffers(CPU, 3, 1 << 20), 0
    with Reader() as reader:
        while merge.request is not None:
            other = pickle.loads(pickle.dumps(merge))
            assert other.request == merge.request
            total = joined(merge.sum(buffers, reader, *section) for section in merge.sections())
            merge.send(total)
            other.send(total)
            rounds += 1
    assert rounds > 1
    assert pickle.loads(pickle.dumps(merge)).merge == other.merge == merge.merge


PACKING = """
import pickle
import mergekit_lite as ml
from ray import cloudpickle

class Packing:
    'Workers in this process, who get everything as they would elsewhere; the last task first.'
    local, nodes = True, {}

    def run(self, tasks, worker, size=None):
        do = cloudpickle.loads(cloudpickle.dumps(worker))()
        for task in reversed(tasks):
            assert size is None or size(task) >= 0
            yield pickle.loads(pickle.dumps(do(pickle.loads(pickle.dumps(task)))))

results = []
for ray in (None, Packing()):
    name = "plain" if ray is None else "ray"
    ml.merge("ties.yml", name, ray=ray)
    ml.extract_vector("base", "a", f"{name}.safetensors", format="lowrank", energy=0.5, ray=ray)
    verified = ml.verify(name, samples="all", ray=ray)
    assert verified.sound and verified.recomputed, verified.findings
    results.append(repr(ml.compare("base", ["a", "b"], ray=ray).overall))
assert results[0] == results[1]
"""


def test_everything_travels(tmp_path: Path) -> None:
    """What tasks are done by can be packed, and does the same where it is unpacked."""
    models(tmp_path)
    ended = subprocess.run([sys.executable, "-c", PACKING], cwd=tmp_path, capture_output=True, text=True, timeout=900)
    assert ended.returncode == 0, ended.stderr
    assert weights(tmp_path / "ray") == weights(tmp_path / "plain")
    assert (tmp_path / "ray.safetensors").read_bytes() == (tmp_path / "plain.safetensors").read_bytes()


class Failing:
    """Ray, as far as it is started, on a machine too busy for it."""

    def __init__(self, told: str, tries: int) -> None:
        self.error, self.left, self.stopped = RuntimeError(told), tries, 0

    def init(self, **_: object) -> None:
        self.left -= 1
        if self.left >= 0:
            raise self.error

    def is_initialized(self) -> bool:
        return False

    def shutdown(self) -> None:
        self.stopped += 1


@pytest.mark.parametrize(
    "told",
    (
        "The current node timed out during startup. This could happen",
        "Timed out waiting for file /tmp/m/gcs_server_port_1",
    ),
)
def test_a_start_that_ray_gives_up(tmp_path: Path, told: str) -> None:
    """It is tried again, whichever of its processes Ray waited for; what is no wait fails at once."""
    ray = Failing(told, TRIES - 1)
    _start(ray, "local:2", 2, str(tmp_path))
    assert (ray.left, ray.stopped) == (-1, TRIES - 1)
    with pytest.raises(RunError, match=re.escape(f"Ray can't be started: {told}")):
        _start(Failing(told, TRIES), "local:2", 2, str(tmp_path))
    ray = Failing("no room", TRIES)
    with pytest.raises(RunError, match="no room"):
        _start(ray, "local:2", 2, str(tmp_path))
    assert (ray.left, ray.stopped) == (TRIES - 1, 0)


@pytest.mark.slow
def test_on_this_machine(tmp_path: Path, place_of_ray: Path) -> None:
    """The bytes are those of a plain run; Ray says nothing, and leaves no process and no file."""
    models(tmp_path)
    run(tmp_path, "merge", "ties.yml", "-o", "plain")
    ended = run(tmp_path, "merge", "ties.yml", "-o", "out", "--ray", "local:2", "--json")
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    (node,) = json.loads(ended.stdout)["nodes"]
    assert node["tasks"] > 1 and node["workers_lost"] == 0
    assert ended.stderr == ""
    wait_for(lambda: not processes_in(place_of_ray))
    assert not list(place_of_ray.glob("mergekit-lite-ray-*"))


@pytest.mark.slow
def test_interrupted_on_this_machine(tmp_path: Path, place_of_ray: Path) -> None:
    """After Ctrl-C nothing runs on, the command ends as it always does, and --resume goes on."""
    models(tmp_path, layers=30)
    run(tmp_path, "merge", "ties.yml", "-o", "plain")
    with running(tmp_path, "merge", "ties.yml", "-o", "out", "--ray", "local:2") as process:
        os.killpg(process.pid, signal.SIGINT)  # as a terminal does
        _, told = process.communicate(timeout=600)
        assert process.returncode == 1, told
        assert "--resume goes on" in told and not SPOKEN.search(told), told
        wait_for(lambda: not processes_in(place_of_ray))
    run(tmp_path, "merge", "ties.yml", "-o", "out", "--resume")
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


@pytest.mark.slow
def test_killed_on_this_machine(tmp_path: Path, place_of_ray: Path) -> None:
    """What the command started does not outlive it."""
    models(tmp_path, layers=30)
    with running(tmp_path, "merge", "ties.yml", "-o", "out", "--ray", "local:2", "-q") as process:
        assert processes_in(place_of_ray)
        process.kill()
        process.wait()
        wait_for(lambda: not processes_in(place_of_ray))


@pytest.fixture(scope="module")
def nodes() -> Iterator[RayNodes]:
    with RayNodes(3) as cluster:
        yield cluster


DRIVER = """
import os, sys
import mergekit_lite
from mergekit_lite.engine.ray_cluster import connected
address, *places = sys.argv[1:]
with connected(address) as cluster:
    for place in places:
        os.chdir(place)
        mergekit_lite.merge("recipe.yml", "ray", ray=cluster)
    assert [node.tasks > 0 for node in cluster.nodes.values()] == [True] * 3
"""


@pytest.mark.slow
def test_every_method(nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every method gives the bytes of a plain run."""
    assert METHODS.keys() <= {file.stem for file in RECIPES}
    for file in RECIPES:
        recipe = yaml.safe_load(file.read_text())
        sources = [source for part in recipe.get("slices", ()) for source in part["sources"]] + recipe.get("models", [])
        names = dict.fromkeys([recipe.get("base_model", "org/base"), *(source["model"] for source in sources)])
        layers = max([6, *(source["layer_range"][1] for source in sources if "layer_range" in source)])
        place = tmp_path / file.stem
        place.mkdir()
        monkeypatch.chdir(place)
        write_models(list(names), shapes(layers) | LARGE, "bfloat16")
        write_those_of(recipe)
        Path("recipe.yml").write_text(yaml.safe_dump(recipe, sort_keys=False))
        merge("recipe.yml", "plain")
    ended = subprocess.run(
        [sys.executable, "-c", DRIVER, nodes.address, *(str(tmp_path / file.stem) for file in RECIPES)],
        capture_output=True,
        text=True,
        timeout=900,
    )
    assert ended.returncode == 0, ended.stderr
    for file in RECIPES:
        place = tmp_path / file.stem
        assert weights(place / "ray") == weights(place / "plain"), file.stem


TOGETHER = """
import json, sys
from click.testing import CliRunner
from mergekit_lite.commands import main
ended = [CliRunner().invoke(main, arguments) for arguments in json.loads(sys.argv[1])]
print(json.dumps([(each.exit_code, each.stdout, each.stderr + repr(each.exception)) for each in ended]))
"""


def together(place: Path, *commands: Sequence[object], codes: Sequence[int] = ()) -> list[str]:
    """Run commands one after the other in one process, which imports torch and Ray once; return what they print."""
    given = json.dumps([list(map(str, arguments)) for arguments in commands])
    ended = subprocess.run([sys.executable, "-c", TOGETHER, given], cwd=place, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr
    results = json.loads(ended.stdout)
    assert [code for code, _, _ in results] == list(codes or [0] * len(commands)), results
    return [told for _, told, _ in results]


@pytest.mark.slow
def test_every_command(nodes: RayNodes, tmp_path: Path) -> None:
    """All that takes --ray gives what it gives without."""
    models(tmp_path, layers=2)
    ray = ("--ray", nodes.address)
    made = (
        ("extrapolate", "base", "a", "-a", "0.2,0.4", "--rounding", "stochastic", "-o", "{}-{{alpha}}"),
        ("vector", "extract", "base", "a", "-o", "{}-dense.safetensors"),
        ("vector", "extract", "base", "a", "--format", "lowrank", "--energy", 0.5, "-o", "{}-rank.safetensors"),
        ("vector", "apply", "base", "plain-dense.safetensors:0.5", "-o", "{}-applied.safetensors"),
    )
    plain = [[str(one).format("plain") for one in arguments] for arguments in made]
    other = [[*(str(one).format("ray") for one in arguments), *ray] for arguments in made]
    *_, compared = together(tmp_path, *plain, ("compare", "base", "a", "b", "--json"))
    *_, told, verdict = together(
        tmp_path,
        *other,
        ("compare", "base", "a", "b", "--json", *ray),
        ("verify", "ray-0.2", "--all", "--json", *ray),
    )
    for one in ("dense", "rank", "applied"):
        first, second = (tmp_path / f"{how}-{one}.safetensors" for how in ("plain", "ray"))
        assert first.read_bytes() == second.read_bytes(), one
    for alpha in ("0.2", "0.4"):
        assert weights(tmp_path / f"ray-{alpha}") == weights(tmp_path / f"plain-{alpha}")
    figures = json.loads(told)
    assert len(figures.pop("nodes")) >= 3
    assert figures == json.loads(compared)
    found = json.loads(verdict)
    assert found["sound"] and found["recomputed"]
    damaged = tmp_path / "ray-0.4" / "model-00001-of-00002.safetensors"
    content = bytearray(damaged.read_bytes())
    content[-1] ^= 1
    damaged.write_bytes(content)
    assert "not the bytes" in together(tmp_path, ("verify", "ray-0.4", *ray), codes=[1])[0]


@pytest.mark.slow
def test_a_node_killed(nodes: RayNodes, tmp_path: Path) -> None:
    """What a dead node had begun is done by others."""
    models(tmp_path, layers=40)
    run(tmp_path, "merge", "ties.yml", "-o", "plain")
    with running(tmp_path, "merge", "ties.yml", "-o", "out", "--ray", nodes.address, "--json") as process:
        nodes.kill()
        out, err = process.communicate(timeout=600)
    nodes.add()
    assert process.returncode == 0, err
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    assert sum(node["workers_lost"] for node in json.loads(out)["nodes"]) == 1
    assert re.fullmatch(r"Warning: 1 worker of \S+ \(\w+\) ended early; others did their work\.\n", err), err


@pytest.mark.slow
def test_the_head_killed(tmp_path: Path) -> None:
    """It is missed for half a minute; then a message says how to go on, and nothing waits for Ray."""
    models(tmp_path, layers=40)
    run(tmp_path, "merge", "ties.yml", "-o", "plain")
    with RayNodes(2) as own, running(tmp_path, "merge", "ties.yml", "-o", "out", "--ray", own.address, "-q") as process:
        process.send_signal(signal.SIGSTOP)  # it shall not be done before it looks for the head again
        own.kill_head()
        time.sleep(LOOK_AROUND)
        process.send_signal(signal.SIGCONT)
        _, err = process.communicate(timeout=300)
    assert process.returncode == 1
    assert re.search(rf"^Error: Ray: the head of the cluster, {own.address}, .* --resume goes on", err, re.M), err
    assert "Traceback" not in err
    run(tmp_path, "merge", "ties.yml", "-o", "out", "--resume")
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


@pytest.mark.slow
def test_the_driver_killed(nodes: RayNodes, tmp_path: Path) -> None:
    """A run goes on from elsewhere: on a cluster again, after that without one."""
    models(tmp_path, layers=40)
    run(tmp_path, "merge", "ties.yml", "-o", "plain")
    for more in ((), ("--resume",)):
        with running(tmp_path, "merge", "ties.yml", "-o", "out", "--ray", nodes.address, "-q", *more) as process:
            process.kill()
    run(tmp_path, "merge", "ties.yml", "-o", "out", "--resume")
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")


@pytest.mark.slow
def test_sampling(nodes: RayNodes, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A model that answers on the machines of a cluster gives the answers of one that answers here."""
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    write_model(tmp_path / "model")
    prompts = [{"id": str(number), "prompt": f"What is {number} and one?"} for number in range(12)]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(prompt) + "\n" for prompt in prompts))
    source = {"name": "a", "model": "./model", "samples": 2, "batch_size": 4, "device": "cpu"}
    commands = []
    for folder, how in (("plain", ()), ("ray", ("--ray", nodes.address))):
        sources = [source | {"sampling": {"max_tokens": 16}}]
        data = recipe_data(folder=folder, sources=sources, target="./model")
        (tmp_path / f"{folder}.yaml").write_text(yaml.safe_dump(data, sort_keys=False))
        commands.append(("distill", "sample", f"{folder}.yaml", *how))
    together(tmp_path, *commands)
    plain, ray = ((tmp_path / folder / "samples" / "a.jsonl").read_text() for folder in ("plain", "ray"))
    assert ray == plain
    assert plain.count("\n") == 24


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="needs namespaces")
def test_machines_that_see_other_files(tmp_path: Path) -> None:
    """A machine with another folder under the output's path, or without the inputs, gets no work and is named."""
    for name in ("in", "out"):
        (tmp_path / name).mkdir()
    models(tmp_path / "in")
    run(tmp_path / "in", "merge", "ties.yml", "-o", "plain")
    hide = "mount -t tmpfs none {}"
    with RayNodes(1) as cluster:
        cluster.join(hide.format(tmp_path / "out"))
        cluster.join(hide.format(tmp_path / "in"))
        ray = ("--ray", cluster.address)
        wait_for(lambda: cluster.alive == 3)
        ended, told = refused(2, tmp_path / "in", "merge", "ties.yml", "-o", tmp_path / "out" / "m", *ray)
        assert re.match(rf"doesn't see the input {tmp_path}/in/\w+/model-", told[0])
        assert told[1].startswith(f"doesn't see the working folder {tmp_path}/out/.m.partial, or can't write there")
        assert "was left out: it doesn't see" in ended.stderr
        assert weights(tmp_path / "out" / "m") == weights(tmp_path / "in" / "plain")


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("unshare"), reason="needs namespaces")
def test_another_version(tmp_path: Path) -> None:
    """A machine with other sources than ours gets no work, even where it is called the same version."""
    models(tmp_path)
    package = Path(__file__).parents[2] / "mergekit_lite"
    other = tmp_path / "other"
    shutil.copytree(package, other / "mergekit_lite", ignore=shutil.ignore_patterns("__pycache__"))
    with (other / "mergekit_lite" / "errors.py").open("a") as file:
        file.write("\n# changed\n")
    with RayNodes(1) as cluster:
        cluster.join(":", PYTHONPATH=str(other))
        ray = ("--ray", cluster.address)
        wait_for(lambda: cluster.alive == 2)
        ended, _ = refused(1, tmp_path, "merge", "ties.yml", "-o", "out", *ray)
        assert re.search(r"left out: it has mergekit_lite \S+ \(sources \w+, with", ended.stderr), ended.stderr


@pytest.fixture
def hosts() -> Iterator[list[str]]:
    """Two hosts in network namespaces on a bridge, by the names of their namespaces and of the wires to them."""
    names = [f"mkl-{os.getpid()}-{number}" for number in (2, 3)]
    bridge, ip = f"mkb{os.getpid()}", lambda words: subprocess.run(["ip", *words.split()], check=True)
    try:
        ip(f"link add {bridge} type bridge")
        ip(f"addr add {NETWORK}.1/24 dev {bridge}")
        ip(f"link set {bridge} up")
        for number, name in zip((2, 3), names, strict=True):
            ip(f"netns add {name}")
            ip(f"link add {name} type veth peer name eth0 netns {name}")
            ip(f"link set {name} master {bridge} up")
            ip(f"-n {name} addr add {NETWORK}.{number}/24 dev eth0")
            ip(f"-n {name} link set eth0 up")
            ip(f"-n {name} link set lo up")
        yield names
    finally:
        for name in names:
            subprocess.run(["ip", "link", "del", name], check=False)  # a namespace lives on while a socket closes
            subprocess.run(["ip", "netns", "del", name], check=False)
        subprocess.run(["ip", "link", "del", bridge], check=False)


@pytest.mark.slow
@pytest.mark.skipif(os.getuid() != 0 or not shutil.which("ip"), reason="needs network namespaces")
def test_a_host_that_is_cut_off(hosts: list[str], tmp_path: Path) -> None:
    """A host whose network fails in the middle still writes, and does no harm: others do its work again."""
    models(tmp_path, layers=40)
    run(tmp_path, "merge", "ties.yml", "-o", "plain")
    with RayNodes(1, f"{NETWORK}.1") as cluster:
        for number, name in zip((2, 3), hosts, strict=True):
            cluster.join(":", f"--node-ip-address={NETWORK}.{number}", inside=("ip", "netns", "exec", name))
            wait_for(lambda number=number: cluster.alive == number)
        ray = ("--ray", cluster.address)
        with running(tmp_path, "merge", "ties.yml", "-o", "out", *ray, "--json") as process:
            subprocess.run(["ip", "link", "set", hosts[1], "down"], check=True)
            out, err = process.communicate(timeout=900)
    assert process.returncode == 0, err
    assert weights(tmp_path / "out") == weights(tmp_path / "plain")
    told = json.loads(out)["nodes"]
    assert len(told) == 3 and sum(node["workers_lost"] for node in told) >= 1


def test_where_sockets_have_room(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their paths are short in every system, so a folder with a long name is not for them."""
    for place, chosen in {"/tmp/m12345678": "/tmp/m12345678", "/var/folders/zz/zyxvpxvq6csfxvn_n0/T": "/tmp"}.items():
        monkeypatch.setattr(tempfile, "tempdir", place)
        assert _short_folder() == chosen
