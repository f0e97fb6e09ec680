"""Measure how near a preview is to the model that ``extrapolate`` writes, on the pair of ``make demo``.

python -m benchmarks.preview

Both answer the same questions, greedily. Token by token along the written model's answers, how often does the preview
choose the same one, and how far are the two distributions apart?
"""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import click

from benchmarks.tables import Table, publish
from demo import task


@click.command()
@click.option("--pair", type=click.Path(exists=True, path_type=Path), default="demo/out", show_default=True)
@click.option("--questions", type=click.IntRange(1), default=100, show_default=True)
@click.option("--alphas", default="0.5,1,2,4,8", show_default=True, help="Of models that the demo has written.")
@click.option("--folder", type=click.Path(path_type=Path), default=Path(__file__).parent / "out", help="For results.")
def main(pair: Path, questions: int, alphas: str, folder: Path) -> None:
    """Measure, and print a table."""
    import torch
    from transformers import AutoTokenizer

    torch.set_num_threads(1)
    folder.mkdir(parents=True, exist_ok=True)
    tokenizer = AutoTokenizer.from_pretrained(pair / "sft")
    asked = task.questions(questions, random.Random("preview"))
    prompts = [tokenizer(task.as_prompt(each, tokenizer), add_special_tokens=False)["input_ids"] for each in asked]
    sft, aligned = load(pair / "sft"), load(pair / "dpo")
    rows = []
    with torch.inference_mode():
        for alpha in alphas.split(","):
            rows.append(
                [alpha, *compared(sft, aligned, load(pair / f"expo-{alpha}"), float(alpha), prompts, tokenizer)]
            )
            print(*rows[-1], flush=True)
    headings = ("alpha", "same token", "as aligned", "same answer", "KL, nats a token")
    table = Table("Preview beside the written model", headings, rows)
    notes = [f"{len(prompts)} questions, greedy, float32; the models were written in the demo's dtype."]
    publish(folder, "preview", str(pair), [table], notes, {})


def compared(sft: Any, aligned: Any, expo: Any, alpha: float, prompts: list[list[int]], tokenizer: Any) -> list[str]:
    """Return the shares of tokens and of whole answers on which preview and written model agree, and KL.

    ``as aligned`` is the share of tokens that the aligned model alone chooses as the written one does: what a preview
    has to be better than.
    """
    import torch

    same = like_aligned = whole = tokens = 0
    divergence = 0.0
    for prompt in prompts:
        written = answer([expo], [1.0], prompt, tokenizer)
        whole += written == answer([sft, aligned], [-alpha, 1 + alpha], prompt, tokenizer)
        row = torch.tensor([prompt + written])
        ours, theirs, true = (model(row).logits[0, len(prompt) - 1 : -1].double() for model in (sft, aligned, expo))
        mixed = -alpha * ours + (1 + alpha) * theirs
        tokens += len(written)
        same += int((mixed.argmax(1) == true.argmax(1)).sum())
        like_aligned += int((theirs.argmax(1) == true.argmax(1)).sum())
        p = true.log_softmax(1)
        divergence += float((p.exp() * (p - mixed.log_softmax(1))).sum())
    shares = (same / tokens, like_aligned / tokens, whole / len(prompts))
    return [*(f"{share:.1%}" for share in shares), f"{divergence / tokens:.2g}"]


def answer(models: list[Any], weights: list[float], prompt: list[int], tokenizer: Any, most: int = 64) -> list[int]:
    """Return a greedy answer to a prompt, its end included, from a sum of logits."""
    import torch

    from mergekit_lite.answers.asking import Sampling
    from mergekit_lite.previewing.drafts import Drafts, Reader, Rules
    from mergekit_lite.previewing.search import grown

    rules = Rules(Sampling(temperature=0), frozenset({tokenizer.eos_token_id}), seed=0)
    drafts = Drafts([Reader(model) for model in models], torch.tensor(weights)[:, None], prompt, rules)
    grown(drafts, most, lambda _: None)
    return drafts.answer(0)


def load(folder: Path) -> Any:
    """Load a model in float32."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


if __name__ == "__main__":
    main()
