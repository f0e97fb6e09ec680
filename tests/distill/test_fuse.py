"""Training on teachers' distributions: what it is at its ends, how batches count, what is told, students merged."""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.alignment.groups import groups
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.objectives.distances import DISTANCES
from mergekit_lite.distillation.objectives.targets import Targets
from mergekit_lite.distillation.recipe.schema import Fuse, Recipe, RecipeTeacher, Training
from mergekit_lite.distillation.teaching.files import TaughtFile
from mergekit_lite.distillation.teaching.rows import TaughtRow, row_key
from mergekit_lite.distillation.train import train
from mergekit_lite.distillation.training.fuse_stage import FuseStage
from mergekit_lite.distillation.training.stage import TrainingStage
from mergekit_lite.errors import RunError, UsageError
from mergekit_lite.merging import merge
from tests.distill.teaching_models import other_teacher, said
from tests.distill.training import STAGE, Told, figures, log, same, target, weights, write_rows


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> Any:
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A target, a teacher of another vocabulary, rows, and what both say of them."""
    folder = tmp_path_factory.mktemp("fuse")
    target(folder / "target")
    other_teacher(folder / "other")
    other_teacher(folder / "second", seed=4)
    write_rows(folder, sft=12, preference=1)
    for name, model in (("pivot", "target"), ("other", "other"), ("second", "second")):
        write_taught(folder, name, said(folder / model, folder / "pairs" / "sft.jsonl", 400))
    write_taught(folder, "nobody", [])
    there = said(folder / "other", folder / "pairs" / "sft.jsonl", 400)
    write_taught(folder, "far", [replace(row, top_ids=row.top_ids + FAR) for row in there], FAR + 320)
    return folder


FAR = 1000  # first id of tokens that neither the student's head nor any tokenizer has


def write_taught(folder: Path, name: str, rows: list[TaughtRow], vocabulary: int = 340) -> None:
    settings = {"teacher": name, "vocabulary": vocabulary, "top": 400}
    with TaughtFile.with_settings(folder / "teach" / name, settings) as file:
        file.append(rows)


def teachers(place: Path, *names: str) -> list[RecipeTeacher]:
    models = {"pivot": "target", "far": "other"}
    return [RecipeTeacher(name=name, model=str(place / models.get(name, name))) for name in names]


def fused(place: Path, out: Path, names: tuple[str, ...] = ("other",), rows: Path | None = None, **keys: Any) -> Path:
    """Train in a folder on what teachers said in another."""
    training = Fuse.model_validate({"objective": "alm", **STAGE, **keys})
    rows = rows or place / "pairs" / "sft.jsonl"
    FuseStage(
        "fuse", training, str(place / "target"), rows, out / "fuse", 0, teachers(place, *names), place / "teach"
    ).run(Told())
    return out / "fuse"


def test_clm_alone_is_sft_bit_for_bit(place: Path, tmp_path: Path) -> None:
    start, rows = str(place / "target"), place / "pairs" / "sft.jsonl"
    TrainingStage("fuse", Training.model_validate(STAGE), start, rows, tmp_path / "sft", 0).run(Told())
    made = fused(place, tmp_path, clm=1.0)
    same(weights(made), weights(tmp_path / "sft"))
    for ours, plain in zip(figures(made), figures(tmp_path / "sft"), strict=True):
        assert plain.items() <= ours.items()
        assert ours["clm"] == pytest.approx(ours["loss"], rel=1e-6)


@pytest.mark.parametrize("packing", [True, False])
def test_what_the_student_says_itself_teaches_it_nothing(place: Path, tmp_path: Path, packing: bool) -> None:
    made = fused(place, tmp_path, ("pivot",), objective="forward_kl", clm=0.0, packing=packing, learning_rate=1e-6)
    rows = log(made)
    assert rows[0]["grad_norm"] < 1e-2  # what is left is the rounding of the file
    for row in rows:
        assert abs(row["distance"]) < 1e-4 and row["distance"] == row["distance/pivot"] and row["grouped"] == 1.0


@torch.no_grad()
def by_hand(place: Path, distance: str, clm: float) -> tuple[float, float]:
    """The loss before training over the first rows of the file, from all logits: its two parts."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(place / "target").eval()
    template = ChatTemplate(AutoTokenizer.from_pretrained(place / "target"))
    taught = {row.key: row for row in said(place / "other", place / "pairs" / "sft.jsonl", 400)}
    clms: list[float] = []
    distances: list[float] = []
    for line in (place / "pairs" / "sft.jsonl").read_text().splitlines():
        row = json.loads(line)
        tokens = template.tokens(row["messages"], row["response"])
        ids = torch.tensor(tokens.response)
        logits = model(torch.tensor([[*tokens.prompt, *tokens.response]])).logits[0, len(tokens.prompt) - 1 : -1]
        clms += (-logits.log_softmax(1).gather(1, ids[:, None])[:, 0]).tolist()
        theirs = taught[row_key(row["messages"], row["response"])]
        cut = groups(response_ends(template.tokenizer, tokens.response, row["response"]), theirs.ends)
        targets = Targets(
            torch.tensor(cut.student),
            torch.tensor(cut.teacher),
            torch.tensor(theirs.tokens).long(),
            torch.tensor(theirs.log_probs),
            torch.tensor(theirs.top_ids).long(),
            torch.tensor(theirs.top_log_probs),
            cut.count,
        )
        distances += DISTANCES[distance](logits, ids, targets).tolist()
    return sum(clms) / len(clms), sum(distances) / len(distances)


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_is_a_mean_over_tokens_and_one_over_groups(place: Path, tmp_path: Path, packing: bool) -> None:
    """However the rows of a step are cut into parts, and in whatever layout they lie."""
    clm, distance = by_hand(place, "alm", 0.25)
    made = fused(place, tmp_path, clm=0.25, batch_size=12, per_device_batch_size=5, packing=packing)
    (row,) = log(made)
    assert row["clm"] == pytest.approx(clm, rel=1e-5)
    assert row["distance"] == pytest.approx(distance, rel=1e-4)
    assert row["loss"] == pytest.approx(0.25 * clm + 0.75 * distance, rel=1e-4)


@pytest.mark.parametrize(
    ("objective", "keys"),
    [("cross_entropy", {"vocabulary": "edit_distance"}), ("p_kl", {}), ("h_kl", {}), ("gold", {}), ("uld", {})],
)
def test_objectives_have_the_vocabularies_that_they_need(
    place: Path, tmp_path: Path, objective: str, keys: dict[str, Any]
) -> None:
    """Also where a head has more rows than the tokenizer has tokens, as the target's has."""
    (row,) = log(fused(place, tmp_path, objective=objective, batch_size=12, **keys))
    assert row["distance"] > 0 and math.isfinite(row["loss"]) and row["grad_norm"] > 0


@pytest.mark.parametrize("objective", ["p_kl", "gold"])
def test_in_16_bits(place: Path, tmp_path: Path, objective: str) -> None:
    """The default: the model's own computation is rounded, sums of probabilities are not."""
    full, half = (
        log(fused(place, tmp_path / dtype, objective=objective, batch_size=12, dtype=dtype))[0]["distance"]
        for dtype in ("float32", "bfloat16")
    )
    assert half == pytest.approx(full, rel=5e-3) and half != full


def test_sorted_probabilities_ask_not_which_token_is_which(place: Path, tmp_path: Path) -> None:
    """Teachers' ids may be beyond the student's: it is not their padding that is compared."""
    here, there = (
        log(fused(place, tmp_path / name, (name,), objective="uld", batch_size=12))[0] for name in ("other", "far")
    )
    assert there["distance/far"] == here["distance/other"] > 0.1


@pytest.mark.parametrize("packing", [True, False])
def test_one_hot_targets_alone_are_sft(place: Path, tmp_path: Path, packing: bool) -> None:
    """FuseLLM's mean is over tokens: where no token matches, its part of the loss is SFT's, however groups are."""
    keys = {"options": {"fallback": "one_hot"}, "batch_size": 12, "per_device_batch_size": 5, "packing": packing}
    (row,) = log(fused(place, tmp_path, ("far",), objective="cross_entropy", **keys))
    assert row["grouped"] == 1.0 and row["distance"] == pytest.approx(row["clm"], rel=1e-5)


@pytest.mark.parametrize("combine", ["sum", "min_ce", "avg_ce"])
def test_how_a_batch_is_cut_changes_nothing(place: Path, tmp_path: Path, combine: str) -> None:
    common = {"objective": "cross_entropy", "clm": 0.5, "combine": combine, "batch_size": 6, "learning_rate": 1e-4}
    whole = fused(place, tmp_path / "whole", ("pivot", "other"), **common, per_device_batch_size=6)
    parts = fused(place, tmp_path / "parts", ("pivot", "other"), **common, per_device_batch_size=2, packing=False)
    same(weights(whole), weights(parts), rtol=1e-3, atol=1e-5)
    first = log(whole)[0]
    shares = {name: first[f"weight/{name}"] for name in ("pivot", "other")}
    assert sum(shares.values()) == pytest.approx(2.0 if combine == "sum" else 1.0)
    assert first["loss"] == pytest.approx(log(parts)[0]["loss"], rel=1e-4)


def test_the_teacher_with_the_least_cross_entropy_teaches(place: Path, tmp_path: Path) -> None:
    entropies = {
        name: {row.key: row.cross_entropy for row in said(place / model, place / "pairs" / "sft.jsonl", 1)}
        for name, model in (("pivot", "target"), ("other", "other"))
    }
    better = sum(value < entropies["other"][key] for key, value in entropies["pivot"].items()) / 12
    made = fused(place, tmp_path, ("pivot", "other"), combine="min_ce", batch_size=12)
    assert log(made)[0].get("weight/pivot") == pytest.approx(better)


def test_rows_that_nobody_taught_are_told_and_left_out(place: Path, tmp_path: Path) -> None:
    lines = (place / "pairs" / "sft.jsonl").read_text().splitlines()
    new = json.loads(lines[0]) | {"response": "never seen before"}
    other = [json.dumps(json.loads(line) | {"domain": "maths"}) for line in lines[:2]]
    rows = tmp_path / "rows.jsonl"
    rows.write_text("\n".join([*other, *lines[2:8], json.dumps(new)]) + "\n")
    told = Told()
    training = Fuse.model_validate({"objective": "alm", **STAGE})
    both = [each.model_copy(update={"domains": ("",)}) for each in teachers(place, "pivot", "other")]
    FuseStage("fuse", training, str(place / "target"), rows, tmp_path / "fuse", 0, both, place / "teach").run(told)
    assert "fuse: 6 rows, left out: 3 not taught; 1 epochs in 1 step of 4; 2 rows fill no last batch" in told.lines
    assert "pivot has not scored 1 row of its domains: such rows learn from the others alone." in told.lines
    settings = json.loads((tmp_path / "fuse" / "training.json").read_text())
    assert settings["rows"]["not taught"] == 3
    with pytest.raises(UsageError, match="run the stage `teach` first"):
        fused(place, tmp_path / "none", ("nobody",))


def test_other_words_of_a_teacher_are_other_settings(place: Path, tmp_path: Path) -> None:
    made = fused(place, tmp_path)
    assert fused(place, tmp_path) == made  # as it is
    with pytest.raises(UsageError, match=r"taught\.pivot"):
        fused(place, tmp_path, ("pivot",))
    with pytest.raises(UsageError, match=r"clm: 0\.9 there, 0\.8 now"):
        fused(place, tmp_path, clm=0.8)


def test_held_out_rows_are_measured_as_those_of_training(place: Path, tmp_path: Path) -> None:
    made = fused(place, tmp_path, clm=0.25, eval=4, eval_steps=1, keep="best", save_steps=1, batch_size=2)
    measured = [row["eval_loss"] for row in log(made) if "eval_loss" in row]
    assert len(measured) == 5 and all(map(math.isfinite, measured))


def fusechat(place: Path, out: Path, **pairwise: Any) -> Recipe:
    """FuseChat's first version in a folder of its own, on what the place's teachers said."""
    (out / "pairs").mkdir(parents=True, exist_ok=True)
    shutil.copy(place / "pairs" / "sft.jsonl", out / "pairs")
    shutil.copytree(place / "teach", out / "teach", dirs_exist_ok=True)
    fuse = {**STAGE, "objective": "alm", "combine": "min_ce", "pairwise": {"merge_method": "varm", **pairwise}}
    recipe = {"folder": out, "target": str(place / "target"), "train": {"fuse": fuse}}
    return Recipe.model_validate({**recipe, "teachers": teachers(place, "other", "pivot", "second")})


def test_fusechat_merges_a_student_of_each_teacher(place: Path, tmp_path: Path) -> None:
    recipe, told = fusechat(place, tmp_path / "out"), Told()
    train(recipe, told)
    made = tmp_path / "out" / "train"
    assert {path.name for path in made.iterdir()} == {"fuse", "fuse-other", "fuse-second"}
    students = [str(made / name) for name in ("fuse-other", "fuse-second")]
    by_hand = {"merge_method": "varm", "base_model": recipe.target, "models": [{"model": name} for name in students]}
    merge({**by_hand, "dtype": "float32"}, tmp_path / "by-hand")
    same(weights(made / "fuse"), weights(tmp_path / "by-hand"))
    assert "fuse: 2 students merged, " + str(made / "fuse") in told.lines
    for student in students:
        assert {"weight/pivot", f"weight/{student.rpartition('-')[2]}"} <= log(Path(student))[0].keys()
    for student in students:
        shutil.rmtree(student)  # what they were made for is there
    again = Told()
    train(recipe, again)
    assert again.lines == [f"fuse: done, {made / 'fuse'}"]
    other = fusechat(place, tmp_path / "out", parameters={"granularity": "model"})
    with pytest.raises(UsageError, match=r"pairwise.parameters"):
        train(other, Told())


def test_a_merge_that_was_broken_off_goes_on(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before it, within it, and where the merged model waits for its check."""
    recipe, made = fusechat(place, tmp_path / "out"), tmp_path / "out" / "train"

    def fail(*_: Any, **__: Any) -> None:
        raise RunError("broken off")

    def part(done: int, total: int) -> None:
        if done > total / 2:
            fail()

    module = "mergekit_lite.distillation.training.fuse_stage"
    for name, replaced in (("merge", fail), ("merge", partial(merge, progress=part)), ("check_sound", fail)):
        with monkeypatch.context() as patched, pytest.raises(RunError, match="broken off"):
            patched.setattr(f"{module}.{name}", replaced)
            train(recipe, Told())
        assert not (made / "fuse").exists()
    told = Told()
    train(recipe, told)
    assert [line for line in told.lines if "done" in line] == [
        f"fuse-{name}: done, {made / f'fuse-{name}'}" for name in ("other", "second")
    ]
    assert not (made / "fuse.partial").exists() and (made / "fuse" / "training.json").exists()
