"""Models that learn skills from demonstrations, in plain PyTorch: what the demos find ready made."""

import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING

import click

from demo.distill import skills
from demo.distill.jobs import Job, python, run

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerFast

BATCH, RATE = 32, 3e-3


@dataclass(frozen=True)
class Lesson:
    """What makes a model: of a family with random weights, or of another model.

    Attributes:
        out: the model's folder, or the adapter's.
        start: ``demo.fuse.models:llama``, one of a module's ``FAMILIES``; or a model's folder.
        skills: that are taught.
        steps: of training.
        careful: the share of demonstrations with an ideal answer.
        seed: of weights and demonstrations.
        rate: of learning, at its highest.
        rank: of a LoRA adapter that is trained instead of the model; 0 for none.
    """

    out: Path
    start: str | Path
    skills: tuple[str, ...]
    steps: int
    careful: float = 1.0
    seed: int = 0
    rate: float = RATE
    rank: int = 0

    def job(self) -> Job:
        """Return the job of this lesson."""
        options = {"skills": ",".join(self.skills)} | {
            name: getattr(self, name) for name in ("steps", "careful", "seed", "rate", "rank", "out")
        }
        words = [word for name, value in options.items() for word in (f"--{name}", value)]
        what = f"{'adapter ' if self.rank else ''}{self.out.name} learns to {', '.join(self.skills)}"
        return Job(what, python("demo.distill.making", self.start, *words))


def make_models(lessons: Iterable[Lesson], logs: Path) -> None:
    """Make the models that aren't there yet, each in a process of its own."""
    run([lesson.job() for lesson in lessons if not lesson.out.exists()], logs)


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
    rate: float = RATE,
) -> Iterator[float]:
    """Train on demonstrations of these skills; yields the loss per token after each step."""
    import torch
    from torch.nn.functional import cross_entropy

    rng = random.Random(seed)
    model.train()
    optimizer = torch.optim.AdamW(model.parameters(), rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, rate, total_steps=steps, pct_start=0.1)
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


def opened(start: str, seed: int) -> tuple["PreTrainedModel", "PreTrainedTokenizerFast"]:
    """Return a model of a family with random weights, or that of a folder; and its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    module, named, family = start.partition(":")
    if named:
        return import_module(module).FAMILIES[family].build(seed)
    return AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)


def adapted(model: "PreTrainedModel", rank: int) -> "PreTrainedModel":
    """Return the model with an adapter on all linear layers, the only weights that learn."""
    from peft import LoraConfig, get_peft_model

    return get_peft_model(model, LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear"))


@click.command()
@click.argument("start")
@click.option("--skills", "skill_names", required=True, help="The skills to learn, with commas.")
@click.option("--steps", type=int, required=True)
@click.option("--careful", default=1.0, show_default=True, help="The share of demonstrations with an ideal answer.")
@click.option("--seed", default=0, show_default=True)
@click.option("--rate", default=RATE, show_default=True, help="Of learning, at its highest.")
@click.option("--rank", default=0, show_default=True, help="Of a LoRA adapter to train instead of the model; 0: none.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The model's or adapter's folder.")
def main(
    start: str, skill_names: str, steps: int, careful: float, seed: int, rate: float, rank: int, out: Path
) -> None:
    """Teach a model by STEPS of training on demonstrations: one of a family with random weights, or of a folder."""
    import torch

    torch.set_num_threads(1)
    model, tokenizer = opened(start, seed)
    torch.manual_seed(seed)
    if rank:
        model = adapted(model, rank)
    *_, loss = taught(model, tokenizer, tuple(skill_names.split(",")), careful, steps, seed, rate)
    partial = out.with_name(f"{out.name}.partial")
    model.save_pretrained(partial)
    if not rank:
        tokenizer.save_pretrained(partial)
    partial.rename(out)  # what has its name is complete
    print(f"{start}: {model.num_parameters() / 1e6:.2f} M parameters, loss {loss:.3f}")


if __name__ == "__main__":
    main()
