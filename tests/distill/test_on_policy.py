"""On-policy distillation on tiny models: its rounds, what it writes and refuses, and that a kill costs nothing."""

from __future__ import annotations

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from mergekit_lite.answers import server
from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.alignment.groups import groups
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.on_policy import stage
from mergekit_lite.distillation.on_policy.checks import check
from mergekit_lite.distillation.on_policy.lengths import Lengths
from mergekit_lite.distillation.on_policy.student import leave_drawing_to_requests
from mergekit_lite.distillation.recipe.schema import OnPolicy, Recipe, Training
from mergekit_lite.distillation.training.workspace import Workspace
from mergekit_lite.errors import RunError, UsageError
from tests.distill import on_policy
from tests.distill.alignment import ten_tokenizers
from tests.distill.on_policy import PLAIN, log_probs, model_folder, recipe, rows, teacher, trained
from tests.distill.teaching.scoring_server import Scoring, scoring_server
from tests.distill.training import figures, log, target, weights
from tests.processes import Forked, preload
from tests.tokenizers import tokenizer

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")
preload("mergekit_lite.distillation.on_policy.trainer", "transformers.models.llama.modeling_llama")
CHAT = (
    "{% for m in messages %}<|{{ m.role }}|>{{ m.content }}{% if m.role == 'assistant' %}</s>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>{% endif %}"
)


@pytest.fixture
def kept(monkeypatch):
    """The files of rounds stay after the training."""
    monkeypatch.setattr(Workspace, "tidy", lambda self: None)


def loaded(folder: Path):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder)


def prompt_of(name: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": f"What is {on_policy.WORDS[int(name)]}?"}]


def test_a_step_by_hand(tmp_path, kept):
    """One round, one step of gradient descent, beside the same on whole logits; and all that the log and files say."""
    made = recipe(
        tmp_path, [teacher(tmp_path / "strong")], rounds=1, batch_size=8, coef=0.5, learning_rate=0.1, trainer=PLAIN
    )
    told = trained(made)
    assert told.lines[:2] == [
        "on_policy: 6 prompts; 1 round of 4 prompts × 2, 1 step of 8 each",
        "on_policy: strong reads the student's tokens",
    ]
    student, strong, template = loaded(tmp_path / "target"), loaded(tmp_path / "strong"), ChatTemplate(tokenizer())
    answers, scores, drawn = (rows(tmp_path, 1, what) for what in ("answers", "teachers/strong", "drawn"))
    assert answers.keys() == scores.keys() == drawn.keys() and len(answers) == 8
    total, ratios = torch.zeros((), dtype=torch.float64), []
    for key, answer in answers.items():
        assert tokenizer().decode(answer["tokens"], skip_special_tokens=True) == answer["text"]
        ended = answer["tokens"][-1] in (0, tokenizer().eos_token_id)  # the model's end, and the tokenizer's
        assert answer["finish"] == ("stop" if ended else "length") and len(answer["tokens"]) <= 12
        prompt = template.prompt(prompt_of(key[0]))
        own, other = (log_probs(model, prompt, answer["tokens"]) for model in (student, strong))
        torch.testing.assert_close(torch.tensor(drawn[key]["log_probs"]).double(), own.detach(), atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(torch.tensor(scores[key]["log_probs"]).double(), other, atol=1e-5, rtol=1e-5)
        ratios.append((own - other).detach())
        total = total + (own * 0.5 * ratios[-1]).sum()
    every = torch.cat(ratios)
    (total / len(every)).backward()
    found = weights(tmp_path / "out" / "train" / "on_policy")
    for name, parameter in student.named_parameters():
        torch.testing.assert_close(found[name], parameter - 0.1 * parameter.grad, rtol=1e-4, atol=2e-6)
    (row,) = log(tmp_path / "out" / "train" / "on_policy")
    assert row["ratio"] == 1 and row["round"] == 1 and "clipped" not in row
    assert row["reverse_kl"] == pytest.approx(every.mean().item(), rel=1e-4)
    assert row["advantage/mean"] == pytest.approx(-0.5 * every.mean().item(), rel=1e-4)
    assert row["advantage/std"] == pytest.approx(0.5 * every.std(unbiased=False).item(), rel=1e-4)
    assert row["length/response"] == len(every) / 8


@pytest.mark.slow
def test_rounds_draw_anew_and_come_nearer(tmp_path, kept):
    settings = {"rounds": 6, "prompts": 6, "samples": 8, "batch_size": 24, "per_device_batch_size": 24, "clip": 0.2}
    trained(recipe(tmp_path, [teacher(tmp_path / "strong")], learning_rate=5e-3, **settings))
    found = log(tmp_path / "out" / "train" / "on_policy")
    assert [row["round"] for row in found] == [number for number in range(1, 7) for _ in range(2)]
    assert [row["ratio"] == 1 for row in found] == [True, False] * 6  # exactly, at the first step of each round
    assert all(row["clipped"] == 0 for row in found[::2]) and any(row["clipped"] > 0 for row in found)
    kls = [row["reverse_kl"] for row in found]
    assert sum(kls[-3:]) < 0.9 * sum(kls[:3])
    texts = [{key: row["text"] for key, row in rows(tmp_path, number, "answers").items()} for number in (1, 2)]
    assert texts[0].keys() == texts[1].keys() and texts[0] != texts[1]


def test_teachers_by_domain_and_their_mean(tmp_path, kept):
    """Two for both domains, one of them for one only: there a token's log-ratio is the mean of both."""
    teachers = [teacher(tmp_path / "all"), teacher(tmp_path / "b-only", seed=2, domains=["b"])]
    trained(recipe(tmp_path, teachers, rounds=1, batch_size=12, prompts=6))
    first, second = (rows(tmp_path, 1, f"teachers/{name}") for name in ("all", "b-only"))
    drawn = rows(tmp_path, 1, "drawn")
    assert len(first) == 12 and second.keys() == {key for key in first if int(key[0]) % 2}
    ratios, by_teacher = [], {"all": [], "b-only": []}
    for key, row in drawn.items():
        each = [
            torch.tensor(row["log_probs"]) - torch.tensor(of[key]["log_probs"]) for of in (first, second) if key in of
        ]
        for name, values in zip(by_teacher, each, strict=False):
            by_teacher[name].append(values)
        ratios.append(torch.stack(each).mean(0))
    (found,) = log(tmp_path / "out" / "train" / "on_policy")
    assert found["reverse_kl"] == pytest.approx(torch.cat(ratios).mean().item(), rel=1e-5)
    for name, values in by_teacher.items():
        assert found[f"reverse_kl/{name}"] == pytest.approx(torch.cat(values).mean().item(), rel=1e-5)


@pytest.mark.slow
def test_tokens_that_the_tokenizer_does_not_have(tmp_path):
    """The student's head has 40 rows more than there are tokens, the teacher's has not."""
    target(tmp_path / "target")
    told = trained(recipe(tmp_path, [teacher(tmp_path / "strong")], rounds=1))
    assert any(re.search("strong: .*no tokens for a part of the text", line) for line in told.lines)


def test_a_prompt_without_a_teacher_is_left_out(tmp_path):
    told = trained(recipe(tmp_path, [teacher(tmp_path / "strong", domains=["a"])], rounds=1, prompts=3, batch_size=6))
    assert told.lines[:2] == [
        "on_policy: 3 prompts left out:\n  - no teacher teaches the domain 'b' (3×)",
        "on_policy: 3 prompts; 1 round of 3 prompts × 2, 1 step of 6 each",
    ]


@pytest.mark.parametrize("spread", ["even", pytest.param("whole", marks=pytest.mark.slow)])
def test_a_teacher_with_another_tokenizer(tmp_path, kept, spread):
    """Chunks, beside the groups computed here from whole logits; answers with special tokens inside are left out."""
    own, other = ten_tokenizers.tokenizer("sentencepiece", CHAT), ten_tokenizers.tokenizer("llama-3", CHAT)
    model_folder(tmp_path / "target", own, 0)
    made = recipe(
        tmp_path, [teacher(tmp_path / "strong", made=other)], rounds=1, samples=8, batch_size=32, spread=spread
    )
    told = trained(made)
    assert "on_policy: strong has a tokenizer of its own: chunks" in told.lines
    answers, scores, drawn = (rows(tmp_path, 1, what) for what in ("answers", "teachers/strong", "drawn"))
    refused = {key for key, row in scores.items() if "why" in row}
    assert drawn.keys() == scores.keys() - refused and len(drawn) > 8
    assert not refused or any(f"{len(refused)} answer" in line and "left out" in line for line in told.lines)
    strong = loaded(tmp_path / "strong")
    tokens, total = 0, 0.0
    for key in drawn:
        answer = answers[key]
        prompt, response = ChatTemplate(other).tokens(
            prompt_of(key[0]), answer["text"], cut=answer["finish"] == "length"
        )
        met = groups(
            response_ends(own, answer["tokens"], answer["text"]), response_ends(other, response, answer["text"])
        )
        theirs = log_probs(strong, prompt, response).detach()
        mine = torch.tensor(drawn[key]["log_probs"]).double()
        for number in range(met.count):
            inside = torch.tensor(met.student == number)
            ratio = mine[inside].sum() - theirs[torch.tensor(met.teacher == number)].sum()
            total += (ratio if spread == "even" else ratio * inside.sum()).item()
            tokens += int(inside.sum())
    assert any(row["finish"] == "stop" for row in answers.values())  # ends of turns meet, too
    if len(drawn) == 32:  # else some were taken twice
        (found,) = log(tmp_path / "out" / "train" / "on_policy")
        assert found["reverse_kl"] == pytest.approx(total / tokens, rel=1e-4)


@pytest.mark.slow
def test_a_student_that_is_served(tmp_path, monkeypatch, kept):
    """Its weights are written and served anew each round; what it says is tokenised as the template has it."""
    written = []
    monkeypatch.setattr(stage, "leave_drawing_to_requests", written.append)
    script = Path(__file__).with_name("serving.py")
    served = {"name": "target", "model": "target", "serve": f"{sys.executable} {script} {{model}} {{port}} weights"}
    told = trained(recipe(tmp_path, [teacher(tmp_path / "strong")], source=served))
    assert any(line.startswith("on_policy: round 2 of 2") for line in told.lines)
    said = [{row["text"].split()[1] for row in rows(tmp_path, number, "answers").values()} for number in (1, 2)]
    assert len(said[0]) == len(said[1]) == 1 and said[0] != said[1]
    for row in rows(tmp_path, 1, "answers").values():
        expected = ChatTemplate(tokenizer()).tokens(prompt_of("0"), row["text"]).response
        assert tuple(row["tokens"]) == expected
    assert [row["ratio"] == 1 for row in log(tmp_path / "out" / "train" / "on_policy")] == [True, False] * 2
    assert written == [tmp_path / "out" / "train" / "on_policy.partial" / "answering"] * 2
    assert not written[0].exists()


@pytest.mark.slow
def test_two_processes_are_as_good_as_one(tmp_path):
    """Each draws, scores and trains on its share. The same answers come of it, and the same weights but for sums."""
    strong = teacher(tmp_path / "strong")
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
        made = recipe(tmp_path / name, [strong], per_device_batch_size=1)
        (tmp_path / f"{name}.json").write_text(made.model_dump_json())
    trained(Recipe.model_validate_json((tmp_path / "one.json").read_text()))
    launch = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", "2", "--standalone"]
    command = [*launch, "-m", "tests.distill.on_policy", str(tmp_path / "two.json")]
    own = {"PYTHONPATH": str(Path(__file__).parents[2]), "OMP_NUM_THREADS": "1"}
    subprocess.run(command, env=os.environ | own, check=True, timeout=500)
    again = subprocess.run(command, env=os.environ | own, check=True, timeout=500, capture_output=True, text=True)
    assert again.stdout.count("on_policy: done") == 1, again.stdout  # one of them writes and reports
    first, second = (tmp_path / name / "out" / "train" / "on_policy" for name in ("one", "two"))
    expected, found = weights(first), weights(second)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-3, atol=2e-5)
    for mine, other in zip(figures(first), figures(second), strict=True):
        assert mine == pytest.approx(other, rel=1e-3, abs=1e-5)


@pytest.mark.slow
def test_a_teacher_that_is_served(tmp_path, monkeypatch, kept):
    """By a server that fails three times in ten: the same scores as of the same model here, and nothing is lost."""
    monkeypatch.setattr(server, "FIRST_WAIT", 0.001)
    drawn = random.Random(1)
    strong = teacher(tmp_path / "strong")
    served = strong | {"top": 4, "retries": 20, "concurrency": 4}
    served.pop("batch_size")

    def mood(_: int) -> str | int | None:
        return drawn.choice(["drop", "garbage", 500, 429]) if drawn.random() < 0.3 else None

    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "target").symlink_to(tmp_path / "target")
    with scoring_server(Scoring(loaded(tmp_path / "strong"), tokenizer(), "vllm", mood)) as fake:
        told = trained(recipe(tmp_path, [served | {"server": fake.url}], rounds=1))
    assert any("made again" in line for line in told.lines)
    trained(recipe(tmp_path / "here", [strong], rounds=1))
    found, expected = (rows(folder, 1, "teachers/strong") for folder in (tmp_path, tmp_path / "here"))
    assert found.keys() == expected.keys() and len(found) == 8
    for key, row in expected.items():
        assert found[key]["log_probs"] == pytest.approx(row["log_probs"], abs=1e-4)


def test_a_teacher_that_is_not_there(tmp_path, monkeypatch, kept):
    """What the student said is kept for the next run."""
    monkeypatch.setattr(server, "FIRST_WAIT", 0.001)
    strong = teacher(tmp_path / "strong", server="http://127.0.0.1:9/v1", retries=1)
    strong.pop("batch_size")
    with pytest.raises(RunError, match=r"strong, served at .*: no connection"):
        trained(recipe(tmp_path, [strong], rounds=1))
    assert len(rows(tmp_path, 1, "answers")) == 8


@pytest.mark.slow
@pytest.mark.parametrize("lora", [{"rank": 4}, None])
def test_adapters_and_sixteen_bits(tmp_path, lora):
    settings = {"dtype": "bfloat16", "lora": lora, "learning_rate": 1e-2, "gradient_checkpointing": lora is not None}
    trained(recipe(tmp_path, [teacher(tmp_path / "strong")], **settings))
    made = tmp_path / "out" / "train" / "on_policy"
    found = log(made)
    assert [row["ratio"] == 1 for row in found] == [True, False] * 2
    assert (made / "adapter").is_dir() == (lora is not None)
    assert {tensor.dtype for tensor in weights(made).values()} == {torch.bfloat16}


def killed_once(path: Path, there: Path) -> str:
    """Train in a process, and kill it the moment a file is there and has something in it; what it had told."""
    with Forked(path.parent, on_policy.main, path) as process:
        while not (there.exists() and there.stat().st_size):
            assert process.running, process.end()
            time.sleep(0.001)
        process.send(signal.SIGKILL)
        return process.end().stdout


ALL = pytest.param(
    [
        "rounds/0001/answers/0.jsonl",
        "rounds/0001/teachers/strong/0.jsonl",
        "rounds/0002/drawn/0.jsonl",
        "checkpoint-6/trainer_state.json",
        "rounds/0003/answers/0.jsonl",
    ],
    marks=pytest.mark.slow,
)


@pytest.mark.parametrize("moments", [["rounds/0002/teachers/strong/0.jsonl"], ALL])
def test_a_killed_run_ends_with_the_same_weights(tmp_path, moments):
    """Killed while the student answers, while the teacher scores, at log π₀, and between steps of a round."""
    strong = teacher(tmp_path / "strong", batch_size=1)
    for name in ("whole", "killed"):
        (tmp_path / name).mkdir()
        made = recipe(tmp_path / name, [strong], rounds=3, save_steps=3, samples=3, batch_size=3)  # 4 steps a round
        (tmp_path / f"{name}.json").write_text(made.model_dump_json())
    partial = tmp_path / "killed" / "out" / "train" / "on_policy.partial"
    told = [killed_once(tmp_path / "killed.json", partial / there) for there in moments]
    with Forked(tmp_path, on_policy.main, tmp_path / "killed.json") as process:
        ended = process.end()
    assert ended.returncode == 0, ended.stderr
    assert "goes on after step" not in told[0] and "goes on after step" in ended.stdout
    trained(Recipe.model_validate_json((tmp_path / "whole.json").read_text()))
    results = [tmp_path / name / "out" / "train" / "on_policy" for name in ("whole", "killed")]
    expected, found = map(weights, results)
    assert expected.keys() == found.keys()
    assert all(torch.equal(expected[name], found[name]) for name in expected)
    assert figures(results[0]) == figures(results[1]) and len(figures(results[0])) == 12
    assert not partial.exists()


def test_what_was_done_is_not_done_again_and_other_settings_are_refused(tmp_path):
    strong = teacher(tmp_path / "strong")
    trained(recipe(tmp_path, [strong], rounds=1))
    done = f"on_policy: done, {tmp_path / 'out' / 'train' / 'on_policy'}"
    assert trained(recipe(tmp_path, [strong | {"batch_size": 1}], rounds=1)).lines == [done]
    with pytest.raises(UsageError, match=r"(?s)other settings.*coef: 1.0 there, 2.0 now"):
        trained(recipe(tmp_path, [strong], rounds=1, coef=2.0))
    teacher(tmp_path / "strong", seed=5)
    with pytest.raises(UsageError, match=r"teachers\.strong\.weights: "):
        trained(recipe(tmp_path, [strong], rounds=1))


def test_all_that_is_wrong_is_told_at_once(tmp_path):
    wrong = {
        "trainer": {"weight_decya": 0.1},
        "eval": 2,
        "too_long": "cut",
        "lora": {"dropout": 0.1},
        "sampling": {"max_tokens": 200, "extra_body": {"a": 1}},
        "batch_size": 9,
    }
    source = {"name": "target", "model": "m", "server": "http://127.0.0.1:9/v1"}
    strong = {"name": "strong", "model": str(tmp_path / "nowhere")}
    found = check(recipe(tmp_path, [strong], source=source, **wrong))
    expected = [
        "TrainingArguments have no 'weight_decya'",
        "leave no room for a prompt in max_length, 200",
        "holds no prompts out",
        "too_long: cut would train on other prompts",
        "dropout would change the model",
        "8 answers of a round don't fill a batch of 9",
        "its `server` would go on with the weights of the first round",
    ]
    assert len(found) == len(expected)
    for text, problem in zip(expected, found, strict=True):
        assert text in problem
    assert any("'extra_body' is for a server" in problem for problem in check(recipe(tmp_path, [strong], **wrong)))


def test_teachers_are_looked_at_before_anything_is_written(tmp_path):
    with pytest.raises(UsageError, match=r"strong: .*nowhere is no folder"):
        trained(recipe(tmp_path, [{"name": "strong", "model": str(tmp_path / "nowhere")}]))
    assert not (tmp_path / "out" / "train").exists()


def test_a_round_that_nothing_can_be_learnt_from_says_what_to_do_and_goes_on_once_it_is_done(tmp_path):
    made = recipe(tmp_path, [teacher(tmp_path / "strong")], rounds=1)
    config = tmp_path / "strong" / "config.json"
    whole = config.read_text()
    config.write_text(json.dumps(json.loads(whole) | {"max_position_embeddings": 4}))
    partial = tmp_path / "out" / "train" / "on_policy.partial"
    for _ in range(2):  # the same again
        with pytest.raises(RunError) as ended:
            trained(made)
        assert "on_policy: round 1 of 1: none of its 8 answers can be learnt from" in str(ended.value)
        assert "strong: it is longer than the 4 tokens that the model takes (8×)" in str(ended.value)
        assert f"delete {partial / 'rounds' / '0001' / 'teachers'}" in str(ended.value)
    config.write_text(whole)
    shutil.rmtree(partial / "rounds" / "0001" / "teachers")
    trained(made)
    assert (tmp_path / "out" / "train" / "on_policy").exists()


def test_too_few_prompts(tmp_path):
    with pytest.raises(UsageError, match="7 prompts in a round, and there are 6"):
        trained(recipe(tmp_path, [teacher(tmp_path / "strong")], prompts=7))


def test_a_server_takes_nothing_but_tokens_from_the_generation_configuration(tmp_path):
    leave_drawing_to_requests(tmp_path)  # there is none
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps({"top_k": 20, "repetition_penalty": 1.1, "eos_token_id": [1, 2], "do_sample": True}))
    leave_drawing_to_requests(tmp_path)
    assert json.loads(path.read_text()) == {"eos_token_id": [1, 2]}


def test_a_collapse_is_told():
    first = Lengths(10, 100.0, 0.1, 0.0)
    assert first.signs(first, 200) == {}
    assert Lengths(10, 20.0, 0.0, 0.6).signs(first, 200).keys() == {"empty", "short"}
    assert Lengths(10, 450.0, 0.8, 0.0).signs(first, 500).keys() == {"cut", "long"}
    assert re.search("100", Lengths(10, 2.0, 0.0, 0.0).signs(first, 200)["short"])


def test_the_page_has_every_key():
    page = (Path(__file__).parents[2] / "docs" / "training.md").read_text(encoding="utf-8")
    section = page.split("\n## On-policy training\n")[1].split("\n## ")[0]
    own = OnPolicy.model_fields.keys() - Training.model_fields.keys()
    assert set(re.findall(r"^\| `([a-z_0-9]+)` \|", section, re.MULTILINE)) == own
