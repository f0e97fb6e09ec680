"""``extrapolate`` on a training run: from files as in memory, several targets at once, resumed, and what it says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result

import mergekit_lite
from mergekit_lite.boosting.candidates.family import RecipeFamily
from mergekit_lite.boosting.candidates.tunable import parse
from mergekit_lite.commands import main
from mergekit_lite.engine import tensor_merge, tiling
from mergekit_lite.engine.memory import memory_estimate
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.methods import merge_states
from mergekit_lite.training_runs import steps_of
from tests.models import State, read_folder, same_bytes, state, tree_bytes, write_folder

STEPS = (20, 25, 75)
TARGETS = (100.0, 2_000_000.0)


def checkpoint(step: int, noise: float) -> State:
    """Return what a run that began with ``state(0)`` had at a step."""
    base = state(0)
    ways, draws = torch.Generator().manual_seed(1), torch.Generator().manual_seed(step)
    moved = {
        name: tensor.float()
        + torch.randn(tensor.shape, generator=ways) * step * 1e-4
        + torch.randn(tensor.shape, generator=draws) * noise
        for name, tensor in base.items()
    }
    return {name: tensor.to(base[name].dtype) for name, tensor in moved.items()}


@pytest.fixture(autouse=True)
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    write_folder(Path("base"), state(0))
    for step in STEPS:
        write_folder(Path(f"run/step-{step}"), checkpoint(step, 3e-4))


def command(*arguments: object) -> Result:
    return CliRunner().invoke(main, ["extrapolate", *map(str, arguments)])


def in_memory(target: float) -> State:
    models = [read_folder(Path(f"run/step-{step}")) for step in STEPS]
    return merge_states("relex", read_folder(Path("base")), models, step=list(STEPS), to_step=target)


@pytest.mark.parametrize("large", [None, 16], ids=["by one worker", "by all workers"])
def test_several_targets_from_one_pass_each_as_in_memory(large: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    """Statistics are gathered once for all targets, be it by the worker of a tensor or by all of them."""
    asked: list[str] = []
    of_section = tensor_merge.JobMerge.sum

    def counted(merge: tensor_merge.JobMerge, *arguments: Any) -> Any:
        asked.append(merge.job.name)
        return of_section(merge, *arguments)

    monkeypatch.setattr(tensor_merge.JobMerge, "sum", counted)
    if large is not None:
        monkeypatch.setattr(tensor_merge, "LARGE", large)
    finished = mergekit_lite.extrapolate_run("base", "run/step-*", "to-{step}", TARGETS, threads=1)
    assert [str(output) for output in finished.outputs] == ["to-100", "to-2000000"]
    assert sorted(asked) == sorted(state(0))
    for output, target in zip(finished.outputs, TARGETS, strict=True):
        merged, expected = read_folder(Path(output)), in_memory(target)
        assert all(same_bytes(merged[name], expected[name]) for name in expected)


def test_every_way_to_name_a_run_is_the_same(tmp_path: Path) -> None:
    paths = [f"run/step-{step}" for step in STEPS]
    ways = {
        "folder": ["run"],
        "pattern": ["run/step-*"],
        "paths": paths[::-1],
        "steps": [*paths, "--steps", "20,25,75"],
    }
    for name, how in ways.items():
        result = command("base", *how, "--to-step", 100, "-o", name)
        assert result.exit_code == 0, result.output
    recipe = {
        "merge_method": "relex",
        "base_model": "base",
        "models": [{"model": path, "parameters": {"step": step}} for path, step in zip(paths, STEPS, strict=True)],
        "parameters": {"to_step": 100},
    }
    mergekit_lite.merge(recipe, "recipe")
    expected = in_memory(100)
    for name in (*ways, "recipe"):
        merged = read_folder(Path(name))
        assert all(same_bytes(merged[key], tensor) for key, tensor in expected.items()), name
        assert mergekit_lite.verify(name).sound


def test_goes_on_where_it_was_stopped() -> None:
    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        mergekit_lite.extrapolate_run("base", "run", "to-{step}", TARGETS, threads=1, progress=stop)
    mergekit_lite.extrapolate_run("base", "run", "to-{step}", TARGETS, threads=2, resume=True)
    finished = mergekit_lite.extrapolate_run("base", "run", "whole-{step}", TARGETS, threads=1)
    for target in ("100", "2000000"):
        weights = {name: data for name, data in tree_bytes(Path(f"to-{target}")).items() if "safetensors" in name}
        assert weights == {name: tree_bytes(Path(f"whole-{target}"))[name] for name in weights}
        manifests = [json.loads(Path(f"{name}-{target}/mergekit_lite_manifest.json").read_text()) for name in
                     ("to", "whole")]  # fmt: skip
        assert manifests[0]["effect"] == manifests[1]["effect"]
    told = finished.reports[0].explained
    assert told is not None and manifests[0]["effect"]["explained"]["share"] == told.share


def test_share_is_told_and_a_low_one_warned_of() -> None:
    result = command("base", "run", "--to-step", 100, "-o", "out", "--json")
    told = json.loads(result.stdout)["outputs"][0]["explained"]
    assert told["tensors"].keys() == state(0).keys()
    assert told["bound"] < told["share"] < 1 and min(told["tensors"].values()) < told["share"]
    assert "Warning" not in result.stderr
    for step in STEPS:
        write_folder(Path(f"noise/step-{step}"), checkpoint(step, 0.1))
    result = command("base", "noise", "--to-step", 100, "-o", "away")
    assert "below that: 9 tensors of 9" in result.stdout
    assert "Warning: one line explains" in result.stderr and "mostly noise" in result.stderr


def test_a_run_that_changed_nothing_is_the_base() -> None:
    for step in (1, 2):
        write_folder(Path(f"same/step-{step}"), state(0))
    result = command("base", "same", "--to-step", 100, "-o", "out")
    assert "don't differ from the base" in result.stdout and "Warning" not in result.stderr
    assert all(same_bytes(tensor, state(0)[name]) for name, tensor in read_folder(Path("out")).items())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["run"], "Give --alpha"),
        (["run/step-20", "run/step-25", "-a", "1"], "with --alpha there is one ALIGNED"),
        (["run/step-20", "-a", "1", "--steps", "3"], "with --alpha there is one ALIGNED"),
        (["run", "--to-step", "9"], "needs -o"),
        (
            ["run", "--to-step", "9", "-a", "1", "--new-rows", "copy", "-o", "x"],
            "--alpha, --new-rows can't be combined",
        ),
        (["run", "--to-step", "9,10", "-o", "x"], "put {step} in the name"),
        (["run", "--to-step", "9,9", "-o", "x"], "The same step was given twice"),
        (["run", "--to-step", "9", "--steps", "1,2", "-o", "x"], "a step for each of the 3 checkpoints, got 2"),
        (["run", "--to-step", "9", "--steps", "1,2,2", "-o", "x"], "Two checkpoints have step 2"),
        (["run", "--to-step", "-1", "-o", "x"], "to_step: expected a number from 0 on"),
        (["base", "--to-step", "9", "-o", "x"], "holds no checkpoints, such as step-500"),
        (["no-*", "--to-step", "9", "-o", "x"], "matches no file or folder"),
        (["nowhere", "--to-step", "9", "-o", "x"], "is no folder, and no pattern"),
        (["run/step-20", "base", "--to-step", "9", "-o", "x"], "don't tell a step"),
        (["run/step-20", "run/epoch-2", "--to-step", "9", "-o", "x"], "count different things"),
        (["run/step-20", "--to-step", "9", "--steps", "1", "-o", "x"], "such as step-500"),
    ],
)
def test_wrong_usage(arguments: list[str], message: str) -> None:
    result = command("base", *arguments)
    assert result.exit_code in (1, 2) and message in result.stderr, result.output
    assert not Path("x").exists()


def test_steps_in_names() -> None:
    for name, step in {
        "a/checkpoint-500": 500,
        "global_step75/actor": 75,
        "org/RLVR@step_40": 40,
        "iter_0001000": 1000,
        "epoch=3-step=1500.ckpt": 1500,
        "step-2-dpo/step-9.safetensors": 9,
    }.items():
        assert steps_of([name]) == [step]
    for name in ("qwen-7", "step-3/run/model", "steps"):
        with pytest.raises(UsageError):
            steps_of([name])


def test_two_checkpoints_of_one_step_are_refused() -> None:
    write_folder(Path("run/step_25"), state(0))
    with pytest.raises(MergekitLiteError, match="checkpoints of the same step"):
        mergekit_lite.extrapolate_run("base", "run", "x", 100)


# --- runs in recipes --------------------------------------------------------------------------------------------------


def test_a_run_in_a_recipe_is_its_checkpoints_by_name() -> None:
    """The manifest names those that were found, so that a run that goes on changes nothing of what was made."""
    recipe = {"merge_method": "relex", "base_model": "base", "models": [{"run": "run/step-*"}]}
    mergekit_lite.merge(recipe | {"parameters": {"to_step": 100}}, "out")
    assert all(same_bytes(tensor, in_memory(100)[name]) for name, tensor in read_folder(Path("out")).items())
    write_folder(Path("run/step-100"), state(0))
    assert mergekit_lite.verify("out").sound

    average = {"merge_method": "schedule_average", "models": [{"run": "run", "last": 2}]}
    plan = mergekit_lite.plan_merge(average, "average")
    assert [source.reference for source in plan.inputs] == ["run/step-75", "run/step-100"]


def test_boost_tunes_the_step_to_go_on_to() -> None:
    recipe = {
        "merge_method": "relex",
        "base_model": "base",
        "models": [{"run": "run"}],
        "parameters": {"to_step": 75},
    }
    Path("relex.yml").write_text(json.dumps(recipe))
    family = RecipeFamily(Path("relex.yml"), parse(["parameters.to_step=75:1000"]))
    assert family.baseline == {"parameters.to_step": 75}
    write_folder(Path("run/step-100"), state(0))  # the run goes on meanwhile
    mergekit_lite.run(family.plan({"parameters.to_step": 100}, Path("candidate")))
    assert all(same_bytes(tensor, in_memory(100)[name]) for name, tensor in read_folder(Path("candidate")).items())


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"run": "run", "last": 9}, "has 3 checkpoints, 'last' asks for 9"),
        ({"run": "run", "last": 0}, "'last' expects"),
        ({"run": "nowhere-*"}, "matches no file or folder"),
        ({"run": "run", "model": "base"}, "unknown key 'model'"),
        ({"run": 3}, "'run' expects text"),
    ],
)
def test_wrong_runs_in_recipes(entry: dict[str, Any], message: str) -> None:
    with pytest.raises(MergekitLiteError, match=message):
        mergekit_lite.plan_merge({"merge_method": "schedule_average", "models": [entry]}, "out")


# --- many checkpoints -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_many_checkpoints_are_read_in_shorter_chunks_to_the_same_bits(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Buffers don't grow with the number of models beyond a bound; sums are added in the same order."""
    count, shape = 3, (1200, 1000)
    draws = torch.Generator().manual_seed(3)
    base = {"w": torch.randn(shape, generator=draws).to(dtype)}
    write_folder(Path("start"), base)
    for step in range(count):
        write_folder(
            Path(f"many/step-{step}"),
            {"w": (base["w"] + (step + 1) * 1e-2 * torch.randn(shape, generator=draws)).to(dtype)},
        )
    mergekit_lite.extrapolate_run("start", "many", "whole", 100)
    monkeypatch.setattr(tiling, "BUFFERS", 1 << 16)
    plan = mergekit_lite.plan_run_extrapolation("start", "many", "short", 100)
    assert tiling.longest_chunk(plan) == tiling.SHORTEST < tiling.CHUNK
    mergekit_lite.run(plan)
    assert tree_bytes(Path("whole"))["model.safetensors"] == tree_bytes(Path("short"))["model.safetensors"]


def test_memory_does_not_grow_with_the_number_of_checkpoints() -> None:
    for step in range(50):
        write_folder(Path(f"long/step-{step}"), state(step))
    recipe = {"merge_method": "schedule_average", "models": [{"run": "long"}], "parameters": {"schedule": "cosine"}}
    plan = mergekit_lite.plan_merge(recipe, "out")
    assert (plan.most_inputs + 1) * plan.widest_element * tiling.longest_chunk(plan) <= tiling.BUFFERS
    assert memory_estimate(plan, 3) < 300e6
    mergekit_lite.run(plan)
    models = [state(step) for step in range(50)]
    expected = merge_states("schedule_average", None, models, schedule="cosine")
    assert all(same_bytes(tensor, expected[name]) for name, tensor in read_folder(Path("out")).items())
