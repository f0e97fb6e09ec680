"""DPO, IPO, WPO, SPPO, SimPO and ORPO on the same batch through TRL's own code, where it is installed.

TRL computes in float32, and differs by definition in a few places, which each test undoes: its WPO has no bound on the
weight, its ``sppo_hard`` isn't halved, its ORPO takes the likelihood term over prompt and response, so that only the
odds ratio is compared, and its SFT term (RPO's) is the mean over the tokens of a batch, not of each response.
"""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from mergekit_lite.answers.logprobs import Batch, response_log_probs
from mergekit_lite.distillation.objectives.preference import OBJECTIVES, LogProbs, Outcome
from tests.causal import causal_model
from tests.tokenizers import tokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and its libraries'
BETA = 0.3


@pytest.fixture(scope="module")
def policy():
    return causal_model(seed=1)


@pytest.fixture(scope="module")
def reference():
    return causal_model(seed=2)


def of_trl(policy, reference, folder, **options) -> tuple[float, dict[str, torch.Tensor]]:
    """The loss of TRL's trainer on its first batch, and that batch: chosen rows, then rejected ones."""
    from datasets import Dataset
    from trl import DPOConfig, DPOTrainer

    def said(role, text):
        return [{"role": role, "content": text}]

    answers = ["one", "two three", "four five one", "helpful", "one one one two", "five", "What is", "user"]
    data = [
        {"prompt": said("user", "What is " + a), "chosen": said("assistant", a), "rejected": said("assistant", b + b)}
        for a, b in zip(answers[:4], answers[4:], strict=True)
    ]
    config = DPOConfig(
        output_dir=str(folder),
        beta=BETA,
        use_cpu=True,
        bf16=False,
        report_to=[],
        per_device_train_batch_size=4,
        **options,
    )
    trainer = DPOTrainer(
        model=policy,
        ref_model=reference,
        args=config,
        train_dataset=Dataset.from_list(data),
        processing_class=tokenizer(),
    )
    batch = next(iter(trainer.get_train_dataloader()))
    trainer.model.eval()
    return trainer.compute_loss(trainer.model, batch).item(), batch


@torch.no_grad()
def ours(policy, reference, batch: dict[str, torch.Tensor], name: str, **options) -> Outcome:
    given = Batch(batch["input_ids"], batch["attention_mask"], batch["completion_mask"].bool())
    mine, theirs = response_log_probs(policy, given, squares=True), response_log_probs(reference, given)
    (chosen, rejected), (n_chosen, n_rejected) = mine.sums.chunk(2), mine.lengths.float().chunk(2)
    rows = LogProbs(
        chosen=chosen[:, None],
        rejected=rejected,
        chosen_lengths=n_chosen[:, None],
        rejected_lengths=n_rejected,
        reference_chosen=theirs.sums.chunk(2)[0][:, None],
        reference_rejected=theirs.sums.chunk(2)[1],
        chosen_squares=mine.squares.chunk(2)[0][:, None],
        rejected_squares=mine.squares.chunk(2)[1],
    )
    return OBJECTIVES[name](rows, beta=BETA, **options)


@pytest.mark.parametrize(
    ("theirs", "name", "options", "scale"),
    [
        ("sigmoid", "dpo", {}, 1),
        ("sigmoid_norm", "dpo_norm", {}, 1),
        ("ipo", "ipo", {}, 1),
        ("sppo_hard", "sppo", {}, 2),
    ],
)
def test_from_tokens_to_the_loss(policy, reference, tmp_path, theirs, name, options, scale):
    """TRL's whole trainer, its log-probabilities included, beside ours on the same tokens."""
    loss, batch = of_trl(policy, reference, tmp_path, loss_type=theirs)
    assert scale * ours(policy, reference, batch, name, **options).loss.mean().item() == pytest.approx(loss, rel=1e-5)


def test_nll(policy, reference, tmp_path):
    loss, batch = of_trl(policy, reference, tmp_path, loss_type=["sigmoid", "sft"], loss_weights=[1.0, 0.2])
    plain, added = (ours(policy, reference, batch, "dpo", nll=nll).loss for nll in (0, 0.2))
    lengths = batch["completion_mask"].sum(1).chunk(2)[0]
    mine = plain.mean() + ((added - plain) * lengths).sum() / lengths.sum()
    assert mine.item() == pytest.approx(loss, rel=1e-5)


def test_simpo():
    from trl.experimental.cpo import CPOTrainer

    device = SimpleNamespace(device="cpu")
    trainer = SimpleNamespace(
        loss_type="simpo", alpha=0.0, beta=2.0, simpo_gamma=1.0, label_smoothing=0.1, accelerator=device
    )
    averages = -torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) - 0.1
    losses, *_ = CPOTrainer.cpo_loss(trainer, *averages)
    rows = LogProbs(averages[0][:, None], averages[1], torch.ones(8, 1), torch.ones(8))
    mine = OBJECTIVES["simpo"].function(rows, beta=2.0, gamma=1.0, smoothing=0.1)
    torch.testing.assert_close(mine.loss, losses)


def test_orpo():
    from trl.experimental.orpo import ORPOTrainer

    averages = -torch.rand(2, 8, generator=torch.Generator().manual_seed(0)) - 1e-3
    trainer = SimpleNamespace(beta=0.1, accelerator=SimpleNamespace(device="cpu"))
    odds, *_ = ORPOTrainer.odds_ratio_loss(trainer, *averages)
    rows = LogProbs(averages[0][:, None], averages[1], torch.ones(8, 1), torch.ones(8))
    mine = OBJECTIVES["orpo"].function(rows, weight=0.1)
    torch.testing.assert_close(mine.loss, -averages[0] - odds)
