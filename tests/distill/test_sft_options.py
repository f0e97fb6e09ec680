"""SFT with noise on embeddings (NEFTune, SymNoise), and with judgments (CUT)."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from mergekit_lite.answers.logprobs import padded
from mergekit_lite.answers.packing import packed
from mergekit_lite.answers.template import ChatTemplate, LengthLimits, Tokens
from mergekit_lite.distillation.objectives.cut import criticised, unlikelihood
from mergekit_lite.distillation.pair import pair
from mergekit_lite.distillation.recipe.schema import Noise, Recipe, Training
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.training.model import layout_of, tokenizer_of, trained_model
from mergekit_lite.distillation.training.noise import drawn, inverse_lengths
from mergekit_lite.distillation.training.rows import sft_rows
from mergekit_lite.errors import UsageError
from tests.distill.training import STAGE, figures, log, same, target, trained, weights, write_rows

pytest.importorskip("accelerate")
pytestmark = pytest.mark.usefixtures("one_thread")
ROWS = (Tokens((5, 6, 7), (8, 9, 10, 11)), Tokens((5,), (12, 13)))
HALVES = (*ROWS, *ROWS)


@pytest.fixture
def folder(tmp_path):
    target(tmp_path / "target")
    write_rows(tmp_path, sft=8, preference=1)
    return tmp_path


def test_neftune_is_the_released_codes():
    """Its lines, on the same draws: U(−1, 1) · mask · α / √(L d), L the number of tokens without padding."""
    batch = padded(ROWS)
    embeddings = torch.randn(2, 7, 16, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    torch.manual_seed(1)
    found = drawn(embeddings, inverse_lengths(batch), Noise(alpha=5), 0).numpy()
    torch.manual_seed(1)
    uniform = torch.zeros_like(embeddings).uniform_(-1, 1).numpy()
    mask = batch.attention_mask.numpy()
    lengths = mask.sum(1)
    assert lengths.tolist() == [7, 3]
    expected = uniform * mask[:, :, None] * (5 / np.sqrt(lengths * 16))[:, None, None]
    np.testing.assert_allclose(found, expected, rtol=1e-6)
    assert (found[1, 3:] == 0).all() and (found[0] != 0).all()


@pytest.mark.parametrize("kind", ["neftune", "symnoise"])
def test_noise_is_the_same_size_packed_or_padded(kind):
    torch.manual_seed(2)
    noise, width = Noise(kind=kind, alpha=3), 64
    for batch, rows in ((padded(HALVES), 0), (packed([[row] for row in HALVES]), 1)):
        shape = (*batch.input_ids.shape, width)
        found = drawn(torch.zeros(shape), inverse_lengths(batch), noise, rows).flatten(0, 1)
        told = batch.attention_mask.bool().flatten() if rows == 0 else torch.ones(len(found), dtype=torch.bool)
        assert (found[~told] == 0).all()
        parts = found[told].split([7, 3, 7, 3])
        for part, length in zip(parts, (7, 3, 7, 3), strict=True):
            most = 3 / np.sqrt(length * width)
            assert part.abs().max() <= most * (1 + 1e-6)
            if kind == "symnoise":
                torch.testing.assert_close(part.abs(), torch.full_like(part, most))
                assert 0.3 < (part > 0).float().mean() < 0.7
            else:
                assert part.abs().mean().item() == pytest.approx(most / 2, rel=0.2)
        if kind == "symnoise":
            assert torch.equal(parts[0], -parts[2]) and torch.equal(parts[1], -parts[3])


@pytest.mark.parametrize("packing", [True, False])
def test_the_model_reads_noisy_embeddings(folder, packing, monkeypatch):
    """Sums beside transformers' own logits of inputs_embeds; without training mode there is no noise."""
    settings = Training.model_validate(STAGE | {"packing": packing})
    model = trained_model(str(folder / "target"), settings, True, 0, noise=Noise(kind="symnoise", alpha=8))
    assert layout_of(model) == ("shared" if packing else "padded")
    batch = packed([[row] for row in HALVES]) if packing else padded(HALVES)
    torch.manual_seed(3)
    given = torch.zeros(*batch.input_ids.shape, model.config.hidden_size)
    noise = drawn(given, inverse_lengths(batch), Noise(kind="symnoise", alpha=8), int(packing))
    places = noise.flatten(0, 1)[batch.attention_mask.flatten().bool() if not packing else slice(None)]
    with torch.no_grad():
        torch.manual_seed(3)
        noisy = model.train()(**vars(batch))["sums"]
        plain = model.eval()(**vars(batch))["sums"]
    from transformers import AutoModelForCausalLM

    whole = AutoModelForCausalLM.from_pretrained(folder / "target").eval()
    sizes = [len(row.prompt) + len(row.response) for row in HALVES]
    for row, added, sum_, without in zip(HALVES, places.split(sizes), noisy, plain, strict=True):
        ids = torch.tensor([[*row.prompt, *row.response]])
        for more, found in ((added, sum_), (torch.zeros_like(added), without)):
            with torch.no_grad():
                logits = whole(inputs_embeds=whole.get_input_embeddings()(ids) + more).logits[0]
            log_probs = logits.log_softmax(-1)[len(row.prompt) - 1 : -1]
            expected = log_probs.gather(1, torch.tensor(row.response)[:, None]).sum()
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    assert not torch.allclose(noisy, plain, rtol=1e-3)


def test_noise_in_training(folder, monkeypatch):
    """It changes the loss of steps, not of held-out rows; a run that was stopped ends with the same weights."""
    from mergekit_lite.distillation.training import trainer

    sft = {"epochs": 2, "save_steps": 1, "eval": 2, "batch_size": 3}
    trained(folder, sft=sft)
    plain = log(folder / "train" / "sft")
    (folder / "train" / "sft").rename(folder / "plain")
    sft["noise"] = {"kind": "symnoise", "alpha": 10}
    trained(folder, sft=sft)
    noisy = log(folder / "train" / "sft")
    whole = weights(folder / "train" / "sft"), figures(folder / "train" / "sft")
    (folder / "train" / "sft").rename(folder / "whole")
    assert noisy[0]["eval_loss"] == plain[0]["eval_loss"]
    assert noisy[1]["loss"] != pytest.approx(plain[1]["loss"], rel=1e-4)
    assert noisy[1]["length/response"] == plain[1]["length/response"]

    kept = trainer.SftTrainer.check_step

    def stopping(self, step, saved):
        kept(self, step, saved)
        if step == 3:
            raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(trainer.SftTrainer, "check_step", stopping)
        trained(folder, sft=sft)
    assert any("goes on after step 2" in line for line in trained(folder, sft=sft).lines)
    same(whole[0], weights(folder / "train" / "sft"))
    assert figures(folder / "train" / "sft") == whole[1]


def test_settings_of_earlier_runs_stay_theirs(folder):
    """A model that was trained before there was noise is taken as it is; with noise it is another."""
    trained(folder, sft={})
    settings = json.loads((folder / "train" / "sft" / "training.json").read_text())["settings"]
    assert not {"noise", "unlikelihood"} & settings.keys()
    with pytest.raises(UsageError, match=r"noise.kind: nothing there, \"neftune\" now"):
        trained(folder, sft={"noise": {}})


def test_transformers_flag_is_refused(folder):
    """It counts padding, and of rows that lie end to end the tokens of all."""
    with pytest.raises(
        UsageError, match=r"'neftune_noise_alpha' can't be set here\. Use 'train.sft.noise' of the recipe"
    ):
        trained(folder, sft={"trainer": {"neftune_noise_alpha": 5}})
    with pytest.raises(UsageError, match="noise would differ in them: give one"):
        trained(folder, sft={"noise": {}, "unlikelihood": {}})


# Log-probabilities of two answers of three tokens, with a judgment and without, and what ``unlikelihood`` of
# wwxu21/CUT (bb1d5de) returned for them, run in float64.
JUDGED = torch.tensor(
    [
        [-0.7858799241075013, -1.8378200047154103, -10.876035526837832],
        [-1.6546640737897098, -3.027747235490395, -3.6090429299508573],
    ],
    dtype=torch.float64,
)
PLAIN = torch.tensor(
    [
        [-3.250545774114437, -4.23733255294913, -4.458843201102767],
        [-0.005567522904153925, -2.948918178938065, -1.698767709580574],
    ],
    dtype=torch.float64,
)


@pytest.mark.parametrize(
    ("threshold", "weight", "means"),
    [(1.1, 1.0, (1.5043061896776415, 1.5510844704742643)), (1.2, 0.5, (1.4952936283559486, 1.5510844704742643))],
)
def test_cut_as_the_authors_code_has_it(threshold, weight, means):
    assert unlikelihood(JUDGED, PLAIN, threshold, weight).mean(1).tolist() == pytest.approx(means, rel=1e-12)


def test_cut_is_its_formula():
    draws = torch.Generator().manual_seed(0)
    judged, plain = (torch.rand(2, 50, generator=draws, dtype=torch.float64) * 0.98 + 0.01).log()
    p, q = judged.exp().numpy(), plain.exp().numpy()
    expected = [-0.7 * np.log(1 - b) if a / b > 1.3 else -np.log(b) for a, b in zip(p, q, strict=True)]
    np.testing.assert_allclose(unlikelihood(judged, plain, 1.3, 0.7).numpy(), expected, rtol=1e-10)
    hit = criticised(judged, plain, 1.3)
    assert hit.any() and not hit.all()
    inputs = judged.clone().requires_grad_(), plain.clone().requires_grad_()
    assert torch.autograd.gradcheck(lambda plain: unlikelihood(judged, plain, 1.3, 0.7), inputs[1])
    unlikelihood(*inputs, 1.3, 0.7).sum().backward()
    assert inputs[0].grad is None, "the judgment tells which tokens, and learns nothing by that"
    assert (inputs[1].grad[hit] > 0).all() and (inputs[1].grad[~hit] < 0).all()
    certain = torch.zeros(1, requires_grad=True)  # p⁻ = 1
    unlikelihood(torch.tensor([0.5]), certain).sum().backward()
    assert torch.isfinite(certain.grad).all()


def judge(folder: Path) -> None:
    path = folder / "pairs" / "sft.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    for number, row in enumerate(rows):
        row["judgment"] = [None, "one is helpful", " ", "two"][number % 4]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def tokens_of(path: Path, prompt, answer) -> np.ndarray:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(path).eval()
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([[*prompt, *answer]])).logits[0].double()
    log_probs = logits.log_softmax(-1)[len(prompt) - 1 : -1]
    return log_probs.gather(1, torch.tensor(answer)[:, None])[:, 0].numpy()


def test_cut_in_training(folder):
    """The first step's loss from transformers' own logits in both contexts; however the step is cut."""
    judge(folder)
    template = ChatTemplate(tokenizer_of(str(folder / "target")))
    rows = sft_rows(folder / "pairs" / "sft.jsonl", template, LengthLimits(2048), judged=True).rows
    assert [row.judged is not None for row in rows] == [False, True] * 4
    told = template.tokenizer.decode(rows[1].judged)
    assert "Write an answer that deserves this judgment" in told and "one is helpful" in told
    losses, hits = [], []
    for row in rows:
        answer = list(row.answers[0])
        plain = tokens_of(folder / "target", row.prompt, answer)
        if row.judged is None:
            losses.append(-plain.mean())
            continue
        judged = tokens_of(folder / "target", row.judged, answer)
        hit = judged - plain > np.log(1.05)
        hits += hit.tolist()
        unlikely = np.where(hit, -2 * np.log1p(-np.exp(plain)), -plain)
        losses.append((-judged.mean() + unlikely.mean()) / 2)
    for part in (1, 8):
        settings = {"threshold": 1.05, "weight": 2.0}
        trained(folder, sft={"unlikelihood": settings, "batch_size": 8, "per_device_batch_size": part, "epochs": 2})
        first, *_ = log(folder / "train" / "sft")
        assert first["loss"] == pytest.approx(np.mean(losses), rel=1e-4)
        assert first["criticised"] == pytest.approx(np.mean(hits))
        (folder / "train" / "sft").rename(folder / f"by-{part}")
    same(weights(folder / "by-1"), weights(folder / "by-8"), rtol=1e-3, atol=1e-5)


def test_judgments_that_can_not_be_used(folder):
    with pytest.raises(UsageError, match=r"no row of .*sft.jsonl has a 'judgment'"):
        trained(folder, sft={"unlikelihood": {}})


@pytest.mark.parametrize("length", range(18, 60, 6))
def test_both_contexts_have_the_same_answer_however_it_is_cut(folder, length):
    judge(folder)
    template = ChatTemplate(tokenizer_of(str(folder / "target")))
    limits = LengthLimits(length, too_long="cut")
    found = sft_rows(folder / "pairs" / "sft.jsonl", template, limits, judged=True)
    for row in found.rows:
        assert row.longest <= length and len(row.answers) == 1 and len(row.answers[0]) > 0


def test_given_rows_keep_judgments_and_own_answers(tmp_path):
    """Alpaca's columns with `judgment`, as CUT's data have them, and preferences with `own`."""
    path = tmp_path / "judged.json"
    rows = [{"instruction": "2 + 2?", "input": "", "output": "5", "judgment": why} for why in ("It is 4.", None)]
    path.write_text(json.dumps(rows))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": "2 + 2?", "chosen": "4", "rejected": "5", "own": "three"}) + "\n")
    given = {"sft": [{"path": str(path)}], "preference": [{"path": str(pairs)}]}
    train = {"sft": STAGE, "preference": STAGE | {"objective": "selm"}}
    pair(Recipe.model_validate({"folder": tmp_path, "target": "t", "rows": given, "train": train}), Reporter())
    sft = [json.loads(line) for line in (tmp_path / "pairs" / "sft.jsonl").read_text().splitlines()]
    assert [row.get("judgment") for row in sft] == ["It is 4.", None]
    (preference,) = (json.loads(line) for line in (tmp_path / "pairs" / "preference.jsonl").read_text().splitlines())
    assert preference["own"] == {"text": "three"}
    for wrong, told in (
        ({}, "no 'own', the model's own answer, which the objective needs"),
        ({"own": {}}, "an answer is"),
    ):
        pairs.write_text(json.dumps({"prompt": "2 + 2?", "chosen": "4", "rejected": "5", **wrong}) + "\n")
        with pytest.raises(UsageError, match=told):
            pair(Recipe.model_validate({"folder": tmp_path, "target": "t", "rows": given, "train": train}), Reporter())
