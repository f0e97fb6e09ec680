"""What ``plan`` prints: groups of tensors with their numbers, in lines that fit."""

from __future__ import annotations

import io
import json
import re
from itertools import takewhile
from pathlib import Path

import pytest
from click.testing import CliRunner
from rich.console import Console

import mergekit_lite
from mergekit_lite.commands import main
from mergekit_lite.commands.groups import groups
from mergekit_lite.commands.screen import Screen
from tests.models import state, tuned, write_folder

CONFIG = {"model_type": "llama", "num_hidden_layers": 8, "torch_dtype": "bfloat16"}
RECIPE = """\
merge_method: ties
base_model: base
models:
  - model: one-model-with-a-name-that-is-rather-long-for-a-narrow-terminal-window
    parameters:
      weight: [0.2, 0.8]
      density: [{filter: mlp, value: [0, 1, 0.5]}, {value: 0.5}]
  - model: two
    parameters: {weight: 0.5, density: 0.5}
parameters: {int8_mask: true}
exclude: [lm_head]
"""


@pytest.fixture
def plan(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> mergekit_lite.Plan:
    base = state(0, layers=9)
    for number, name in enumerate(re.findall(r"(?:model|base_model): (\S+)", RECIPE)):
        write_folder(tmp_path / name, tuned(base, number), config=CONFIG)
    monkeypatch.chdir(tmp_path)
    Path("r.yml").write_text(RECIPE)
    return mergekit_lite.plan_merge("r.yml", "merged")


def test_tensors_that_are_made_alike_are_told_together(plan: mergekit_lite.Plan) -> None:
    told = {group.what: group for group in groups(plan)}
    rest = "normalize true, rescale false, lambda 1, trim tensor"
    counts = {
        "copy (excluded)": 1,
        f"ties weight 0.2 / 0.5, density 0.5, {rest}": 2,  # outside the layers
        f"ties weight 0.2 … 0.8 / 0.5, density 0.5, {rest} along 9 layers": 18,
        f"ties weight 0.2 … 0.8 / 0.5, density 0 … 1 … 0.5 / 0.5, {rest} along 9 layers": 9,
    }
    assert {what: group.tensors for what, group in told.items()} == counts
    assert sum(group.nbytes for group in told.values()) == sum(job.nbytes for job in plan.jobs)
    for group in told.values():
        assert group.dtype == "bfloat16" and group.example in {job.name for job in plan.jobs}


def test_layers_that_lack_a_part_belong_to_the_others(tmp_path: Path) -> None:
    """Dense layers first, experts behind: one gradient for all of them, and layers without experts don't break it."""
    base = state(0, layers=9)
    expert = {
        f"model.layers.{n}.mlp.experts.{e}.w": base["model.norm.weight"].clone() for n in range(2, 9) for e in range(3)
    }
    write_folder(tmp_path / "a", base | expert, config=CONFIG)
    write_folder(tmp_path / "b", base | expert, config=CONFIG)
    recipe = {"merge_method": "slerp", "base_model": "a", "models": [{"model": "b"}], "parameters": {"t": [0, 1]}}
    text = json.dumps(recipe).replace('"a"', json.dumps(str(tmp_path / "a"))).replace('"b"', f'"{tmp_path}/b"')
    (tmp_path / "r.yml").write_text(text)
    told = {group.what: group.tensors for group in groups(mergekit_lite.plan_merge(tmp_path / "r.yml", "x"))}
    assert told == {"slerp t 0": 3, "slerp t 0 … 1 along 9 layers": 9 * 3 + 7 * 3}


def test_no_gradient_is_longer_than_a_line(plan: mergekit_lite.Plan) -> None:
    zigzag = RECIPE.replace("[0, 1, 0.5]", "[0, 1, 0, 1, 0, 1, 0, 1, 0.5]")
    Path("r.yml").write_text(zigzag)
    told = [group.what for group in groups(mergekit_lite.plan_merge("r.yml", "merged"))]
    assert any("density 0 … 0.5 (from 0 to 1) / 0.5" in what for what in told)


@pytest.mark.parametrize("width", [80, 120])
@pytest.mark.parametrize("verbose", [False, True])
def test_nothing_is_cut_off_or_out_of_line(plan: mergekit_lite.Plan, width: int, verbose: bool) -> None:
    written = io.StringIO()
    screen = Screen(quiet=False, verbose=verbose)
    screen.out = Console(file=written, width=width, force_terminal=True, color_system=None)
    screen.plan(plan, None)
    lines = written.getvalue().splitlines()
    assert max(map(len, lines)) <= width
    assert written.getvalue().count("…") == (0 if verbose else 4)  # of gradients: rich would cut with the same sign
    together = re.sub(r"\s+", "", written.getvalue())
    assert plan.inputs[0].reference in together and "int8_mask" not in together
    if not verbose:
        head = next(line for line in lines if "what happens" in line)
        column = head.index("what happens")
        below = takewhile(lambda line: not line.startswith("left out"), lines[lines.index(head) + 1 :])
        assert all(line[column - 2 : column] == "  " and line[column] != " " for line in below)


def test_piped_and_json(plan: mergekit_lite.Plan) -> None:
    told = CliRunner().invoke(main, ["plan", "r.yml"])
    assert told.exit_code == 0 and "weight 0.2 … 0.8 / 0.5, density 0 … 1 … 0.5 / 0.5" in told.stdout
    data = json.loads(CliRunner().invoke(main, ["plan", "r.yml", "--json"]).stdout)
    parameters = {tensor["name"]: tensor["parameters"] for tensor in data["tensors"]}
    assert parameters.keys() == state(0, layers=9).keys()
    assert parameters["model.layers.8.mlp.up_proj.weight"][0]["density"] == [0.5, 0.5]
    assert parameters["model.layers.4.mlp.up_proj.weight"][0]["density"] == [1.0, 0.5]
