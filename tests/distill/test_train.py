"""The train stage on tiny models: what it writes, what it refuses, and that it goes on where it was stopped."""

from __future__ import annotations

import json
import re
import signal
import time
from math import log as ln
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

from mergekit_lite.answers.template import ChatTemplate, LengthLimits
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.train import check, train
from mergekit_lite.distillation.training.model import tokenizer_of
from mergekit_lite.distillation.training.rows import preference_rows, sft_rows
from mergekit_lite.errors import CheckpointError, UsageError
from tests.distill import training
from tests.distill.training import Told, log, recipe, same, target, trained, weights, write_rows
from tests.processes import Forked, preload

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")
preload("mergekit_lite.distillation.training.trainer", "transformers.models.gpt2.modeling_gpt2")


@pytest.fixture
def folder(tmp_path):
    target(tmp_path / "target")
    write_rows(tmp_path)
    return tmp_path


def test_both_stages(folder):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    stages = {"sft": {"epochs": 2}, "preference": {"epochs": 1, "log_to": ["tensorboard"]}}
    told = trained(folder, **stages)
    assert told.lines[0] == "sft: 24 rows; 2 epochs in 12 steps of 4"
    sft, preference = folder / "train" / "sft", folder / "train" / "preference"
    assert sorted(path.name for path in (folder / "train").iterdir()) == ["preference", "sft"]

    sft_log = log(sft)
    assert [row["step"] for row in sft_log] == list(range(1, 13))
    assert sft_log[-1]["epoch"] == pytest.approx(2)
    assert sft_log[-1]["loss"] < sft_log[0]["loss"] and sft_log[0]["length/response"] > 2
    rows = log(preference)
    assert [row["step"] for row in rows] == list(range(1, 7))
    assert rows[0]["loss"] == pytest.approx(ln(2)) and rows[0]["rewards/rejected"] == rows[0]["alpha"] == 0
    assert rows[-1]["alpha"] == pytest.approx(0.1 * 5 / 6)
    expected = {"step", "time", "epoch", "loss", "grad_norm", "learning_rate", "accuracy", "margin", "alpha", "kl"}
    expected |= {"tokens_per_second", "peak_memory"}
    expected |= {f"{what}/{role}" for what in ("length", "rewards") for role in ("source", "target", "rejected")}
    assert rows[0].keys() == expected | {"accuracy/source", "accuracy/target"}
    assert list((preference / "runs").iterdir())

    for made in (sft, preference):
        model = AutoModelForCausalLM.from_pretrained(made)
        assert model.dtype == torch.float32
        assert (
            AutoTokenizer.from_pretrained(made).chat_template
            == AutoTokenizer.from_pretrained(folder / "target").chat_template
        )
        assert json.loads((made / "training.json").read_text())["rows"]["kept"] == 24
    before = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    assert trained(folder, **stages).lines == [f"sft: done, {sft}", f"preference: done, {preference}"]
    assert before == {path: path.stat().st_mtime_ns for path in folder.rglob("*")}


@pytest.mark.parametrize("in_order", [False, True])
def test_sft_is_the_mean_over_the_tokens_of_a_batch(folder, in_order):
    """A step with plain gradient descent, beside the same step done by hand on whole logits."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    from mergekit_lite.answers.template import ChatTemplate
    from mergekit_lite.distillation.training.rows import order

    descent = {"optim": "sgd", "max_grad_norm": 0}
    stage = {"epochs": 4 / 24, "learning_rate": 0.1, "warmup_ratio": 0, "scheduler": "constant", "trainer": descent}
    trained(folder, sft={**stage, "in_order": in_order})
    model = AutoModelForCausalLM.from_pretrained(folder / "target")
    template = ChatTemplate(AutoTokenizer.from_pretrained(folder / "target"))
    lines = (folder / "pairs" / "sft.jsonl").read_text().splitlines()
    total, tokens = 0.0, 0
    for place in range(4) if in_order else order(24, 4, 0, "sft"):
        row = json.loads(lines[place])
        prompt, response = template.tokens(row["messages"], row["response"])
        logits = model(torch.tensor([[*prompt, *response]])).logits[0, len(prompt) - 1 : -1]
        total += torch.nn.functional.cross_entropy(logits, torch.tensor(response), reduction="sum")
        tokens += len(response)
    (total / tokens).backward()
    expected = {name: parameter - 0.1 * parameter.grad for name, parameter in model.named_parameters()}
    same(expected, weights(folder / "train" / "sft"), rtol=1e-4, atol=1e-6)
    assert log(folder / "train" / "sft")[0]["loss"] == pytest.approx((total / tokens).item(), rel=1e-4)


def test_how_a_batch_is_cut_changes_nothing(folder, tmp_path):
    """Rows one by one, or all at once, with activations kept or computed again."""
    made = {}
    for size, again in ((1, False), (4, True)):
        stages = {"sft": {"epochs": 1 / 3}, "preference": {"epochs": 1 / 3}}
        extra = {"per_device_batch_size": size, "gradient_checkpointing": again}
        write_rows(tmp_path / str(size))
        train(recipe(tmp_path / str(size), folder / "target", **{k: v | extra for k, v in stages.items()}), Reporter())
        made[size] = tmp_path / str(size) / "train"
    for stage in ("sft", "preference"):
        same(weights(made[1] / stage), weights(made[4] / stage), rtol=1e-3, atol=2e-5)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft below
def test_lora(folder):
    """The adapter by itself on the model it started from is what the folder's weights are."""
    import peft
    from transformers import AutoModelForCausalLM

    trained(folder, sft={"lora": {"rank": 4, "alpha": 8}, "learning_rate": 1e-2})
    made = folder / "train" / "sft"
    base = AutoModelForCausalLM.from_pretrained(folder / "target")
    merged = peft.PeftModel.from_pretrained(base, made / "adapter").merge_and_unload().state_dict()
    found = weights(made)
    same({name: merged[name] for name in found}, found, atol=1e-6)
    started = weights(folder / "target")
    changed = {name for name in found if not torch.equal(found[name], started[name])}
    assert changed and all("proj" in name for name in changed)


def test_a_preference_adapter_goes_on_from_merged_sft(folder):
    trained(folder, sft={"lora": {"rank": 4}, "epochs": 0.5}, preference={"lora": {"rank": 4}, "epochs": 0.5})
    assert log(folder / "train" / "preference")[0]["loss"] == pytest.approx(ln(2))


def test_changed_settings_are_refused(folder):
    trained(folder, sft={"epochs": 0.5})
    trained(folder, sft={"epochs": 0.5, "per_device_batch_size": 1})  # decides nothing
    with pytest.raises(
        UsageError, match=r"(?s)trained with other settings.*learning_rate: 0.001 there, 0.002 now.*anew"
    ):
        trained(folder, sft={"epochs": 0.5, "learning_rate": 2e-3})
    write_rows(folder, sft=23)
    with pytest.raises(UsageError, match="rows: "):
        trained(folder, sft={"epochs": 0.5})


def test_settings_are_the_same_when_they_come_from_a_file(folder):
    stage = {"epochs": 0.5, "options": {"weights": [1]}, "lora": {"target_modules": ["q_proj", "v_proj"]}}
    trained(folder, preference=stage)
    assert trained(folder, preference=stage).lines == [f"preference: done, {folder / 'train' / 'preference'}"]


def test_all_that_is_wrong_is_told_at_once(folder):
    stages = {
        "sft": {"trainer": {"weight_decya": 0.1, "learning_rate": 1}, "max_prompt_length": 2048},
        "preference": {"objective": "wrpo", "options": {"aplha": 1}},
    }
    with pytest.raises(UsageError) as caught:
        check(recipe(folder, folder / "target", **stages))
    text = str(caught.value)
    assert "4 problems" in text
    assert "TrainingArguments have no 'weight_decya'. Did you mean 'weight_decay'?" in text
    assert "'learning_rate' can't be set here. Use 'learning_rate' of the recipe." in text
    assert "max_prompt_length must be below max_length" in text
    assert "no option 'aplha'. Did you mean 'alpha'?" in text
    with pytest.raises(UsageError, match="no objective 'wropo'"):
        check(recipe(folder, folder / "target", preference={"objective": "wropo"}))


def test_a_target_that_can_not_be_trained_is_told_in_a_sentence(folder):
    kept = weights(folder / "target")
    name = min(kept)
    save_file({other: kept[other] for other in kept if other != name}, folder / "target" / "model.safetensors")
    with pytest.raises(CheckpointError, match=rf"is no causal language model.*\n.*no {name}"):
        trained(folder, sft={})
    config = {"model_type": "own", "auto_map": {"AutoConfig": "a.A", "AutoModelForCausalLM": "a.B"}}
    (folder / "target" / "config.json").write_text(json.dumps(config))
    with pytest.raises(CheckpointError, match=r"code of its own, .* only architectures that transformers has"):
        trained(folder, sft={})


def test_rows_that_cannot_be_used_are_told_and_left_out(folder):
    path = folder / "pairs" / "sft.jsonl"
    good = path.read_text().splitlines(keepends=True)
    long = json.dumps({"messages": [{"role": "user", "content": "one " * 100}], "response": "two"}) + "\n"
    path.write_text("".join(good[:6]) + "{broken\n" + '{"messages": []}\n' + long + "".join(good[6:12]))
    told = trained(folder, sft={"max_length": 90})
    assert told.lines[1] == "sft: 12 rows, left out: 1 too long, 2 malformed; 1 epochs in 3 steps of 4"
    assert f"{path}:7: not JSON" in told.lines[0] and f"{path}:8: response: Field required" in told.lines[0]


def test_a_row_with_several_rejected_answers_is_as_many_rows(folder, tmp_path):
    path, apart = folder / "pairs" / "preference.jsonl", tmp_path / "apart.jsonl"
    lines = [json.loads(line) for line in path.read_text().splitlines()[:8]]
    rejected = [line["rejected"][0] for line in lines]
    for number, line in enumerate(lines):
        line["rejected"] = rejected[: number % 4]
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    rows = [line | {"rejected": [one]} for line in lines for one in line["rejected"]]
    apart.write_text("".join(json.dumps(row) + "\n" for row in rows))
    template, limits = ChatTemplate(tokenizer_of(str(folder / "target"))), LengthLimits(2048, 1024, "drop")
    found = preference_rows(path, template, limits)
    assert len(found.rows) == 12 and found.rows == preference_rows(apart, template, limits).rows
    refused = "expected one or more chosen responses, and one or more rejected, got 2 chosen and 0 rejected"
    assert found.problems == [f"{path}:{number}: {refused}" for number in (1, 5)]


def test_an_answer_that_was_cut_has_no_end_of_turn(folder):
    template, limits = ChatTemplate(tokenizer_of(str(folder / "target"))), LengthLimits(2048, 1024, "drop")
    for name, read in (("sft", sft_rows), ("preference", preference_rows)):
        path = folder / "pairs" / f"{name}.jsonl"
        line = json.loads(path.read_text().splitlines()[0])
        ends = []
        for cut in (False, True):
            last = line if name == "sft" else line["rejected"][0]
            last["cut"] = cut
            path.write_text(json.dumps(line) + "\n")
            (row,) = read(path, template, limits).rows
            ends.append(list(row.answers[-1]))
        assert ends[0] == [*ends[1], template.tokenizer.eos_token_id]


def test_wrpo_needs_sources_and_the_target(folder):
    write_rows(folder, chosen=("source",))
    with pytest.raises(UsageError, match="wrpo needs sources' chosen responses and one of the target in every row"):
        trained(folder, preference={})
    with pytest.raises(UsageError, match="Set batch_size to 24 at most"):
        trained(folder, preference={"objective": "dpo", "batch_size": 25})


@pytest.mark.parametrize("objective", ["simpo", "wpo"])
def test_objectives_that_need_less_or_more(folder, objective):
    trained(folder, preference={"objective": objective, "epochs": 0.5})
    rows = log(folder / "train" / "preference")
    assert ("kl" in rows[0]) == (objective == "wpo")
    assert not (folder / "train" / "preference.partial").exists()


def test_sixteen_bits_and_waiting_for_rows(folder):
    (folder / "pairs" / "preference.jsonl").unlink()
    told = trained(folder, sft={"epochs": 0.5, "dtype": "bfloat16"}, preference={})
    assert {tensor.dtype for tensor in weights(folder / "train" / "sft").values()} == {torch.bfloat16}
    assert told.lines[-1].startswith("preference: waits for ")
    assert not (folder / "train" / "preference").exists()


def here(path: Path) -> list[str]:
    """Train in this process; what it told."""
    told = Told()
    train(Recipe.model_validate_json(path.read_text()), told)
    return told.lines


def killed_once(path: Path, there: Path) -> str:
    """Train in a process, and kill it the moment a file or folder exists; what it had told."""
    with Forked(path.parent, training.main, path) as process:
        while not there.exists():
            assert process.running, process.end()
            time.sleep(0.002)
        process.send(signal.SIGKILL)
        return process.end().stdout


def finished(path: Path) -> str:
    """Train in a process; what it told."""
    with Forked(path.parent, training.main, path) as process:
        ended = process.end()
        assert ended.returncode == 0, ended.stderr
        return ended.stdout


def test_a_killed_run_ends_with_the_same_weights(tmp_path):
    """Killed while checkpoints are written, in both stages, and while the reference is computed."""
    target(tmp_path / "target", "gpt2", resid_pdrop=0.2)  # dropout: the state of random numbers matters
    stages = {"sft": {"save_steps": 2}, "preference": {"save_steps": 1}}
    for name in ("whole", "killed"):
        write_rows(tmp_path / name)
        (tmp_path / f"{name}.json").write_text(recipe(tmp_path / name, tmp_path / "target", **stages).model_dump_json())
    killed = tmp_path / "killed" / "train"
    moments = (
        "sft.partial/checkpoint-4/optimizer.pt",
        "preference.partial/reference/0.jsonl",
        "preference.partial/checkpoint-3/trainer_state.json",
    )
    told = [killed_once(tmp_path / "killed.json", killed / there) for there in moments]
    told.append(finished(tmp_path / "killed.json"))
    assert not any("goes on" in text for text in (told[0], *here(tmp_path / "whole.json")))
    assert re.search("sft: goes on after step [24] of 6", told[1])  # 4 where the kill came late
    assert "sft: done" in told[2] and "goes on" not in told[2]
    assert "preference: goes on after step" in told[3]
    for stage in ("sft", "preference"):
        same(weights(tmp_path / "whole" / "train" / stage), weights(killed / stage))
        steps = [row["step"] for row in log(killed / stage)]
        assert steps == [1, 2, 3, 4, 5, 6]


QUANTISED = pytest.param({"base": "nf4"}, marks=pytest.mark.slow)


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft below
@pytest.mark.parametrize("kind", [{"rslora": True, "dora": True, "modules_to_save": ["embed_tokens"]}, QUANTISED])
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning")  # of peft below
def test_kinds_of_adapters(tmp_path, kind, tied):
    """The folder's weights answer as the adapter does beside the model it started from, which is never quantised."""
    import peft
    from transformers import AutoModelForCausalLM

    if "base" in kind:
        pytest.importorskip("bitsandbytes")
    target(tmp_path / "target", "cohere" if tied else "llama")
    write_rows(tmp_path)
    trained(tmp_path, sft={"lora": {"rank": 4, **kind}, "learning_rate": 1e-2, "epochs": 1 / 3})
    made = tmp_path / "train" / "sft"
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "target")
    ids = torch.arange(1, 40)[None]
    before = base(ids).logits
    adapted = peft.PeftModel.from_pretrained(base, made / "adapter").eval()
    assert adapted.peft_config["default"].use_rslora == adapted.peft_config["default"].use_dora == ("base" not in kind)
    merged = AutoModelForCausalLM.from_pretrained(made)(ids).logits
    torch.testing.assert_close(adapted(ids).logits, merged, rtol=1e-4, atol=1e-4)
    assert (merged - before).abs().max() > 1e-2
    assert {tensor.dtype for tensor in weights(made).values()} == {torch.float32}


def test_what_is_not_installed_is_told_early(folder, monkeypatch):
    monkeypatch.setattr("mergekit_lite.distillation.training.model.find_spec", lambda name: None)
    stage = {"attn_implementation": "flash_attention_2", "lora": {"base": "nf4"}}
    with pytest.raises(UsageError) as caught:
        check(recipe(folder, folder / "target", sft=stage))
    for text in ("needs the package flash-attn", "set dtype to bfloat16", "pip install bitsandbytes"):
        assert text in str(caught.value)


def test_rows_of_like_length_lie_together_within_a_step():
    from array import array

    from mergekit_lite.distillation.training.rows import TrainingRow
    from mergekit_lite.distillation.training.trainer import OrderedRows

    rows = [TrainingRow(array("i", range(length)), (array("i", [1]),), ("source",)) for length in (3, 9, 1, 7, 5, 2)]
    ordered = OrderedRows(rows, [0, 1, 2, 3, 5, 4, 2, 1])
    ordered.group(4)
    assert [len(row.prompt) for row in map(ordered.__getitem__, range(8))] == [9, 7, 3, 1, 9, 5, 2, 1]


@pytest.mark.parametrize("packing", [True, False])
def test_other_models_are_padded(folder, tmp_path, packing):
    """A model that packs is not padded unless told; the losses are the same."""
    from mergekit_lite.distillation.training.model import layout_of, trained_model

    for architecture, layout in {"llama": "shared", "bloom": "padded"}.items():
        stage = recipe(folder, target(tmp_path / architecture, architecture), sft={"packing": packing}).train.sft
        model = trained_model(str(tmp_path / architecture), stage, dropout=False, seed=0)
        assert layout_of(model) == (layout if packing else "padded")
