"""``make demo``: train a small model, align it part of the way, extrapolate it, and measure what came of it.

ExPO (Zheng et al., arXiv 2404.16792) takes the way from the SFT model to the aligned one and walks on:

    out = aligned + alpha * (aligned - sft)

Where preference training was stopped early, the aligned model is still on its way, and some more of the same
direction improves it without a step of training. Too much of it leads out of the neighbourhood in which the
direction means anything, and the model falls apart. This demo shows both.
"""

import json
import random
import subprocess
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from copy import deepcopy
from pathlib import Path
from time import perf_counter
from typing import TYPE_CHECKING, TypeVar

import click
from rich.console import Console
from rich.progress import track

from demo import report

if TYPE_CHECKING:
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

ALPHAS = (0.5, 1, 2, 4, 8, 16)
CHOOSING, REPORTING = 1000, 1500  # questions that choose the alpha, and others that judge it
PREFERENCE_QUESTIONS = 1600
CHECKPOINT_EVERY = 5  # steps of DPO, for ``make demo-boost``, which also follows the run

T = TypeVar("T")
console = Console(highlight=False)


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo/out", show_default=True)
@click.option("--seed", default=0, show_default=True, help="Of the data, the first weights and every sample.")
def main(out: Path, seed: int) -> None:
    """SFT, an early-stopped DPO, ExPO with several alphas, and a measurement of all of them."""
    import torch
    from transformers.utils import logging

    from demo import task

    # A model this small gains little from a second thread, loses a lot where another program wants the core,
    # and gives the same numbers whatever the number of cores.
    torch.set_num_threads(1)
    logging.disable_progress_bar()
    started = perf_counter()
    out.mkdir(parents=True, exist_ok=True)
    rng = random.Random(seed)
    pool = iter(questions(rng))
    held_out = [next(pool) for _ in range(CHOOSING + REPORTING)]
    compared = [next(pool) for _ in range(PREFERENCE_QUESTIONS)]

    tokenizer = task.build_tokenizer()
    imitate(list(pool), tokenizer, out / "sft", rng)
    align(compared, tokenizer, out / "sft", out / "dpo", rng)

    command = ["extrapolate", str(out / "sft"), str(out / "dpo"), "--alpha", ",".join(map(str, ALPHAS))]
    command += ["--output", str(out / "expo-{alpha}"), "--force"]
    with stage(f"ExPO: mergekit-lite {' '.join(command)}"):
        subprocess.run([sys.executable, "-m", "mergekit_lite", *command], check=True)

    folders = {-1: out / "sft", 0: out / "dpo"} | {alpha: out / f"expo-{alpha}" for alpha in ALPHAS}
    with stage(f"Scoring {len(folders)} models on {len(held_out)} questions that none has seen"):
        scores = [score_folder(folder, alpha, held_out, seed) for alpha, folder in shown(sorted(folders.items()))]
    conclude(scores, out)
    console.print(f"\nThe models, the picture and the numbers are in {out}; {perf_counter() - started:.0f} s in all.")


def questions(rng: random.Random) -> list[str]:
    """Those that no model sees, those that DPO compares answers to, those that are demonstrated."""
    from demo import task, training

    demonstrated = training.SFT_STEPS * training.SFT_BATCH
    return task.questions(CHOOSING + REPORTING + PREFERENCE_QUESTIONS + demonstrated, rng)


def imitate(asked: list[str], tokenizer: "PreTrainedTokenizerFast", folder: Path, rng: random.Random) -> None:
    """SFT: from random weights to a model that answers like the crowd."""
    from demo import task, training

    model = training.new_model(tokenizer, seed=rng.randrange(2**32))
    demonstrations = [(question, task.demonstrate(question, rng)) for question in asked]
    size = f"{model.num_parameters() / 1e6:.1f} M parameters"
    with stage(f"SFT: {size} learn from {len(asked)} demonstrations, most of them poor"):
        *_, loss = shown(training.supervise(model, tokenizer, demonstrations), training.SFT_STEPS)
    console.print(f"  loss at the end: {loss:.3f} per token")
    save(model, tokenizer, folder)


def align(asked: list[str], tokenizer: "PreTrainedTokenizerFast", sft: Path, dpo: Path, rng: random.Random) -> None:
    """DPO on the SFT model's own answers, of which the verifier says which was right."""
    from demo import training

    model = load(sft)
    repeated = [question for question in asked for _ in range(training.SAMPLES_PER_QUESTION)]
    with stage(f"Preferences: the SFT model answers {len(asked)} questions, several times each"):
        given = list(shown(training.answers(model, tokenizer, repeated, rng.randrange(2**32)), len(repeated)))
    pairs = training.preference_pairs(repeated, given)
    console.print(f"  {len(pairs)} questions have a right and a wrong answer")
    agreement = []
    with stage(f"DPO: {training.DPO_STEPS} steps, stopped early"):
        for step, share in enumerate(shown(training.prefer(model, tokenizer, pairs), training.DPO_STEPS), 1):
            agreement.append(share)
            if step % CHECKPOINT_EVERY == 0:
                save(deepcopy(model), tokenizer, dpo.with_name("run") / f"step-{step}")
    save(model, tokenizer, dpo)
    console.print(f"  {agreement[-1]:.0%} of the last batch's pairs lean to the right answer more than before")
    console.print(f"  {unmoved(sft, dpo):.0%} of the weights are the same in both models, to bfloat16's precision")


def load(folder: Path) -> "LlamaForCausalLM":
    """In float32, which training needs and a CPU is faster at."""
    import torch
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)


def save(model: "LlamaForCausalLM", tokenizer: "PreTrainedTokenizerFast", folder: Path) -> None:
    """Write an ordinary model folder, in bfloat16 as released models are.

    That has its price: early in DPO many weights have moved by less than bfloat16 can tell, so part of the
    direction is lost before anybody can extrapolate it. What is left is what users of ExPO have, too.
    """
    import torch

    model.to(torch.bfloat16).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def unmoved(before: Path, after: Path) -> float:
    """Return the share of the stored weights that are the same in both folders."""
    from safetensors.torch import load_file

    old, new = (load_file(folder / "model.safetensors") for folder in (before, after))
    return sum((old[name] == new[name]).sum().item() for name in old) / sum(w.numel() for w in old.values())


def score_folder(folder: Path, alpha: float, asked: list[str], seed: int) -> report.Score:
    """Load the folder as any user would, let it answer, and check. An answer without an end is wrong, too."""
    from transformers import AutoTokenizer

    from demo import task, training

    given = list(training.answers(load(folder), AutoTokenizer.from_pretrained(folder), asked, seed))
    return report.Score(
        name=folder.name,
        alpha=alpha,
        right=tuple(a.ended and task.is_right(q, a.text) for q, a in zip(asked, given, strict=True)),
        worked=tuple(task.is_worked(a.text) for a in given),
        ended=tuple(a.ended for a in given),
        length=tuple(len(a.text) for a in given),
    )


def conclude(scores: list[report.Score], out: Path) -> None:
    """Choose the alpha by some of the questions and judge it by others: the best of many is partly luck."""
    best = max((s.part(slice(CHOOSING)) for s in scores if s.alpha > 0), key=lambda score: sum(score.right))
    judged = {score.alpha: score.part(slice(CHOOSING, None)) for score in scores}
    aligned, chosen = judged[0], judged[best.alpha]
    finding = report.verdict(chosen, aligned)

    console.print()
    console.print(report.table(list(judged.values()), aligned, chosen))
    console.print(f"\n{finding}", style="bold", soft_wrap=True)
    console.print(
        f"Gain: points over alpha 0 on the same questions. In parentheses: 95 % intervals. "
        f"All figures are from {REPORTING} questions; {CHOOSING} others chose the alpha.",
        soft_wrap=True,
    )
    results = {"finding": finding, "models": [report.as_data(score, aligned) for score in judged.values()]}
    (out / "results.json").write_text(json.dumps(results, indent=1) + "\n")
    report.draw(list(judged.values()), chosen, out / "alpha-curve.png")


@contextmanager
def stage(what: str) -> Iterator[None]:
    """Say what is being done, and afterwards how long it took."""
    console.print(what, soft_wrap=True)
    started = perf_counter()
    yield
    console.print(f"  [dim]{perf_counter() - started:.1f} s[/]")


def shown(items: Iterable[T], total: int | None = None) -> Iterator[T]:
    """Yield the items, with a progress bar on a terminal."""
    return iter(track(items, "", total, console=console, transient=True, disable=not console.is_terminal))


if __name__ == "__main__":
    main()
