"""Objectives that need more than a pair under two models: own answers, a second reference, mixed logits."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_lite.answers.logprobs import padded, response_log_probs
from mergekit_lite.answers.template import ChatTemplate, LengthLimits, Tokens
from mergekit_lite.distillation.objectives.preference import gap_of
from mergekit_lite.distillation.training.mixing import Mixture, mixed_log_probs
from mergekit_lite.distillation.training.model import tokenizer_of
from mergekit_lite.distillation.training.rows import preference_rows
from mergekit_lite.errors import UsageError
from tests.causal import causal_model
from tests.distill.training import figures, log, same, target, trained, weights, write_rows

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")
LIMITS = LengthLimits(2048)


@pytest.fixture
def folder(tmp_path):
    target(tmp_path / "target")
    write_rows(tmp_path, sft=4, preference=12, chosen=("target",))
    return tmp_path


def first_model(folder: Path) -> Path:
    """Another model of the same tokens: what rounds began with."""
    path = target(folder / "first")
    other = causal_model(seed=5)
    other.save_pretrained(path)
    return path


def with_own(folder: Path, but: int = -1) -> None:
    """Give every preference row an own answer, apart from one."""
    path = folder / "pairs" / "preference.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        if number != but:
            row["own"] = {"text": "helpful " * (1 + number % 4)}
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def sums(path: Path, rows) -> np.ndarray:
    """Log π of all responses of all rows, by transformers' own logits."""
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    found = []
    for row in rows:
        for prompt, answer in row.responses:
            with torch.no_grad():
                logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
            log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
            found.append(log_probs.gather(1, torch.tensor(answer)[:, None]).sum().item())
    return np.array(found).reshape(len(rows), -1)


def rows_of(folder: Path, own: bool = False):
    template = ChatTemplate(tokenizer_of(str(folder / "target")))
    return preference_rows(folder / "pairs" / "preference.jsonl", template, LIMITS, own)


def losses(folder: Path) -> list[float]:
    return [row["loss"] for row in log(folder / "train" / "preference")]


def test_selm_reads_the_models_own_answers(folder):
    with_own(folder, but=3)
    told = trained(
        folder,
        preference={"objective": "selm", "options": {"beta": 1.0, "alpha": 10.0}, "batch_size": 11, "warmup_ratio": 0},
    )
    assert any("preference.jsonl:4" in line and "no 'own'" in line for line in told.lines)
    rows = rows_of(folder, own=True).rows
    assert [len(row.answers) for row in rows] == [3] * 11
    # Where training begins the log-ratios are 0, so only their gradient tells the own answers.
    assert losses(folder) == pytest.approx([np.log(2)], rel=1e-5)
    before, after = (sums(folder / place, rows) for place in ("target", "train/preference"))
    assert (after - before)[:, -1].mean() < -0.01, "own answers are to become less likely"
    first = log(folder / "train" / "preference")[0]
    assert first["length/target"] == pytest.approx(np.mean([len(row.answers[0]) for row in rows]))


def test_own_answers_are_left_alone_where_nobody_needs_them(folder):
    trained(folder, preference={"objective": "dpo", "batch_size": 12})
    without = weights(folder / "train" / "preference")
    with_own(folder)
    (folder / "train" / "preference").rename(folder / "before")
    trained(folder, preference={"objective": "dpo", "batch_size": 12})
    same(without, weights(folder / "train" / "preference"))


def test_inpo_has_two_references(folder):
    """The first step's loss from log-probabilities that transformers' own logits give under both models."""
    first = first_model(folder)
    options = {"eta": 0.1, "ratio": 0.25}
    trained(
        folder,
        preference={"objective": "inpo", "options": options, "reference": str(first), "batch_size": 12},
    )
    rows = rows_of(folder).rows
    now, reference = sums(folder / "target", rows), sums(first, rows)
    delta, of_reference = now[:, 0] - now[:, 1], reference[:, 0] - reference[:, 1]
    h = delta - 0.25 * of_reference - 0.75 * delta  # π_t is where training begins
    assert losses(folder) == pytest.approx([np.mean((h - 5) ** 2)], rel=1e-4)
    settings = json.loads((folder / "train" / "preference" / "training.json").read_text())["settings"]
    assert settings["reference"] == str(first) and settings["reference's weights"]


@pytest.mark.parametrize("objective", ["dpo", "mipo"])
def test_another_reference(folder, objective):
    first = first_model(folder)
    trained(
        folder, preference={"objective": objective, "reference": str(first), "batch_size": 12, "options": {"beta": 0.5}}
    )
    rows = rows_of(folder).rows
    now, reference = sums(folder / "target", rows), sums(first, rows)
    lengths = np.array([[len(answer) for answer in row.answers] for row in rows])
    if objective == "dpo":
        margins = 0.5 * ((now - reference)[:, 0] - (now - reference)[:, 1])
    else:
        a, ref = now / lengths, reference / lengths
        margins = 0.5 * (a[:, 0] - a[:, 1] - np.log1p(np.exp(ref[:, 0] - ref[:, 1])))
    assert losses(folder) == pytest.approx([np.log1p(np.exp(-margins)).mean()], rel=1e-5)


def test_the_start_by_its_name_is_the_default_reference(folder):
    """In the first round both are the same: inpo is then what it is without `reference`."""
    made = []
    for extra in ({}, {"reference": str(folder / "target")}):
        told = trained(folder, preference={"objective": "inpo", **extra}).lines
        assert any("inpo has one reference" in line for line in told) == (not extra)
        made.append(figures(folder / "train" / "preference"))
        (folder / "train" / "preference").rename(folder / f"before-{len(made)}")
    for one, other in zip(*made, strict=True):
        assert one == pytest.approx(other, rel=1e-4, abs=1e-4)


def test_what_can_not_be_used_is_told_before_anything_is_trained(folder, tmp_path):
    with pytest.raises(UsageError, match="reference has no effect: simpo has no reference"):
        trained(folder, preference={"objective": "simpo", "reference": str(folder / "target")})
    with pytest.raises(UsageError, match="selm needs the target's own answers, and no pairs are made of them"):
        trained(folder, preference={"objective": "selm"}, pairs={"rule": "best_worst", "score": "any"})
    with pytest.raises(UsageError, match=r"2 problems(.|\n)*no option 'betta'(.|\n)*reference: .*nowhere is no folder"):
        wrong = {"options": {"betta": 1}, "reference": str(folder / "nowhere")}
        trained(folder, sft={}, preference={"objective": "dpo"} | wrong)
    from tests.tokenizers import tokenizer

    other = target(tmp_path / "other")
    strange = tokenizer("chatml")
    strange.add_tokens(["strange"])
    strange.save_pretrained(other)
    with pytest.raises(UsageError, match=r"reference: .*other has other tokens than "):
        trained(folder, sft={}, preference={"objective": "dpo", "reference": str(other)})
    assert not (folder / "train").exists()


@pytest.mark.parametrize("share", [0.3, 1.0, 1.7])
def test_mixed_logits_beside_those_of_the_whole_batch(share, monkeypatch):
    monkeypatch.setattr("mergekit_lite.answers.logprobs.LOGITS_AT_ONCE", 1 << 10)  # several chunks
    model, reference = causal_model(seed=1), causal_model(seed=2)
    batch = padded([Tokens((5, 6, 7), (8, 9, 10, 11)), Tokens((5,), (12, 13)), Tokens((9, 8), (7, 6, 5))])
    scored = response_log_probs(model, batch)
    found = mixed_log_probs(model, batch, scored.states, Mixture(reference, share))
    with torch.no_grad():
        one, other = (each(**batch.inputs).logits.double() for each in (model, reference))
    log_probs = (share * one + (1 - share) * other).log_softmax(-1)[:, :-1]
    tokens = log_probs.gather(2, batch.input_ids[:, 1:, None])[..., 0]
    expected = (tokens * batch.responses[:, 1:]).sum(1)
    torch.testing.assert_close(found.double(), expected, rtol=1e-5, atol=1e-5)
    assert not found.requires_grad and scored.sums.requires_grad


SPA = {"objective": "spa", "options": {"window": 8, "quantile": 0.5, "smoothing": 0.4, "beta": 2.0, "start": 0.3}}


@pytest.mark.slow
def test_spa_however_a_step_is_cut(folder):
    """Nor does it matter that the logits of the same model are mixed; another mix is another loss, and DPO another."""
    made = {}
    for name, options, part in (
        ("by one", {}, 1),
        ("by four", {}, 4),
        ("of a copy", {"mix": 1.0 - 1e-9}, 4),
        ("beyond", {"mix": 3.0}, 4),
        ("without", {"smoothing": 0.0}, 4),
    ):
        preference = SPA | {"options": SPA["options"] | options, "epochs": 3, "per_device_batch_size": part}
        trained(folder, preference=preference)
        made[name] = losses(folder)
        (folder / "train" / "preference").rename(folder / name)
    assert len(made["by one"]) == 9
    for name in ("by four", "of a copy"):
        assert made[name] == pytest.approx(made["by one"], rel=1e-4)
    for name in ("beyond", "without"):
        assert made[name][:3] == pytest.approx(made["by one"][:3], rel=1e-4)  # DPO before 0.3 of the steps
        assert made[name] != pytest.approx(made["by one"], rel=1e-3)


def test_spa_goes_on_with_its_window(folder, monkeypatch):
    """Stopped after a checkpoint, it ends with the same weights, losses and gaps as without."""
    from mergekit_lite.distillation.training import preference_trainer

    told: list[float] = []
    monkeypatch.setattr(preference_trainer, "gap_of", lambda *given: told.append(gap_of(*given)) or told[-1])
    preference = SPA | {"epochs": 2, "save_steps": 2}
    trained(folder, preference=preference)
    whole, gaps = (weights(folder / "train" / "preference"), losses(folder)), list(told)
    (folder / "train" / "preference").rename(folder / "whole")
    assert gaps[0] == 0 and gaps[-1] != 0, "the window of 8 fills after two steps of 4"

    kept = preference_trainer.PreferenceTrainer.check_step

    def stopping(self, step, saved):
        kept(self, step, saved)
        if step == 5:
            raise KeyboardInterrupt

    told.clear()
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(preference_trainer.PreferenceTrainer, "check_step", stopping)
        trained(folder, preference=preference)
    told.clear()
    assert any("goes on after step 4" in line for line in trained(folder, preference=preference).lines)
    assert told == pytest.approx(gaps[-len(told) :]) and len(told) < len(gaps)
    same(whole[0], weights(folder / "train" / "preference"))
    assert losses(folder) == whole[1]
