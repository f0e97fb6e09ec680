"""What is tuned: the small language of ``--tune``, and the recipes it makes."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from mergekit_lite.boosting.candidates.family import PairFamily, RecipeFamily
from mergekit_lite.boosting.candidates.ranges import Range
from mergekit_lite.boosting.candidates.tunable import RecipeTuning, parse
from mergekit_lite.errors import UsageError
from tests.models import state, tuned, write_folder

RECIPE = """
merge_method: slerp
models:
  - model: a
    parameters: {weight: 0.3}
  - {model: b}
base_model: {model: {path: a, revision: 1e5}}
parameters:
  t:
    - filter: self_attn
      value: 0.7
    - value: 0.2
  density: 0.5
"""


def text_of(tune: str, *values: float, layers: int | None = 8) -> dict[str, object]:
    """The recipe's tree with these numbers."""
    tuning = RecipeTuning(RECIPE, "recipe.yml", parse([tune]), layers)
    names = [name for each in tuning.tunables for name in each.names]
    return yaml.safe_load(tuning.text(dict(zip(names, values, strict=True))))


def test_numbers_are_put_where_their_paths_lead() -> None:
    assert text_of("parameters.density=0:1", 0.25)["parameters"]["density"] == 0.25
    assert text_of("models.0.parameters.weight=0:1", 0.9)["models"][0]["parameters"]["weight"] == 0.9
    assert text_of("models.1.parameters.weight=0:1", 0.9)["models"][1]["parameters"] == {"weight": 0.9}
    assert text_of("parameters.density=0:1", 0.25)["base_model"] == {"model": {"path": "a", "revision": "1e5"}}


def test_filters_come_before_what_the_recipe_says() -> None:
    rest = [{"filter": "self_attn", "value": 0.7}, {"value": 0.2}]
    assert text_of("parameters.t[filter=mlp]=0:1", 0.4)["parameters"]["t"] == [{"filter": "mlp", "value": 0.4}, *rest]
    assert text_of("parameters.t[filter=self_attn]=0:1", 0.4)["parameters"]["t"] == [
        {"filter": "self_attn", "value": 0.4},
        rest[1],
    ]
    assert text_of("parameters.density[layers=2-3]=0:1", 0.4)["parameters"]["density"] == [
        {"layers": [2, 4], "value": 0.4},
        {"value": 0.5},
    ]
    assert text_of("parameters.density[filter=regex:(up|gate)_proj,layers=2-3]=0:1", 0.4)["parameters"]["density"][
        0
    ] == {"filter": "regex:(up|gate)_proj", "layers": [2, 4], "value": 0.4}


def test_gradients_and_groups_are_several_numbers() -> None:
    (tunable,) = parse(["parameters.density[gradient=3]=0:1"])
    assert tunable.names[2] == "parameters.density[gradient=3].2" and tunable.range == Range(0, 1, 0.01)
    assert text_of("parameters.density[gradient=3]=0:1", 0, 0.5, 1)["parameters"]["density"] == [0, 0.5, 1]
    made = text_of("parameters.density[groups=3]=0:1", 0.1, 0.2, 0.3)["parameters"]["density"]
    assert [entry.get("layers") for entry in made] == [[0, 2], [2, 5], [5, 8], None]


def test_what_can_not_be_read_is_told_together() -> None:
    wrong = ["weight", "a=1:0", "a[colour=red]=0:1", "a[layers=5-2]=0:1", "a[groups=1]=0:1", "a=0:x",
             "a[groups=2,filter=mlp]=0:1"]  # fmt: skip
    with pytest.raises(UsageError) as refused:
        parse([*wrong, "alpha=0:1", "alpha=0:2"])
    for text in [*wrong, "'alpha' is tuned twice"]:
        assert text in str(refused.value)


@pytest.mark.parametrize(
    "tune, said",
    [
        ("models.7.parameters.weight=0:1", "models is a list of 2, counted from 0; got '7'"),
        ("parametres.t=0:1", "Did you mean 'parameters'?"),
        ("merge_method=0:1", "'merge_method' is no number"),
        ("merge_method.t=0:1", "merge_method is neither a mapping nor a list"),
        ("parameters.density[groups=9]=0:1", "the layers of the models are only 8"),
    ],
)
def test_paths_that_lead_nowhere_are_refused(tune: str, said: str) -> None:
    with pytest.raises(UsageError) as refused:
        RecipeTuning(RECIPE, "recipe.yml", parse([tune]), 8)
    assert said in str(refused.value)


def test_the_recipe_as_written_is_the_baseline() -> None:
    tunables = parse(["parameters.density=0:1", "parameters.t[filter=mlp]=0.1:1", "parameters.density[gradient=2]=0:1"])
    assert RecipeTuning(RECIPE, "recipe.yml", tunables, 8).as_written == {
        "parameters.density": 0.5,
        "parameters.t[filter=mlp]": 0.2,
        "parameters.density[gradient=2].0": 0.5,
        "parameters.density[gradient=2].1": 0.5,
    }


@pytest.mark.parametrize(
    ("tune", "numbers"),
    [
        ("parameters.t[filter=self_attn]=0:1", [0.7]),
        ("parameters.t[gradient=2]=0:1", [0.2, 0.2]),
        ("models.1.parameters.density=0:1", [0.5]),  # from further out
        ("parameters.alpha=0.4:2", [0.5]),  # the default of wise_ft
        ("overrides.0.parameters.scale=0.3:1", [1.0]),  # that of the override's method
        ("parameters.along[gradient=3]=0:1", [0.0, 0.6, 0.1]),
    ],
)
def test_the_baseline_has_what_holds_in_the_recipe(tune: str, numbers: list[float]) -> None:
    recipe = RECIPE.replace("slerp", "wise_ft") + "  along: [0, 0.6, 0.1]\noverrides: [{merge_method: passthrough}]\n"
    tuning = RecipeTuning(recipe, "recipe.yml", parse([tune]), 8)
    assert list(tuning.as_written.values()) == numbers
    assert tuning.notes == ()


@pytest.mark.parametrize("tune", ["parameters.nothing=0.3:1", "parameters.along[gradient=2]=0.3:1"])
def test_a_baseline_without_a_number_is_told(tune: str) -> None:
    recipe = f"{RECIPE}  along: [0, 0.6, 0.1]\n"
    tuning = RecipeTuning(recipe, "recipe.yml", parse([tune]), 8)
    assert set(tuning.as_written.values()) == {0.3}
    [note] = tuning.notes
    assert "the baseline has the low end, 0.3" in note


@pytest.mark.parametrize(
    ("written", "tune", "numbers"),
    [
        ("[{filter: mlp, value: [0, 1]}, {value: [1, 0]}]", "[filter=mlp,gradient=2]", [0, 1]),
        ("[{filter: mlp, value: [0, 1]}, {value: [1, 0]}]", "[gradient=2]", [1, 0]),
        ("[{filter: mlp, value: 0.4}, 0.6]", "[filter=mlp]", [0.4]),
        ("[{filter: mlp, value: 0.4}, 0.6]", "", [0.6]),
        ("{filter: mlp, value: 0.4}", "[filter=mlp]", [0.4]),
        ("[{layers: [0, 4], value: 0.4}, {layers: [4, 8], value: 0.6}]", "[groups=2]", [0.4, 0.6]),
        ("[0.4, 0.6]", "[groups=2]", None),  # a gradient is not two runs of layers
        ("[{filter: [mlp, up], value: 0.4}]", "", None),  # wrong, as whoever reads the recipe says
    ],
)
def test_the_baseline_has_what_holds_under_a_condition(written: str, tune: str, numbers: list[float] | None) -> None:
    recipe = f"{RECIPE}  along: {written}\n"
    tuning = RecipeTuning(recipe, "recipe.yml", parse([f"parameters.along{tune}=0.3:1"]), 8)
    low = [0.3] * len(tuning.as_written)
    assert list(tuning.as_written.values()) == (low if numbers is None else numbers)
    assert bool(tuning.notes) == (numbers is None)


def test_plans_of_a_pair_are_those_of_extrapolate(tmp_path: Path) -> None:
    from mergekit_lite import plan_extrapolation

    base = state(1)
    sft, dpo = (str(write_folder(tmp_path / n, s)) for n, s in (("sft", base), ("dpo", tuned(base, 2))))
    family = PairFamily(sft, dpo, parse(["alpha=0:2", "alpha[filter=mlp]=0:1"]), {"rounding": "stochastic"})
    assert family.baseline == {"alpha": 0, "alpha[filter=mlp]": 0}
    plan = family.plan({"alpha": 0.5, "alpha[filter=mlp]": 0.25}, tmp_path / "out")
    same = plan_extrapolation(sft, dpo, tmp_path / "out", 0.5, alpha_for={"mlp": 0.25}, rounding="stochastic")
    assert plan.digest(0) == same.digest(0)
    with pytest.raises(UsageError, match="two models have an alpha only"):
        PairFamily(sft, dpo, parse(["weight=0:1"]), {})


def test_plans_of_a_recipe_are_those_of_merge(tmp_path: Path) -> None:
    from mergekit_lite import plan_merge

    base = state(1)
    a, b = (str(write_folder(tmp_path / n, s)) for n, s in (("a", base), ("b", tuned(base, 2))))
    recipe = {
        "merge_method": "slerp",
        "models": [{"model": a}, {"model": b}],
        "base_model": a,
        "parameters": {"t": 0.5},
    }
    (tmp_path / "recipe.yml").write_text(yaml.safe_dump(recipe))
    family = RecipeFamily(tmp_path / "recipe.yml", parse(["parameters.t[filter=mlp]=0:1"]))
    plan = family.plan({"parameters.t[filter=mlp]": 0.125}, tmp_path / "out")
    (tmp_path / "tuned.yml").write_text(plan.text)
    assert plan_merge(tmp_path / "tuned.yml", tmp_path / "out").digest(0) == plan.digest(0)
    values = {job.name: job.parameters[0]["t"] for job in plan.merged}
    assert values["model.layers.1.mlp.up_proj.weight"] == 0.125 and values["model.norm.weight"] == 0.5
