"""tinyBenchmarks: beside what the authors' function gave for made-up parameters, and pickles that are refused."""

from __future__ import annotations

import json
import pickle
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mergekit_lite.answers.tiny_benchmarks import Benchmark, convert
from mergekit_lite.commands import main
from mergekit_lite.errors import CheckpointError, UnreadableError, UsageError

# The authors' evaluate() (scipy 1.x, BFGS) for the parameters of made_up(): abilities, and IRT, p-IRT, gp-IRT.
ABILITY = [0.44033346567261844, -0.19391979430571837, 0.4140781049218176]
RELEASED = {
    "first": (0.5236898345802249, 0.5235036301959368, 0.5235594915112232),
    "second": (0.7569284065359267, 0.6578182115055156, 0.7371063675298445),
}
# The same with each part balanced, as the formula says.
BALANCED = RELEASED | {"first": (0.5236898345802249, 0.5823953343795791, 0.5647836844397729)}


def made_up() -> tuple[dict[str, Any], np.ndarray]:
    """Parameters of 400 items in two scenarios, as the authors' pickle has them, and results on a hundred."""
    rng = np.random.default_rng(5)
    a, b = rng.gamma(2, 0.5, (1, 3, 400)), rng.normal(0, 1, (1, 3, 400))
    asked = sorted(rng.choice(400, 100, replace=False).tolist())
    places = {"first": list(range(250)), "second": list(range(250, 400))}
    parts = {"first": {"x": list(range(100)), "y": list(range(100, 250))}, "second": {"z": list(range(250, 400))}}
    weights = {}
    for name, items in places.items():
        drawn = rng.random(sum(item in items for item in asked))
        weights[name] = drawn / drawn.sum()
    bench = {
        "irt_parameters": {"A": a, "B": b},
        "seen_examples": asked,
        "scenarios_position": places,
        "subscenarios_position": parts,
        "examples_weights": weights,
        "optimal_lambdas": {"first": 0.3, "second": 0.8},
    }
    return bench, (rng.random(100) < 0.6).astype(float)


@pytest.fixture
def parameters(tmp_path: Path) -> Path:
    (tmp_path / "tiny.pkl").write_bytes(pickle.dumps({"mine": made_up()[0]}))
    assert convert(tmp_path / "tiny.pkl", tmp_path / "tiny.npz") == ["mine"]
    return tmp_path / "tiny.npz"


def test_the_numbers_are_the_authors(parameters: Path) -> None:
    benchmark, results = Benchmark.read(parameters, "mine"), made_up()[1]
    assert benchmark.ability(results) == pytest.approx(ABILITY, abs=2e-6)
    for as_released, expected in ((True, RELEASED), (False, BALANCED)):
        found = benchmark.estimates(results, as_released)
        assert found.keys() == expected.keys()
        for name, each in found.items():
            assert each == pytest.approx(expected[name], abs=1e-6)


@pytest.mark.parametrize("protocol", [3, 4])
def test_arrays_of_all_kinds_are_read(protocol: int, tmp_path: Path) -> None:
    bench, results = made_up()
    a, b = bench["irt_parameters"].values()
    bench["irt_parameters"] = {"A": np.asfortranarray(a), "B": b.astype(">f8")}
    bench["seen_examples"] = np.array(bench["seen_examples"], dtype=np.int32)
    bench["optimal_lambdas"] = {name: np.float64(share) for name, share in bench["optimal_lambdas"].items()}
    (tmp_path / "x.pkl").write_bytes(pickle.dumps({"mine": bench}, protocol))
    convert(tmp_path / "x.pkl", tmp_path / "x.npz")
    found = Benchmark.read(tmp_path / "x.npz", "mine").estimates(results, as_released=True)
    assert found["second"] == pytest.approx(RELEASED["second"], abs=1e-6)


def test_the_ability_has_the_highest_likelihood(parameters: Path) -> None:
    benchmark, results = Benchmark.read(parameters, "mine"), made_up()[1]
    best = benchmark.ability(results)

    def likelihood(ability: np.ndarray) -> float:
        p = benchmark.chances(ability)[benchmark.asked]
        return float((results * np.log(p) + (1 - results) * np.log(1 - p)).sum())

    for direction in np.vstack([np.eye(3), -np.eye(3)]):
        assert likelihood(best + 1e-3 * direction) < likelihood(best)


@pytest.mark.parametrize("all_of_them", [0.0, 1.0])
def test_all_right_or_all_wrong_has_an_estimate(parameters: Path, all_of_them: float) -> None:
    for each in Benchmark.read(parameters, "mine").estimates(np.full(100, all_of_them)).values():
        assert each == pytest.approx([all_of_them] * 3, abs=0.02)


def test_wrong_results_are_refused(parameters: Path) -> None:
    benchmark = Benchmark.read(parameters, "mine")
    with pytest.raises(UsageError, match="100 items are asked, in a fixed order, and there are 3"):
        benchmark.estimates([1, 0, 1])
    with pytest.raises(UsageError, match="from 0 to 1, got 7"):
        benchmark.estimates([0.5] * 99 + [7])
    with pytest.raises(UsageError, match=r"has no benchmark 'mime'\. Did you mean 'mine'"):
        Benchmark.read(parameters, "mime")


class Evil:
    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return eval, ("__import__('pathlib').Path('ran').touch()",)


@pytest.mark.parametrize(
    ("held", "why"),
    [
        ({"mine": Evil()}, "names 'builtins.eval'"),
        ({"mine": Path("x")}, "names 'pathlib"),
        ({"mine": {}}, "irt_parameters"),
        ({"mine": made_up()[0] | {"seen_examples": np.array([{}])}}, "elements of the type 'O8'"),
        ([1], "doesn't hold"),
        ({"mine": made_up()[0] | {"examples_weights": {"first": [1.0], "second": [1.0]}}}, "first has 1 weights for"),
    ],
)
def test_other_pickles_are_refused(held: object, why: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x.pkl").write_bytes(pickle.dumps(held))
    with pytest.raises(CheckpointError, match=why):
        convert(tmp_path / "x.pkl", tmp_path / "x.npz")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "x.npz").exists()
    for content in (b"", b"no pickle"):
        (tmp_path / "x.pkl").write_bytes(content)
        with pytest.raises(CheckpointError):
            convert(tmp_path / "x.pkl", tmp_path / "x.npz")
        with pytest.raises(UnreadableError, match="estimate convert"):
            Benchmark.read(tmp_path / "x.pkl", "mine")


def test_the_commands(parameters: Path) -> None:
    results = parameters.with_name("results.txt")
    results.write_text("".join(f"{result:g}\n" for result in made_up()[1]))
    asked = ["estimate", "scores", str(parameters), "mine", str(results)]
    table = CliRunner().invoke(main, asked)
    assert table.exit_code == 0, table.output
    assert [line.split() for line in table.output.splitlines()] == [
        ["scenario", "gp-IRT", "p-IRT", "IRT"],
        ["first", "0.5648", "0.5824", "0.5237"],
        ["second", "0.7371", "0.6578", "0.7569"],
    ]
    found = json.loads(CliRunner().invoke(main, [*asked, "--as-released", "--json"]).output)
    assert found["first"]["gp_irt"] == pytest.approx(RELEASED["first"][2])
    again = CliRunner().invoke(main, ["estimate", "convert", str(parameters.with_suffix(".pkl")), str(parameters)])
    assert again.exit_code == 2 and "exists" in str(again.exception) + again.output
    nowhere = ["estimate", "convert", str(parameters.with_suffix(".pkl")), str(parameters.parent / "no" / "x.npz")]
    assert CliRunner().invoke(main, nowhere).exit_code == 1
    missing = CliRunner().invoke(main, ["estimate", "scores", "no.npz", "mine", str(results)])
    assert missing.exit_code == 1 and "no.npz: can't be read" in str(missing.exception) + missing.output
    results.write_text("1\nyes\n")
    wrong = CliRunner().invoke(main, asked)
    assert wrong.exit_code == 2 and "results.txt:2: 'yes' is no number" in str(wrong.exception) + wrong.output
