"""One planner behind every door: ``extrapolate``, a recipe's file, a mapping, and a ``Recipe`` are treated alike."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

import mergekit_lite
from mergekit_lite.errors import MergekitLiteError, PlanError, UsageError
from mergekit_lite.recipe import Recipe, Slice, Source
from mergekit_lite.recipe.rules import Filter, Rule
from tests.models import State, read_folder, same_bytes, state, tuned, write_folder

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "num_attention_heads": 4, "rope_theta": 10000.0}
TOKENS = {"a": 0, "b": 1, "c": 2}
ALPHA = 0.3


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    write_model("sft", state(0))
    write_model("dpo", tuned(state(0), 1))
    return tmp_path


def write_model(name: str, tensors: State, tokens: dict[str, int] | None = None, **config: Any) -> None:
    folder = write_folder(Path(name), tensors, config=CONFIG | config)
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens or TOKENS}}))


def written(**more: Any) -> dict[str, Any]:
    """ExPO as a recipe in plain data."""
    return {
        "merge_method": "expo",
        "base_model": "sft",
        "models": [{"model": "dpo"}],
        "parameters": {"alpha": ALPHA},
        **more,
    }


def by_file(**more: Any) -> mergekit_lite.Plan:
    Path("r.yml").write_text(yaml.safe_dump(written(**more)))
    return mergekit_lite.plan_merge("r.yml", "out")


DOORS: dict[str, Callable[[], mergekit_lite.Plan]] = {
    "extrapolate": lambda: mergekit_lite.plan_extrapolation("sft", "dpo", "out", ALPHA),
    "file": by_file,
    "mapping": lambda: mergekit_lite.plan_merge(written(), "out"),
    "recipe": lambda: mergekit_lite.plan_merge(
        Recipe("expo", (Slice((Source("dpo"), Source("sft")), 1),), "sft", {"alpha": (Rule((ALPHA,)),)}), "out"
    ),
}


def both() -> list[mergekit_lite.Plan]:
    """The plan of every door: alike but for the recipe's text."""
    plans = [door() for door in DOORS.values()]
    for plan in plans[1:]:
        assert plan.jobs == plans[0].jobs and plan.layout == plans[0].layout
        assert plan.notes == plans[0].notes and plan.left_out == plans[0].left_out
        assert plan.source.reference == "dpo"
    return plans


def refused() -> str:
    """The problems that every door finds."""
    found = set()
    for door in DOORS.values():
        with pytest.raises(PlanError) as raised:
            door()
        found.add(str(raised.value))
    [text] = found
    return text


def test_equal_pairs_are_planned_alike() -> None:
    assert both()[0].notes == ()


def test_other_heads_are_refused() -> None:
    write_model("dpo", tuned(state(0), 1), num_attention_heads=2)
    assert "num_attention_heads: 2 in dpo, 4 in sft" in refused()


def test_another_rope_and_order_of_tokens_are_told() -> None:
    write_model("dpo", tuned(state(0), 1), {"b": 0, "a": 1, "c": 2, "d": 3}, rope_theta=1e6)
    notes = "\n".join(both()[0].notes)
    assert "rope_theta: 1000000.0 in dpo, 10000.0 in sft" in notes
    assert '2 tokens differ between the tokenizers: 0 is "b", but "a" in sft; rows are merged as they stand' in notes


def test_tensors_of_one_model_only_are_refused() -> None:
    write_model("sft", state(0) | {"spare": torch.ones(2)})
    write_model("dpo", tuned(state(0), 1) | {"new": torch.ones(2)})
    text = refused()
    assert "spare: is in sft, but not in dpo" in text and "new: is missing in sft" in text


def test_what_is_wrong_with_many_tensors_is_one_problem() -> None:
    write_model("sft", state(0, layers=9), hidden_size=8)
    write_model("dpo", state(0, layers=9, hidden=12), hidden_size=12)
    first, *others = refused().splitlines()[1:]
    assert "hidden_size: 12 in dpo, 8 in sft" in first
    assert "q_proj.weight and 8 more tensors: shape [12, 12], but [8, 8] in sft" in "".join(others) and len(others) == 4


def test_layers_that_a_model_lacks_are_one_problem() -> None:
    write_model("sft", state(0, layers=2))
    write_model("dpo", state(0, layers=4), num_hidden_layers=4)
    [problem] = refused().splitlines()[1:]
    assert "model.layers has 4 layers in dpo and 2 layers in sft" in problem


def test_the_model_that_is_continued_decides() -> None:
    """Heads, buffers, whole numbers and dtypes are the aligned model's, whichever way the two differ."""
    sft, dpo = state(0), tuned(state(0), 1)
    del dpo["lm_head.weight"]
    write_model("sft", sft | {"h.rotary_emb.inv_freq": torch.ones(3), "ids": torch.arange(3)})
    write_model("dpo", {name: tensor.half() for name, tensor in dpo.items()} | {"ids": torch.arange(7)})
    [plan, *_] = both()
    assert {job.name for job in plan.jobs} == dpo.keys() | {"ids"}
    assert {job.dtype for job in plan.merged} == {"float16"}
    assert [(job.name, job.shape) for job in plan.copied] == [("ids", (7,))]
    assert any("lm_head.weight is left out: dpo ties its head to its embedding" in note for note in plan.notes)
    assert {name for _, name, _ in plan.left_out} == {"lm_head.weight", "h.rotary_emb.inv_freq", "ids"}


@pytest.mark.parametrize("door", ["extrapolate", "file", "mapping", "recipe"])
def test_excluded_tensors_come_from_the_model_that_gives_the_config(door: str) -> None:
    if door == "extrapolate":
        mergekit_lite.extrapolate("sft", "dpo", "out", ALPHA, exclude=["norm"])
    elif door == "file":
        by_file(exclude=["norm"])
        mergekit_lite.merge("r.yml", "out")
    elif door == "mapping":
        mergekit_lite.merge(written(exclude=["norm"]), "out")
    else:
        slices = (Slice((Source("dpo"), Source("sft")), 1),)
        alpha = {"alpha": (Rule((ALPHA,)),)}
        mergekit_lite.merge(Recipe("expo", slices, "sft", alpha, exclude=(Filter("norm"),)), "out")
    made, dpo = read_folder(Path("out")), read_folder(Path("dpo"))
    assert {name for name in dpo if same_bytes(made[name], dpo[name])} == {name for name in dpo if "norm" in name}
    assert mergekit_lite.verify("out", samples="all").sound


def test_excluded_tensors_of_other_methods_come_from_the_base_or_the_first_model() -> None:
    parameters = {"weight": 0.5}
    linear = {"merge_method": "linear", "models": [{"model": "dpo"}, {"model": "sft"}], "parameters": parameters}
    ties = {"merge_method": "ties", "base_model": "sft", "models": [{"model": "dpo"}], "parameters": parameters}
    for recipe, source in ((linear, "dpo"), (ties, "sft")):
        mergekit_lite.merge(recipe | {"exclude": ["norm"]}, f"out-{source}")
        made, given = read_folder(Path(f"out-{source}")), read_folder(Path(source))
        assert all(same_bytes(made[name], given[name]) for name in given if "norm" in name)


def test_include_and_new_rows_are_in_the_language() -> None:
    sft, dpo = state(0), tuned(state(0), 1)
    for name in ("model.embed_tokens.weight", "lm_head.weight"):
        dpo[name] = torch.cat((dpo[name], torch.ones(3, 8).bfloat16()))
    write_model("sft", sft)
    write_model("dpo", dpo)
    with pytest.raises(PlanError, match="3 more rows: the vocabulary grew"):
        by_file()
    mergekit_lite.merge(written(new_rows="copy", include=["embed", "norm"]), "recipe")
    mergekit_lite.extrapolate("sft", "dpo", "command", ALPHA, new_rows="copy", include=["embed|norm"])
    made, wanted = read_folder(Path("recipe")), read_folder(Path("command"))
    assert all(same_bytes(made[name], wanted[name]) for name in wanted)
    assert same_bytes(made["lm_head.weight"], dpo["lm_head.weight"])
    assert mergekit_lite.verify("recipe", samples="all").sound and mergekit_lite.verify("command").sound


SLICES = (Slice((Source("dpo"), Source("sft")), 1),)
WEIGHT = {"weight": (Rule((0.5,)),)}
WRONG: dict[str, tuple[Callable[[], object], str]] = {
    "rounding": (lambda: mergekit_lite.extrapolate("sft", "dpo", "o", 0.3, rounding="stohastic"), "'stochastic'"),
    "new rows": (lambda: mergekit_lite.extrapolate("sft", "dpo", "o", 0.3, new_rows="copi"), "'copy'"),
    "seed": (lambda: mergekit_lite.extrapolate("sft", "dpo", "o", 0.3, seed=-1), "whole number"),
    "alpha": (lambda: mergekit_lite.extrapolate("sft", "dpo", "o", float("nan")), "finite"),
    "alpha text": (lambda: mergekit_lite.extrapolate("sft", "dpo", "o", ["a"]), "finite"),  # type: ignore[list-item]
    "no alpha": (lambda: mergekit_lite.extrapolate("sft", "dpo", "o", []), "No alpha"),
    "shard size": (lambda: mergekit_lite.extrapolate("sft", "dpo", "o", 0.3, shard_size=0), "shard_size"),
    "method": (lambda: mergekit_lite.merge(Recipe("tiess", SLICES, "sft", WEIGHT), "o"), "Did you mean 'ties'?"),
    "method of an override": (
        lambda: mergekit_lite.merge(
            Recipe(
                "ties",
                SLICES,
                "sft",
                WEIGHT,
                overrides=(mergekit_lite.recipe.Override(Filter("norm"), "tise"),),
            ),
            "o",
        ),
        "Did you mean 'ties'?",
    ),
    "bounds": (
        lambda: mergekit_lite.merge(Recipe("ties", SLICES, "sft", {**WEIGHT, "density": (Rule((7.0,)),)}), "o"),
        "density: expected",
    ),
    "type": (
        lambda: mergekit_lite.merge(Recipe("ties", SLICES, "sft", {"weight": (Rule(("much",)),)}), "o"),
        "weight: expected",
    ),
    "parameter": (
        lambda: mergekit_lite.merge(Recipe("ties", SLICES, "sft", {**WEIGHT, "densty": (Rule((0.5,)),)}), "o"),
        "Did you mean 'density'?",
    ),
    "no parameter": (lambda: mergekit_lite.merge(Recipe("ties", SLICES, "sft"), "o"), "'weight'"),
    "no base": (
        lambda: mergekit_lite.merge(Recipe("ties", (Slice(SLICES[0].sources),), None, WEIGHT), "o"),
        "needs a base",
    ),
    "no models": (lambda: mergekit_lite.merge(Recipe("linear", ()), "o"), "no models"),
    "mapping": (lambda: mergekit_lite.merge(written(merge_method="exop"), "o"), "Did you mean 'expo'?"),
    "several outputs": (
        lambda: mergekit_lite.merge(
            Recipe("expo", SLICES, "sft", outputs=({"alpha": (Rule((0.1,)),)}, {"alpha": (Rule((0.3,)),)})), "o"
        ),
        "2 outputs",
    ),
}


@pytest.mark.parametrize("name", WRONG)
def test_wrong_values_are_refused_by_the_plan_and_nothing_is_left(name: str, place: Path) -> None:
    call, message = WRONG[name]
    with pytest.raises(MergekitLiteError) as raised:
        call()
    assert isinstance(raised.value, UsageError | PlanError)
    assert message in str(raised.value)
    assert sorted(path.name for path in place.iterdir()) == ["dpo", "sft"]


def test_a_model_on_itself_is_made_and_sound() -> None:
    mergekit_lite.extrapolate("sft", "sft", "out", ALPHA)
    assert mergekit_lite.verify("out", samples="all").sound
