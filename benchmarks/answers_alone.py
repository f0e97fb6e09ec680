"""The answers of a search without the search, for ``benchmarks.boost``: load once, then generate and score.

python -m benchmarks.answers_alone PAIR PROMPTS SEARCH TOLD

Written with transformers and torch alone, as one would who knows the alphas beforehand. For each candidate of a search
it makes as many answers to the same questions, in batches as large, with the same sampling. Starting, loading and
setting weights are not counted in what is written to TOLD.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from demo import task
from demo.boost import BATCH


def main(pair: Path, prompts: Path, search: Path, report: Path) -> None:
    """Answer and score what the search did, and write what that took."""
    import torch
    from safetensors.torch import load_file
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from transformers.utils import logging

    logging.disable_progress_bar()
    questions = {row["id"]: row["prompt"] for row in map(json.loads, prompts.read_text().splitlines())}
    model = AutoModelForCausalLM.from_pretrained(pair / "dpo", dtype="auto")
    tokenizer = AutoTokenizer.from_pretrained(pair / "dpo", padding_side="left")
    sft, aligned = (load_file(pair / name / "model.safetensors") for name in ("sft", "dpo"))
    torch.manual_seed(0)
    wall = cpu = answers = 0.0
    for alpha, items in candidates(search):
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter.copy_(aligned[name].float() + alpha * (aligned[name].float() - sft[name].float()))
        asked = [questions[item] for item in items]
        started = time.perf_counter(), time.process_time()
        with torch.inference_mode():
            right = sum(task.is_right(*each) for each in answered(model, tokenizer, asked))
        wall, cpu = wall + time.perf_counter() - started[0], cpu + time.process_time() - started[1]
        answers += len(items)
        print(f"alpha={alpha:g}: {right} of {len(items)} right")
    report.write_text(json.dumps({"wall": wall, "cpu": cpu, "answers": int(answers)}))


def candidates(search: Path) -> Iterator[tuple[float, Sequence[str]]]:
    """Return the alphas that were tried, and the answers of each."""
    for path in sorted((search / "candidates").glob("*.json")):
        files = [path.with_name(f"{path.stem}{ending}") for ending in (".jsonl", ".partial.jsonl")]
        lines = [line for file in files if file.exists() for line in file.read_text().splitlines()]
        rows: list[Mapping[str, Any]] = [json.loads(line) for line in lines]
        yield json.loads(path.read_text())["numbers"]["alpha"], [row["item"] for row in rows]


def answered(model: Any, tokenizer: Any, asked: Sequence[str]) -> Iterator[tuple[str, str]]:
    """Each question with its answer, longest questions first."""
    ordered = sorted(asked, key=lambda question: -len(question))
    for start in range(0, len(ordered), BATCH):
        batch = ordered[start : start + BATCH]
        chats = [[{"role": "user", "content": question}] for question in batch]
        ids = tokenizer.apply_chat_template(
            chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
        )
        made = model.generate(
            **ids, do_sample=True, temperature=1.0, top_p=1.0, top_k=0, max_new_tokens=task.MAX_ANSWER_TOKENS
        )
        texts = tokenizer.batch_decode(made[:, ids["input_ids"].shape[1] :], skip_special_tokens=True)
        yield from zip(batch, texts, strict=True)


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
