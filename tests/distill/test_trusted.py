"""Training that can be trusted: stops where it diverges, holds prompts out, publishes nothing that is not sound."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import load_file, save_file

from mergekit_lite.answers.logprobs import check_head
from mergekit_lite.distillation.recipe.schema import Training
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.train import check, train
from mergekit_lite.distillation.training import held_out
from mergekit_lite.distillation.training.rows import TrainingRow
from mergekit_lite.distillation.training.soundness import check_sound
from mergekit_lite.errors import RunError, UsageError
from tests.causal import causal_model
from tests.distill.training import log, recipe, target, trained, weights, write_rows

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def folder(tmp_path):
    target(tmp_path / "target")
    write_rows(tmp_path)
    return tmp_path


def damaged(folder: Path, change) -> None:
    """Change the tensors of a model folder in place."""
    file = folder / "model.safetensors"
    tensors = load_file(file)
    change(tensors)
    save_file(tensors, file, metadata={"format": "pt"})


# --- divergence -----------------------------------------------------------------------------------------------------

WILD = {"learning_rate": 1e30, "warmup_ratio": 0, "scheduler": "constant", "trainer": {"max_grad_norm": 0}}


def test_a_training_that_diverges_stops_at_the_step_and_publishes_nothing(folder):
    with pytest.raises(RunError, match=r"sft: training diverged: at step \d the (loss|norm)") as caught:
        trained(folder, sft=WILD | {"save_steps": 1})
    text = str(caught.value)
    assert "learning_rate (it is 1e+30)" in text and "max_grad_norm" in text and caught.value.exit_code == 1
    unfinished = folder / "train" / "sft.partial"
    assert f"delete {unfinished}" in text
    assert not (folder / "train" / "sft").exists()
    for row in log(unfinished):  # no 0 where there was no number
        assert row["loss"] > 0
    with pytest.raises(UsageError, match="begun with other settings"):
        trained(folder, sft={})
    shutil.rmtree(unfinished)
    trained(folder, sft={"epochs": 0.5})


def test_the_last_good_checkpoint_is_kept_and_gone_on_from(folder, monkeypatch):
    """A loss that is NaN from the fourth step on, whatever the weights; then no longer."""
    from mergekit_lite.distillation.training.trainer import SftTrainer

    whole = SftTrainer.compute_loss

    def broken(self, *more, **named):
        return whole(self, *more, **named) * (float("nan") if self.state.global_step >= 3 else 1)

    monkeypatch.setattr(SftTrainer, "compute_loss", broken)
    for _ in range(2):
        with pytest.raises(RunError, match=r"at step 4 the loss is nan.*\n.*|after step 2, is kept") as caught:
            trained(folder, sft={"save_steps": 2})
        assert "The last good checkpoint, after step 2, is kept" in str(caught.value)
        assert [row["step"] for row in log(folder / "train" / "sft.partial")] == [1, 2, 3]
    monkeypatch.setattr(SftTrainer, "compute_loss", whole)
    told = trained(folder, sft={"save_steps": 2})
    assert "sft: goes on after step 2 of 6" in told.lines
    assert [row["step"] for row in log(folder / "train" / "sft")] == [1, 2, 3, 4, 5, 6]


def test_a_held_out_loss_that_is_not_finite_stops_the_training(folder, monkeypatch):
    """Nothing else shows it, and the best checkpoint would be chosen by no figure at all."""
    from mergekit_lite.distillation.training.trainer import SftTrainer

    whole = SftTrainer._measure

    def broken(self, rows):
        whole(self, rows)
        if self.state.global_step:
            self.means.totals[0] = float("nan")

    monkeypatch.setattr(SftTrainer, "_measure", broken)
    with pytest.raises(RunError, match="sft: training diverged: at step 1 the held-out loss is nan"):
        trained(folder, sft={"eval": 4, "save_steps": 1, "keep": "best"})
    assert not (folder / "train" / "sft").exists()


def test_weights_that_are_not_finite_are_no_checkpoint(folder, monkeypatch):
    """The last step breaks the weights: no loss shows it."""
    from torch.optim import AdamW

    whole, steps = AdamW.step, []

    def breaking(self, *more, **named):
        whole(self, *more, **named)
        steps.append(1)
        if len(steps) == 6:
            self.param_groups[0]["params"][0].data.view(-1)[0] = float("inf")

    monkeypatch.setattr(AdamW, "step", breaking)
    with pytest.raises(RunError, match="at step 6 some weights are not finite"):
        trained(folder, sft={"save_steps": 4})
    assert [path.name for path in (folder / "train" / "sft.partial").glob("checkpoint-*")] == ["checkpoint-4"]


# --- the check of what was written ------------------------------------------------------------------------------------


def shifted(tensors):
    name = sorted(tensors)[3]
    tensors[name] = tensors[name][:1].clone()


FAULTS = {
    "NaN": (lambda t: t["lm_head.weight"].view(-1)[5:7].fill_(float("nan")), "lm_head.weight: 2 of .* not finite"),
    "infinite": (lambda t: t["model.norm.weight"][:1].fill_(-float("inf")), "model.norm.weight: 1 of 32 elements not"),
    "missing": (lambda t: t.pop("model.norm.weight"), "model.norm.weight is missing"),
    "extra": (lambda t: t.update(odd=torch.zeros(2)), "odd is nothing that the configuration knows"),
    "shape": (shifted, r"has the shape \(1, \d+\), the configuration says"),
    "empty": (lambda t: t.update({name: torch.empty(0) for name in t}), r"21 problems(.|\n)*has the shape \(0,\)"),
}


@pytest.fixture(scope="module")
def sound(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sound")
    causal_model("llama").save_pretrained(folder)
    return folder


@pytest.mark.parametrize("fault", FAULTS)
def test_what_is_not_sound_is_named(sound, tmp_path, fault):
    change, expected = FAULTS[fault]
    assert check_sound(sound, "", "") == 21
    shutil.copytree(sound, tmp_path / "copy")
    damaged(tmp_path / "copy", change)
    with pytest.raises(RunError, match=f"(?s)it is bad: .*{expected}.*do this") as caught:
        check_sound(tmp_path / "copy", "it is bad", "do this")
    assert caught.value.exit_code == 1


def test_a_model_with_tied_weights_is_sound(tmp_path):
    model = causal_model("gpt2")
    assert model.config.tie_word_embeddings
    model.save_pretrained(tmp_path)
    check_sound(tmp_path, "", "")


def test_nothing_unsound_is_published_in_any_way(folder, monkeypatch):
    """Whatever way the weights came: the folder is looked at as it was written."""
    from mergekit_lite.distillation.training import stage

    whole = stage.write_model

    def breaking(saved, start, training, made):
        whole(saved, start, training, made)
        damaged(made, FAULTS["empty"][0])

    monkeypatch.setattr(stage, "write_model", breaking)
    with pytest.raises(RunError, match="sft: the written model is not sound, so it is not published: 21 problems"):
        trained(folder, sft={"epochs": 0.5})
    assert not (folder / "train" / "sft").exists()
    assert list((folder / "train" / "sft.partial").glob("checkpoint-*"))
    monkeypatch.setattr(stage, "write_model", whole)
    assert trained(folder, sft={"epochs": 0.5}).lines[1] == "sft: goes on after step 3 of 3"


def test_an_unsound_model_of_an_earlier_version_is_told(folder):
    trained(folder, sft={"epochs": 0.5})
    made = folder / "train" / "sft"
    record = json.loads((made / "training.json").read_text())
    assert record.pop("checked") == 21
    (made / "training.json").write_text(json.dumps(record))
    trained(folder, sft={"epochs": 0.5})  # sound, so nothing to tell
    damaged(made, FAULTS["NaN"][0])
    for stages in ({"sft": {"epochs": 0.5}}, {"sft": {"epochs": 0.5}, "preference": {}}):
        with pytest.raises(RunError, match=r"published by an earlier version, but is not sound: 1 problem"):
            trained(folder, **stages)


def test_a_target_whose_logits_are_not_finite_is_told_in_a_sentence():
    model = causal_model("llama")
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(UsageError, match=r"The logits of .* are NaN or infinite"):
        check_head(model)


# --- prompts held out -------------------------------------------------------------------------------------------------


def rows_of(prompts: int, each: int) -> list[TrainingRow]:
    from array import array

    return [
        TrainingRow(array("i", [1, 2, number]), (array("i", [3, answer]),), ("source",))
        for number in range(prompts)
        for answer in range(each)
    ]


@pytest.mark.parametrize(("how_many", "expected"), [(0.1, 2), (0.25, 5), (1, 1), (7, 7)])
def test_no_prompt_has_rows_in_both_parts(how_many, expected):
    rows = rows_of(20, 3)
    training = Training(learning_rate=1, eval=how_many)
    parts = held_out.split(rows, training, 0, "sft")
    held = {row.prompt.tobytes() for row in parts.held}
    assert parts.prompts == len(held) == expected and len(parts.held) == 3 * expected
    assert not held & {row.prompt.tobytes() for row in parts.trained}
    assert sorted(row.key for row in [*parts.held, *parts.trained]) == sorted(row.key for row in rows)
    assert held == {row.prompt.tobytes() for row in held_out.split(rows[::-1], training, 0, "sft").held}
    others = [held_out.split(rows, training, seed, "sft").held for seed in range(1, 6)]
    assert any({row.prompt.tobytes() for row in other} != held for other in others)


def test_what_can_not_be_held_out_is_refused(folder):
    for wrong in (-0.1, 1.5):
        with pytest.raises(ValidationError):
            Training(learning_rate=1, eval=wrong)
    for few in (0.01, 20):
        with pytest.raises(UsageError, match="1 to 19"):
            held_out.split(rows_of(20, 1), Training(learning_rate=1, eval=few), 0, "sft")
    trainer = {"eval_strategy": "steps", "load_best_model_at_end": True, "logging_nan_inf_filter": True}
    with pytest.raises(UsageError) as caught:
        check(recipe(folder, folder / "target", sft={"trainer": trainer, "keep": "best", "eval_steps": 3}))
    text = str(caught.value)
    assert "'eval_strategy' can't be set here. Use 'eval' of the recipe." in text
    assert "'load_best_model_at_end' can't be set here. Use 'keep' of the recipe." in text
    assert "keep: best chooses by prompts held out" in text and "eval_steps has no effect" in text
    assert "5 problems" in text


@pytest.mark.parametrize("stage", ["sft", "preference"])
def test_the_held_out_loss_is_that_of_the_published_model(folder, stage):
    """At its end, the loss of a second implementation on whole logits, of the folder that was published."""
    from transformers import AutoModelForCausalLM

    from mergekit_lite.answers.template import ChatTemplate, LengthLimits
    from mergekit_lite.distillation.training.model import tokenizer_of
    from mergekit_lite.distillation.training.rows import preference_rows, sft_rows

    settings = {"eval": 5, "eval_steps": 2, "learning_rate": 1e-2}
    told = trained(folder, **{stage: settings})
    rows = [row for row in log(folder / "train" / stage) if "eval_loss" in row]
    assert [row["step"] for row in rows] == [0, 2, 4]
    assert "5 prompts with 5 rows held out" in told.lines[0] and "4 steps of 4" in told.lines[0]
    assert f"{stage}: step 4, held-out loss {rows[-1]['eval_loss']:.4g}" in told.lines[-2]

    template, limits = ChatTemplate(tokenizer_of(str(folder / "target"))), LengthLimits(2048, None, "drop")
    read = {"sft": sft_rows, "preference": preference_rows}[stage]
    data = read(folder / "pairs" / f"{stage}.jsonl", template, limits)
    held = held_out.split(data.rows, Training.model_validate({"learning_rate": 1, "eval": 5}), 0, stage).held

    def sums(model, row):
        return [
            torch.log_softmax(model(torch.tensor([[*one.prompt, *one.response]])).logits[0], -1)[
                torch.arange(len(one.prompt) - 1, len(one.prompt) + len(one.response) - 1), torch.tensor(one.response)
            ].sum()
            for one in row.responses
        ]

    with torch.no_grad():
        after = AutoModelForCausalLM.from_pretrained(folder / "train" / stage)
        before = AutoModelForCausalLM.from_pretrained(folder / "target")
        if stage == "sft":
            expected = -sum(sums(after, row)[0] for row in held) / sum(len(row.answers[0]) for row in held)
        else:
            ratios = [torch.stack(sums(after, row)) - torch.stack(sums(before, row)) for row in held]
            # WRPO's end: alpha 0.1, beta 0.01
            margins = [0.01 * (0.1 * source + 0.9 * own - rejected) for source, own, rejected in ratios]
            expected = -sum(torch.nn.functional.logsigmoid(margin) for margin in margins) / len(margins)
            assert rows[-1]["eval_accuracy"] == pytest.approx(sum(margin > 0 for margin in margins).item() / 5)
            assert rows[-1]["eval_margin"] == pytest.approx((sum(margins) / 5).item(), rel=1e-3)
            assert rows[0]["eval_margin"] == pytest.approx(0, abs=1e-7)
    assert rows[-1]["eval_loss"] == pytest.approx(expected.item(), rel=1e-4)


def test_measuring_changes_nothing(tmp_path):
    """Dropout and order are as without it."""
    target(tmp_path / "target", "gpt2", resid_pdrop=0.2)
    made = []
    for name, steps in (("often", 1), ("seldom", 4)):
        write_rows(tmp_path / name)
        settings = {"eval": 4, "eval_steps": steps, "save_steps": 100}
        train(recipe(tmp_path / name, tmp_path / "target", sft=settings), Reporter())
        made.append(weights(tmp_path / name / "train" / "sft"))
    assert all(torch.equal(tensor, made[1][name]) for name, tensor in made[0].items())


def test_the_best_of_the_last_checkpoints_is_published(folder):
    """A rate so high that the held-out loss rises again: what is published is the checkpoint with the least of it."""
    settings = {"eval": 4, "save_steps": 1, "keep": "best", "learning_rate": 0.2, "scheduler": "constant"}
    told = trained(folder, sft=settings | {"epochs": 0.6, "trainer": {"save_total_limit": 10}})
    losses = {row["step"]: row["eval_loss"] for row in log(folder / "train" / "sft") if "eval_loss" in row}
    best = min(range(1, 4), key=losses.__getitem__)
    assert best < 3, losses
    record = json.loads((folder / "train" / "sft" / "training.json").read_text())
    assert record["published"]["step"] == best and record["published"]["by"] == "eval_loss"
    assert f"sft: step {best} has the least held-out loss ({losses[best]:.4g}; " in told.lines[-2]
    shutil.move(folder / "train" / "sft", folder / "train" / "best")
    short = settings | {"keep": "last", "epochs": best / 5}
    trained(folder, sft=short)
    expected, found = weights(folder / "train" / "sft"), weights(folder / "train" / "best")
    assert all(torch.equal(tensor, found[name]) for name, tensor in expected.items())


def test_the_choice_goes_by_accuracy_then_loss_then_the_later_step(tmp_path):
    rows = [(1, 0.5, 0.9), (2, 0.7, 0.8), (3, 0.7, 0.6), (4, 0.7, 0.6), (5, 0.9, 0.1)]
    lines = [{"step": step, "eval_accuracy": accuracy, "eval_loss": loss} for step, accuracy, loss in rows]
    (tmp_path / "log").write_text("".join(json.dumps(line) + "\n" for line in [*lines, {"step": 4, "loss": 1}]))
    assert held_out.choose(tmp_path / "log", [1, 2, 3]).step == 3
    assert held_out.choose(tmp_path / "log", [2, 3, 4]).step == 4
    (tmp_path / "log").write_text("".join(json.dumps({"step": s, "eval_loss": x}) + "\n" for s, _, x in rows))
    assert held_out.choose(tmp_path / "log", [1, 2, 3]).step == 3
