"""On-policy training beside TRL's own code, where it is installed: a whole step, and the clipped loss.

TRL's stable DistillationTrainer takes the reverse KL over the whole vocabulary: another estimator of the same gradient.
Its IWOPDTrainer has the one of sampled tokens, times weights by position that ``iw_opd_gamma`` 0 turns off; it divides
logits by the temperature, which is 1 here. Its GRPO trainer takes advantages by token, with PPO's clipped ratios.
"""

from __future__ import annotations

from collections import defaultdict
from types import SimpleNamespace

import pytest
import torch

from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.objectives.on_policy import policy_gradient
from mergekit_lite.distillation.training.workspace import Workspace
from tests.distill.on_policy import PLAIN, WORDS, recipe, rows, teacher, trained
from tests.distill.training import log, weights
from tests.tokenizers import tokenizer

pytest.importorskip("trl")
pytestmark = pytest.mark.filterwarnings("ignore")  # TRL's and its libraries'


def batch_of(folder) -> dict[str, torch.Tensor]:
    """The answers of the first round as TRL's collator lays them out."""
    template = ChatTemplate(tokenizer())
    pairs = [
        (template.prompt([{"role": "user", "content": f"What is {WORDS[int(prompt)]}?"}]), row["tokens"])
        for (prompt, _), row in rows(folder, 1, "answers").items()
    ]
    width, longest = max(len(prompt) for prompt, _ in pairs), max(len(answer) for _, answer in pairs)
    shape = (len(pairs), width + longest)
    ids, mask = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    labels = torch.full(shape, -100)
    for place, (prompt, answer) in enumerate(pairs):
        whole = slice(width - len(prompt), width + len(answer))
        ids[place, whole] = torch.tensor([*prompt, *answer])
        mask[place, whole] = 1
        labels[place, width : width + len(answer)] = torch.tensor(answer)
    assert len({len(prompt) for prompt, _ in pairs}) == 1  # TRL finds the prompts' width by the numbers of tokens
    return {"input_ids": ids, "attention_mask": mask, "labels": labels}


def test_a_step_is_that_of_trl(tmp_path, monkeypatch):
    from datasets import Dataset
    from transformers import AutoModelForCausalLM
    from trl.experimental.iw_opd import IWOPDConfig, IWOPDTrainer

    monkeypatch.setattr(Workspace, "tidy", lambda self: None)
    torch.set_num_threads(1)
    settings = {"rounds": 1, "samples": 4, "learning_rate": 0.1, "trainer": PLAIN}
    made = recipe(tmp_path, [teacher(tmp_path / "strong")], **settings, prompts=2, batch_size=8)
    asked = (tmp_path / "asked.jsonl").read_text().splitlines(keepends=True)
    (tmp_path / "asked.jsonl").write_text("".join(asked[:2]))  # of equal length
    trained(made)

    config = IWOPDConfig(
        output_dir=str(tmp_path / "trl"),
        use_cpu=True,
        bf16=False,
        report_to=[],
        distillation_objective="iw_opd",
        iw_opd_gamma=0.0,
        temperature=1.0,
    )
    model, strong = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("target", "strong"))
    trainer = IWOPDTrainer(
        model=model,
        teacher_model=strong,
        args=config,
        train_dataset=Dataset.from_list([{"messages": [{"role": "user", "content": "What"}]}]),
        processing_class=tokenizer(),
    )
    trainer.model.train()  # without dropout it is the same
    trainer.compute_loss(trainer.model, batch_of(tmp_path)).backward()
    out = tmp_path / "out" / "train" / "on_policy"
    (row,) = log(out)
    assert row["loss"] == pytest.approx(-row["advantage/mean"], rel=1e-5)  # r is 1
    found = weights(out)
    for name, parameter in trainer.model.named_parameters():
        torch.testing.assert_close(found[name], parameter.detach() - 0.1 * parameter.grad, rtol=1e-4, atol=2e-6)
    advantages = trainer._metrics["train"]["iw_opd/mean_advantage"]
    assert row["advantage/mean"] == pytest.approx(advantages[0], rel=1e-4)


@pytest.mark.parametrize("clip", [0.2, 1e9])
def test_clipped_losses_are_those_of_grpo(clip):
    """The loss over the tokens of a batch, its gradient, and which tokens are clipped; 1e9 is without a bound."""
    from trl import GRPOTrainer

    torch.manual_seed(0)
    log_probs = (-torch.rand(3, 5)).requires_grad_()
    drawn, advantages = -torch.rand(3, 5), torch.randn(3, 5)
    mask = torch.tensor([[1, 1, 1, 1, 1], [1, 1, 0, 0, 0], [1, 1, 1, 1, 0]])
    ids = torch.zeros(3, 5, dtype=torch.long)
    same = SimpleNamespace(gather=lambda values: values, reduce=lambda values, reduction: values, num_processes=1)
    stand_in = SimpleNamespace(
        _get_per_token_logps_and_entropies=lambda *_, **__: (log_probs, torch.zeros(3, 5), None),
        aux_loss_enabled=False,
        top_entropy_quantile=1.0,
        off_policy_mask_threshold=None,
        importance_sampling_level="token",
        beta=0.0,
        loss_type="bnpo",
        epsilon_low=clip,
        epsilon_high=clip,
        args=SimpleNamespace(delta=None),
        use_vllm=False,
        vllm_importance_sampling_correction=False,
        model=SimpleNamespace(training=True),
        current_gradient_accumulation_steps=1,
        _entropy_bonus_enabled=False,
        accelerator=same,
        _metrics={"train": defaultdict(list)},
    )
    inputs = {
        "prompt_ids": ids,
        "prompt_mask": torch.ones_like(ids),
        "completion_ids": ids,
        "completion_mask": mask,
        "advantages": advantages,
        "old_per_token_logps": drawn,
    }
    theirs = GRPOTrainer._compute_loss(stand_in, None, inputs)
    (expected,) = torch.autograd.grad(theirs, log_probs)
    kept = mask.bool()
    ours = policy_gradient(log_probs[kept], drawn[kept], advantages[kept], None if clip > 1 else clip)
    (found,) = torch.autograd.grad(ours.losses.mean(), log_probs)
    torch.testing.assert_close(ours.losses.mean(), theirs)
    torch.testing.assert_close(found, expected)
    share = stand_in._metrics["train"]["clip_ratio/region_mean"][0]
    assert ours.clipped.float().mean().item() == pytest.approx(share)
