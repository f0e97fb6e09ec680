"""Merges of models with the statistics beside them: from files, held to naive second ways, verified and resumed."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file, save_file

import mergekit_lite
from mergekit_lite import PlanError, gather_statistics
from mergekit_lite.checkpoint.statistics_file import open_statistics
from mergekit_lite.commands import main
from mergekit_lite.engine.memory import memory_estimate
from mergekit_lite.output.workspace import OutputWorkspace
from mergekit_lite.yaml_document import RecipeError
from tests.gathering.models import prompts, written
from tests.models import read_folder, tree_bytes
from tests.processes import preload, run

preload("mergekit_lite.merging")
KINDS = {"regmean": "gram", "fisher": "fisher"}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two fine-tunes of two architectures, with statistics of both kinds; recipes name them by plain paths."""
    folder = tmp_path_factory.mktemp("merges")
    for architecture in ("llama", "gpt2"):
        for seed, word in enumerate(("plus", "and")):
            name = f"{architecture}-{seed}"
            written(folder / name, architecture, seed=1 + seed)
            file = prompts(folder / f"{word}.jsonl", word)
            for kind in KINDS.values():
                gather_statistics(folder / name, [file], folder / f"{name}-{kind}.safetensors", fisher=kind == "fisher")
    return folder


@pytest.fixture(autouse=True)
def here(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(place)


def recipe(method: str, architecture: str = "llama", **more: Any) -> dict[str, Any]:
    kind = KINDS[method]
    models = [{"model": f"{architecture}-{i}", "statistics": f"{architecture}-{i}-{kind}.safetensors"} for i in (0, 1)]
    return {"merge_method": method, "models": models, **more}


def merged(given: dict[str, Any], output: Path, **options: Any) -> dict[str, torch.Tensor]:
    mergekit_lite.merge(given, output, **options)
    return read_folder(output)


def expected(method: str, architecture: str, name: str, ridge: float = 1e-4) -> np.ndarray:
    """A tensor of the merge, as the formulas say, in float64."""
    models = [load_file(f"{architecture}-{i}/model.safetensors")[name].double().numpy() for i in (0, 1)]
    files = [f"{architecture}-{i}-{KINDS[method]}.safetensors" for i in (0, 1)]
    if method == "fisher":
        sure = [load_file(file)[name].double().numpy() + 1e-6 for file in files]
        return sum(f * x for f, x in zip(sure, models, strict=True)) / sum(sure)
    of_weights = open_statistics(files[0]).grams
    if name not in of_weights:
        return (models[0] + models[1]) / 2
    matrix, axis = of_weights[name]
    grams = [load_file(file)[matrix].double().numpy() for file in files]
    least = ridge * np.trace(sum(grams)) / (2 * len(grams[0])) * np.eye(len(grams[0]))
    turned = [x.T if axis == 1 else x for x in models]
    solved = np.linalg.solve(sum(grams) + 2 * least, sum((g + least) @ x for g, x in zip(grams, turned, strict=True)))
    return solved.T if axis == 1 else solved


def _mean(architecture: str, name: str) -> np.ndarray:
    return sum(load_file(f"{architecture}-{i}/model.safetensors")[name].numpy() for i in (0, 1)) / 2


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("method", KINDS)
def test_the_output_is_what_the_formula_says_and_is_sound(method: str, architecture: str, tmp_path: Path) -> None:
    out = merged(recipe(method, architecture), tmp_path / "out")
    for name, values in out.items():
        np.testing.assert_allclose(values, expected(method, architecture, name), rtol=1e-4, atol=1e-5)
    means = {name: _mean(architecture, name) for name in out}
    assert sum(not np.allclose(out[name], mean, atol=1e-6) for name, mean in means.items()) > 5
    verification = mergekit_lite.verify(tmp_path / "out", samples="all")
    assert verification.sound, verification.findings


@pytest.mark.parametrize("method", KINDS)
def test_workers_change_no_byte(method: str, tmp_path: Path) -> None:
    trees = []
    for threads in (1, 3):
        merged(recipe(method), tmp_path / str(threads) / "out", threads=threads)
        trees.append(tree_bytes(tmp_path / str(threads) / "out"))
    assert trees[0] == trees[1]


def test_balance_reads_the_whole_model_first(tmp_path: Path) -> None:
    balanced = merged(recipe("fisher", parameters={"balance": True}), tmp_path / "balanced")
    assert mergekit_lite.verify(tmp_path / "balanced").sound
    models = [load_file(f"llama-{i}/model.safetensors") for i in (0, 1)]
    beside = [load_file(f"llama-{i}-fisher.safetensors") for i in (0, 1)]
    in_memory = mergekit_lite.merge_states("fisher", None, models, statistics=beside, balance=True)
    for name, values in balanced.items():
        np.testing.assert_allclose(values, in_memory[name], rtol=1e-6, atol=1e-7)


def kill_after_five() -> None:
    """Let this process be killed when it has journalled five spans."""
    done, left = OutputWorkspace.done, [5]

    def done_or_killed(self: OutputWorkspace, record: Any) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        done(self, record)

    OutputWorkspace.done = done_or_killed  # type: ignore[method-assign]


@pytest.mark.parametrize("method", ["regmean", pytest.param("fisher", marks=pytest.mark.slow)])
def test_a_killed_merge_is_resumed(method: str, place: Path, tmp_path: Path) -> None:
    (place / f"{method}.yml").write_text(yaml.safe_dump(recipe(method)))
    words = ("merge", f"{method}.yml", "-o")
    assert run(place, *words, tmp_path / "whole" / "out").returncode == 0
    assert run(place, *words, tmp_path / "killed" / "out", before=kill_after_five).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed" / "out").exists()
    resumed = run(place, *words, tmp_path / "killed" / "out", "--resume")
    assert resumed.returncode == 0, resumed.stderr
    assert tree_bytes(tmp_path / "killed" / "out") == tree_bytes(tmp_path / "whole" / "out")


def test_statistics_are_held_to_their_model(tmp_path: Path) -> None:
    written(tmp_path / "other", seed=5)
    shutil.copytree("llama-0", tmp_path / "renamed")
    header = Path("llama-0-gram.safetensors").read_bytes()
    (tmp_path / "cut.safetensors").write_bytes(header[:-1])
    (tmp_path / "forged.safetensors").write_bytes(header.replace(b'\\"version\\": 1', b'\\"version\\": 9'))
    second = {"model": "llama-1", "statistics": "llama-1-gram.safetensors"}

    def problem(model: Path | str, statistics: Path | str | None, method: str = "regmean") -> str:
        first = {"model": str(model)} | ({"statistics": str(statistics)} if statistics is not None else {})
        with pytest.raises((PlanError, RecipeError)) as raised:
            mergekit_lite.plan_merge({"merge_method": method, "models": [first, second]}, "out")
        return str(raised.value)

    assert "whose weights are not those of" in problem(tmp_path / "other", "llama-0-gram.safetensors")
    assert "whose tensors are not those of" in problem("llama-0", "gpt2-0-gram.safetensors")
    assert "holds Fisher information, and the recipe needs Gram matrices" in problem(
        "llama-0", "llama-0-fisher.safetensors"
    )
    assert "holds Gram matrices, and the recipe needs Fisher information: collect them with --fisher" in problem(
        "llama-0", "llama-0-gram.safetensors", "fisher"
    )
    assert "is no file" in problem("llama-0", "nowhere.safetensors")
    assert "holds no statistics" in problem("llama-0", "llama-0/model.safetensors")
    assert "cut short" in problem("llama-0", tmp_path / "cut.safetensors") or "take" in problem(
        "llama-0", tmp_path / "cut.safetensors"
    )
    assert "doesn't describe statistics as expected" in problem("llama-0", tmp_path / "forged.safetensors")
    assert "regmean needs the 'statistics' of 'llama-0'" in problem("llama-0", None)
    first = {"model": str(tmp_path / "renamed"), "statistics": "llama-0-gram.safetensors"}
    mergekit_lite.plan_merge({"merge_method": "regmean", "models": [first, second]}, "out")


def test_a_plan_tells_bytes_and_memory() -> None:
    plans = {method: mergekit_lite.plan_merge(recipe(method), "out") for method in KINDS}
    weights = sum(Path(f"llama-{i}/model.safetensors").stat().st_size for i in (0, 1))
    assert plans["fisher"].bytes_to_read == pytest.approx(2 * weights, rel=0.1)
    grams = sum(job.grams[0].numel * 4 * 2 for job in plans["regmean"].jobs if job.grams)
    assert plans["regmean"].bytes_to_read == pytest.approx(weights + grams, rel=0.1)
    files = {spec.file for job in plans["regmean"].jobs for spec in job.grams}
    assert all(file.is_absolute() for file in files)  # workers elsewhere have other working folders
    assert memory_estimate(plans["regmean"], 2) > memory_estimate(plans["regmean"], 1)
    assert [each.reference for each in plans["regmean"].inputs[-2:]] == [f"llama-{i}-gram.safetensors" for i in (0, 1)]


def test_other_methods_and_filters_stand_beside(tmp_path: Path) -> None:
    """Some tensors by another method, and some copied; statistics without a use are noted."""
    more = {
        "overrides": [{"filter": "mlp", "merge_method": "linear", "parameters": {"weight": 1}}],
        "exclude": ["norm"],
    }
    out = merged(recipe("regmean", **more), tmp_path / "out")
    for name, values in out.items():
        wanted = _mean("llama", name) if "mlp" in name else expected("regmean", "llama", name)
        if "norm" in name:
            wanted = load_file("llama-0/model.safetensors")[name]
        np.testing.assert_allclose(values, wanted, rtol=1e-4, atol=1e-5)
    linear = recipe("regmean") | {"merge_method": "linear", "parameters": {"weight": 1}}
    assert any("reads no statistics" in note for note in mergekit_lite.plan_merge(linear, "out").notes)


def test_statistics_follow_a_model_under_other_names(tmp_path: Path) -> None:
    tensors = load_file("llama-1/model.safetensors")
    wrapped = shutil.copytree("llama-1", tmp_path / "wrapped")
    save_file({f"_orig_mod.{name}": values for name, values in tensors.items()}, wrapped / "model.safetensors")
    for method, kind in KINDS.items():
        file = tmp_path / f"{kind}.safetensors"
        gather_statistics(wrapped, ["and.jsonl"], file, fisher=kind == "fisher")
        given = recipe(method)
        given["models"][1] = {"model": str(wrapped), "statistics": str(file)}
        out, plain = merged(given, tmp_path / method), merged(recipe(method), tmp_path / f"plain-{method}")
        assert all(torch.equal(out[name], values) for name, values in plain.items())


def test_a_damaged_matrix_stops_the_merge(tmp_path: Path) -> None:
    tensors = load_file("llama-0-gram.safetensors")
    damaged = bytearray(Path("llama-0-gram.safetensors").read_bytes())
    damaged[-4:] = np.float32(np.nan).tobytes()
    (tmp_path / "damaged.safetensors").write_bytes(damaged)
    given = recipe("regmean")
    given["models"][0]["statistics"] = str(tmp_path / "damaged.safetensors")
    with pytest.raises(mergekit_lite.RunError, match=r"a Gram matrix holds NaN or infinity"):
        mergekit_lite.merge(given, tmp_path / "out")
    assert len(tensors) == 9
    assert not (tmp_path / "out").exists()


def test_verification_finds_statistics_that_changed_or_moved(tmp_path: Path) -> None:
    for i in (0, 1):
        shutil.copy(f"llama-{i}-gram.safetensors", tmp_path / f"{i}.safetensors")
    given = recipe("regmean")
    for i, model in enumerate(given["models"]):
        model["statistics"] = str(tmp_path / f"{i}.safetensors")
    mergekit_lite.merge(given, tmp_path / "out")
    moved = (tmp_path / "0.safetensors").rename(tmp_path / "moved.safetensors")
    assert mergekit_lite.verify(
        tmp_path / "out", samples="all", inputs={str(tmp_path / "0.safetensors"): str(moved)}
    ).sound
    content = bytearray(moved.read_bytes())
    content[-5000:-4000] = bytes(1000)
    moved.rename(tmp_path / "0.safetensors").write_bytes(content)
    assert not mergekit_lite.verify(tmp_path / "out", samples="all").sound


def test_what_commands_tell(tmp_path: Path) -> None:
    """What a file holds, and which tensors a plan only averages."""
    told = CliRunner().invoke(main, ["inspect", "llama-0-gram.safetensors", "--json"])
    assert json.loads(told.stdout)["statistics"] == "Gram matrices"
    assert "Fisher information" in CliRunner().invoke(main, ["inspect", "llama-0-fisher.safetensors"]).stdout
    (tmp_path / "r.yml").write_text(yaml.safe_dump(recipe("regmean")))
    shown = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yml"), "--json"])
    assert shown.exit_code == 0, shown.output
    shown = CliRunner().invoke(main, ["plan", str(tmp_path / "r.yml")])
    assert re.search(r"15 .*regmean weight 1, non_diagonal 1, ridge 0.0001 ", shown.stdout)
    assert re.search(r"6 .*regmean weight 1, non_diagonal 1, ridge 0.0001, no statistics: averaged", shown.stdout)
