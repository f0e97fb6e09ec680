"""Recipes on the streaming engine: the tensors they give in memory, whatever threads and blocks; and whole folders."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from safetensors.torch import load_file

import mergekit_lite
from mergekit_lite.engine import tiling
from mergekit_lite.errors import MergekitLiteError, PlanError
from mergekit_lite.methods import METHODS, Method
from tests.models import State, read_folder, same_bytes, state, tree_bytes, tuned, write_folder
from tests.processes import run
from tests.statistics_files import write_those_of

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
# What can't be left at a value that suits every parameter of the name.
STEPS = [100.0, 250.0, 300.0]  # of the checkpoints, for methods along a run
VALUES = {
    "to_step": 1000.0,
    "weight": 0.5,
    "t": 0.4,
    "alpha": 0.3,
    "density": 0.6,
    "scale": 1.5,
    "decay": 0.5,
    "epsilon": 0.1,
    "select_topk": 0.5,
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and three tuned models, one tensor of them larger than a chunk."""
    folder = tmp_path_factory.mktemp("merge")
    base = state(0, hidden=32) | {"model.layers.0.mlp.down_proj.weight": torch.randn(1501, 1100).mul(0.02).bfloat16()}
    write_folder(folder / "base", base, config=CONFIG)
    for number in (1, 2, 3):
        write_folder(folder / f"m{number}", tuned(base, number, rms=1e-3 * number), shards=number, config=CONFIG)
    return folder


def recipe_for(method: Method, place: Path) -> tuple[dict[str, Any], dict[str, Any], int]:
    """A recipe of a method, its parameters, and how many models it merges."""
    least, most = method.models
    count = min(3, most or 3) if least <= 3 else least
    parameters = {name: VALUES[name] for name, p in method.parameters.items() if p.required and name != "step"}
    if "density" in method.parameters:
        parameters["density"] = VALUES["density"]
    models: list[dict[str, Any]] = [{"model": str(place / f"m{number + 1}")} for number in range(count)]
    if "step" in method.parameters:
        models = [model | {"parameters": {"step": step}} for model, step in zip(models, STEPS, strict=True)]
    recipe: dict[str, Any] = {"merge_method": method.name, "models": models, "parameters": parameters, "seed": 3}
    if method.base == "required":
        recipe["base_model"] = str(place / "base")
    return recipe, parameters, count


def merged(recipe: dict[str, Any], output: Path, **how: Any) -> State:
    path = output.with_suffix(".yml")
    path.write_text(yaml.safe_dump(recipe))
    mergekit_lite.merge(path, output, **how)
    return read_folder(output)


VARIANTS = [(name, {}) for name in sorted(METHODS)] + [
    ("ties", {"trim": "global"}),
    ("breadcrumbs", {"trim": "global"}),
    ("varm", {"granularity": "layer"}),
    ("varm", {"granularity": "model"}),
    ("varm", {"granularity": "element"}),
    ("sce", {"variant": "fusechat", "select_topk": 0.3}),
    ("sce", {"variant": "paper", "select_topk": 0.3}),
    ("model_stock", {"filter_wise": True}),
    ("nuslerp", {"nuslerp_flatten": False}),
]


@pytest.mark.parametrize("processes", [False, True])
@pytest.mark.parametrize("method", ["ties", "linear"])
def test_how_the_work_is_cut_changes_no_byte(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, processes: bool
) -> None:
    """Also of tensors that are copied, and of those of several spans, whose statistics one worker gathers."""
    base = state(0)
    for seed, name in enumerate(("base", "one", "two")):
        write_folder(tmp_path / name, tuned(base, seed), shards=2)
    density = "density: 0.5, " if method == "ties" else ""
    (tmp_path / "r.yml").write_text(
        f"{{merge_method: {method}, base_model: base, models: [{{model: one}}, {{model: two}}], "
        f"parameters: {{{density}weight: 0.5}}, exclude: [embed_tokens]}}"
    )
    monkeypatch.chdir(tmp_path)
    outputs = []
    for number, (span, task, tasks) in enumerate([(1 << 23, 1 << 20, 256), (32, 1 << 20, 1), (32, 0, 256), (8, 40, 1)]):
        monkeypatch.setattr(tiling, "SPAN", span)
        monkeypatch.setattr(tiling, "TASK", task)
        monkeypatch.setattr(tiling, "TASKS", tasks)
        mergekit_lite.merge("r.yml", f"out-{number}", threads=3, processes=processes)
        outputs.append(read_folder(tmp_path / f"out-{number}"))
    for other in outputs[1:]:
        assert other.keys() == base.keys() and all(same_bytes(other[name], outputs[0][name]) for name in base)


@pytest.mark.parametrize(("name", "more"), VARIANTS)
def test_every_method_streams_to_what_it_gives_in_memory(
    name: str, more: dict[str, Any], place: Path, tmp_path: Path
) -> None:
    method = METHODS[name]
    recipe, parameters, count = recipe_for(method, place)
    parameters |= more
    steps: dict[str, Any] = {"step": STEPS} if "step" in method.parameters else {}
    for model in recipe["models"] if method.statistics else ():
        model["statistics"] = str(tmp_path / f"{Path(model['model']).name}.safetensors")
    write_those_of(recipe)
    if method.statistics:
        beside = [load_file(model["statistics"]) for model in recipe["models"]]
        steps["statistics"] = [{n.replace(".gram", ".weight"): part for n, part in own.items()} for own in beside]
    got = merged(recipe, tmp_path / "one", threads=1)
    again = merged(recipe, tmp_path / "five", threads=5, block=1 << 16)
    assert all(same_bytes(got[tensor], again[tensor]) for tensor in got)
    base = read_folder(place / "base") if method.base == "required" else None
    models = [read_folder(place / f"m{number + 1}") for number in range(count)]
    plan = mergekit_lite.plan_merge(tmp_path / "one.yml", tmp_path / "unused")
    order = [job.name for job in plan.jobs]
    states = [{tensor: state[tensor] for tensor in order} for state in ([base] if base else []) + models]
    expected = mergekit_lite.methods.merge_states(
        name, states[0] if base else None, states[len(states) - count :], seed=3, **parameters, **steps
    )
    assert got.keys() == expected.keys()
    for tensor in got:
        assert same_bytes(got[tensor], expected[tensor]), tensor


def test_expo_as_a_recipe_is_extrapolate(place: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "expo",
        "base_model": str(place / "base"),
        "models": [{"model": str(place / "m1")}],
        "parameters": {"alpha": 0.3},
    }
    (place / "m1" / "tokenizer.json").write_text("{}")
    got = merged(recipe, tmp_path / "recipe")
    assert (tmp_path / "recipe" / "tokenizer.json").exists()
    mergekit_lite.extrapolate(place / "base", place / "m1", tmp_path / "command", 0.3)
    command = read_folder(tmp_path / "command")
    assert all(same_bytes(got[tensor], command[tensor]) for tensor in command)


def test_gradients_filters_overrides_and_exclusions(place: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "linear",
        "models": [
            {"model": str(place / "m1"), "parameters": {"weight": [0.0, 1.0]}},
            {"model": str(place / "m2"), "parameters": {"weight": [{"filter": "mlp", "value": 3.0}, {"value": 1.0}]}},
        ],
        "exclude": ["lm_head"],
        "overrides": [{"filter": "norm", "merge_method": "passthrough"}],
    }
    with pytest.raises(MergekitLiteError, match="passthrough"):
        merged(recipe, tmp_path / "wrong")
    recipe["overrides"] = [{"filter": "norm", "parameters": {"weight": 1.0}}]
    got = merged(recipe, tmp_path / "out")
    a, b = read_folder(place / "m1"), read_folder(place / "m2")
    name = "model.layers.1.mlp.up_proj.weight"
    torch.testing.assert_close(got[name].double(), (a[name].double() + 3 * b[name].double()) / 4, rtol=2**-8, atol=0)
    assert same_bytes(got["model.layers.0.self_attn.q_proj.weight"], b["model.layers.0.self_attn.q_proj.weight"])
    assert same_bytes(got["lm_head.weight"], a["lm_head.weight"])


def test_a_frankenmerge_renumbers_layers_and_says_so_in_its_config(place: Path, tmp_path: Path) -> None:
    recipe = {
        "merge_method": "passthrough",
        "slices": [
            {"sources": [{"model": str(place / "m1"), "layer_range": [0, 2]}]},
            {"sources": [{"model": str(place / "m2"), "layer_range": [1, 2]}]},
        ],
    }
    got = merged(recipe, tmp_path / "out")
    a, b = read_folder(place / "m1"), read_folder(place / "m2")
    assert same_bytes(got["model.layers.2.mlp.up_proj.weight"], b["model.layers.1.mlp.up_proj.weight"])
    assert same_bytes(got["model.embed_tokens.weight"], a["model.embed_tokens.weight"])
    assert same_bytes(got["lm_head.weight"], b["lm_head.weight"])
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_hidden_layers"] == 3


def test_all_that_does_not_fit_is_told_together(place: Path, tmp_path: Path) -> None:
    other = state(5, hidden=32) | {"extra": torch.zeros(2).bfloat16()}
    other["model.norm.weight"] = torch.zeros(7).bfloat16()
    write_folder(tmp_path / "other", other, config=CONFIG | {"num_attention_heads": 2})
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(place / "base")}, {"model": str(tmp_path / "other")}],
        "parameters": {"weight": 1},
        "tokenizer_source": "union",
    }
    (tmp_path / "other" / "vocab.txt").write_text("a")
    with pytest.raises(PlanError) as raised:
        merged(recipe, tmp_path / "out")
    for part in ("extra: is missing", "down_proj.weight: is missing", "[32], but [7]", "has no tokenizer.json"):
        assert part in str(raised.value)


def test_config_and_tokenizer_come_from_the_base_else_the_first_model(place: Path, tmp_path: Path) -> None:
    (place / "m2" / "chat_template.jinja").write_text("two")
    (place / "base" / "chat_template.jinja").write_text("base")
    models = [{"model": str(place / "m2")}, {"model": str(place / "m1")}]
    merged({"merge_method": "linear", "models": models, "parameters": {"weight": 1}}, tmp_path / "first")
    assert (tmp_path / "first" / "chat_template.jinja").read_text() == "two"
    recipe = {"merge_method": "model_stock", "base_model": str(place / "base"), "models": models}
    merged(recipe, tmp_path / "based")
    assert (tmp_path / "based" / "chat_template.jinja").read_text() == "base"


def test_out_dtype_and_rounding(place: Path, tmp_path: Path) -> None:
    recipe, _, _ = recipe_for(METHODS["linear"], place)
    wide = merged(recipe | {"out_dtype": "float32"}, tmp_path / "wide")
    chance = merged(recipe | {"rounding": "stochastic"}, tmp_path / "chance")
    nearest = merged(recipe, tmp_path / "nearest")
    name = "model.layers.0.mlp.down_proj.weight"
    assert wide[name].dtype == torch.float32
    assert same_bytes(wide[name].bfloat16(), nearest[name])
    assert not same_bytes(chance[name], nearest[name])
    assert abs((chance[name].double() - wide[name].double()).mean()) < 1e-7


def test_equal_runs_give_equal_folders(place: Path, tmp_path: Path) -> None:
    recipe, _, _ = recipe_for(METHODS["slerp"], place)
    for number in (1, 2):
        (tmp_path / str(number)).mkdir()
        merged(recipe, tmp_path / str(number) / "out")
    assert tree_bytes(tmp_path / "1" / "out") == tree_bytes(tmp_path / "2" / "out")


@pytest.mark.parametrize(("name", "more"), [("varm", {}), ("varm", {"granularity": "model"}), ("sce", {})])
def test_coefficients_are_printed_and_kept(name: str, more: dict[str, Any], place: Path, tmp_path: Path) -> None:
    """Those of each tensor by model, as worked out from the deltas in float64."""
    recipe, _, _ = recipe_for(METHODS[name], place)
    recipe["parameters"] |= more
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    ended = run(tmp_path, "merge", "recipe.yml", "-o", "out")
    assert ended.returncode == 0, ended.stderr
    told = ended.stdout
    kept = json.loads((tmp_path / "out" / "mergekit_lite_coefficients.json").read_bytes())
    base = read_folder(place / "base")
    models = [str(place / f"m{n}") for n in (1, 2, 3)]
    squares = {
        name: [(read_folder(model)[name].double() - tensor.double()).square().mean() for model in map(Path, models)]
        for name, tensor in base.items()
    }
    of_model = [
        sum(row[n] * base[name].numel() for name, row in squares.items()) for n in range(3)
    ]  # what granularity `model` measures
    for tensor, row in squares.items():
        changes = of_model if more else row
        expected = {model: float(change / sum(changes)) for model, change in zip(models, changes, strict=True)}
        assert kept[tensor] == pytest.approx(expected, rel=1e-6), tensor
    means = {model: sum(of[model] for of in kept.values()) / len(kept) for model in models}
    for model in models:
        assert f"{means[model]:.4f}" in next(line for line in told.splitlines() if line.split()[:1] == [model])
