"""From random weights to models that have learnt skills, in plain PyTorch: what a distillation finds ready made."""

import random
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

import click

from demo.distill import skills
from demo.distill.models import FAMILIES, Family

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BATCH, RATE = 32, 3e-3


def dialogue(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def batch_of(
    demonstrations: list[tuple[str, str]], tokenizer: "PreTrainedTokenizerFast"
) -> tuple["torch.Tensor", "torch.Tensor"]:
    """Tokens [rows, length] of questions with answers, and which of them the model has to say."""
    import torch

    chats = [dialogue(question, answer) for question, answer in demonstrations]
    prompts = [tokenizer.apply_chat_template(chat[:1], tokenize=False, add_generation_prompt=True) for chat in chats]
    texts = [tokenizer.apply_chat_template(chat, tokenize=False).rstrip("\n") for chat in chats]
    encoded = tokenizer(texts, padding=True, padding_side="right", return_tensors="pt", add_special_tokens=False)
    lengths = torch.tensor([len(tokens) for tokens in tokenizer(prompts, add_special_tokens=False).input_ids])
    said = encoded.attention_mask.bool() & (torch.arange(encoded.input_ids.shape[1]) >= lengths[:, None])
    return encoded.input_ids, said


def taught(
    model: "PreTrainedModel",
    tokenizer: "PreTrainedTokenizerFast",
    skill_names: tuple[str, ...],
    careful: float,
    steps: int,
    seed: int,
) -> Iterator[float]:
    """Train on demonstrations of these skills; yields the loss per token after each step."""
    import torch
    from torch.nn.functional import cross_entropy

    rng = random.Random(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), RATE, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, RATE, total_steps=steps, pct_start=0.1)
    for _ in range(steps):
        asked = [skills.drawn(skills.SKILLS[rng.choice(skill_names)], rng) for _ in range(BATCH)]
        tokens, said = batch_of([(q, skills.demonstrate(q, careful, rng)) for q in asked], tokenizer)
        logits = model(input_ids=tokens[:, :-1]).logits
        loss = cross_entropy(logits[said[:, 1:]], tokens[:, 1:][said[:, 1:]])
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        yield loss.item()


def make(family: Family, skill_names: tuple[str, ...], careful: float, steps: int, seed: int, out: Path) -> None:
    """Make a model of a family and write its folder."""
    import torch

    torch.set_num_threads(1)
    model, tokenizer = family.build(seed)
    *_, loss = taught(model, tokenizer, skill_names, careful, steps, seed)
    partial = out.with_name(f"{out.name}.partial")
    model.save_pretrained(partial)
    tokenizer.save_pretrained(partial)
    partial.rename(out)  # what has its name is complete
    print(f"{family.name}: {model.num_parameters() / 1e6:.2f} M parameters, loss {loss:.3f}")


@click.command()
@click.argument("family", type=click.Choice(list(FAMILIES)))
@click.option("--skills", "skill_names", required=True, help="The skills to learn, with commas.")
@click.option("--steps", type=int, required=True)
@click.option("--careful", default=1.0, show_default=True, help="The share of demonstrations with an ideal answer.")
@click.option("--seed", default=0, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model's folder.")
def main(family: str, skill_names: str, steps: int, careful: float, seed: int, out: Path) -> None:
    """Make one model: random weights, and STEPS of training on demonstrations."""
    make(FAMILIES[family], tuple(skill_names.split(",")), careful, steps, seed, out)


if __name__ == "__main__":
    main()
