"""One training for ``benchmarks.training``, by this package or by TRL: ``python -m benchmarks.training_alone``.

    python -m benchmarks.training_alone ours|trl FOLDER RESULT [KEY=VALUE …]

FOLDER holds the model and the rows. RESULT gets seconds of wall and processor time of each step, losses, and the peak
of memory after the last step; loading and writing models is not in the times. Keys are ``Training``'s of this package,
or DPOConfig's. It imports nothing of this package for TRL, which has an environment of its own.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

BATCH = 8  # rows of an optimiser step
SETTINGS = {"learning_rate": 2e-5, "warmup": 0, "beta": 0.1}


class Watch:
    """Takes the time between calls."""

    def __init__(self) -> None:
        self.seconds: dict[str, list[tuple[float, float]]] = {}  # wall and processor time by what was done
        self.start()

    def start(self) -> None:
        """Begin to measure here."""
        self.last = time.perf_counter(), time.process_time()

    def stop(self, what: str) -> None:
        """Add the time since the last call of either to what was done meanwhile."""
        now = time.perf_counter(), time.process_time()
        self.seconds.setdefault(what, []).append((now[0] - self.last[0], now[1] - self.last[1]))
        self.last = now


def peak() -> int:
    """Return the most bytes that this process has had in memory."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def ours(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Train by ``mergekit_lite.distillation``."""
    from mergekit_lite.distillation.recipe.schema import Recipe
    from mergekit_lite.distillation.reporter import Advance, Reporter
    from mergekit_lite.distillation.train import train

    watch = Watch()
    peaks = [0]

    class Stamps(Reporter):
        @contextmanager
        def progress(self, what: str, total: int, done: int = 0) -> Iterator[Advance]:
            def advance(more: int, note: str = "") -> None:
                if more:  # else only the note is new
                    watch.stop(what.split()[0])
                    peaks.append(peak())

            watch.start()
            yield advance
            watch.start()

        def warn(self, text: str) -> None:
            print(text, file=sys.stderr)

        line = warn

    preference = {
        "objective": "dpo",
        "options": {"beta": SETTINGS["beta"]},
        "learning_rate": SETTINGS["learning_rate"],
        "warmup_ratio": SETTINGS["warmup"],
        "scheduler": "constant",
        "batch_size": BATCH,
        "dtype": "float32",
        "save_steps": 10**6,
        **keys,
    }
    recipe = {
        "folder": str(folder / "ours"),
        "target": str(folder / "model"),
        "prompts": [],
        "sources": [],
        "scorers": [],
        "pairs": {"rule": "best_worst", "score": "any"},
        "train": {"preference": preference},
    }
    train(Recipe.model_validate(recipe), Stamps())
    log = (folder / "ours" / "train" / "preference" / "log.jsonl").read_text().splitlines()
    return {"seconds": watch.seconds, "losses": [json.loads(line)["loss"] for line in log], "peak": max(peaks)}


def trl(folder: Path, keys: dict[str, Any]) -> dict[str, Any]:
    """Train by TRL's DPOTrainer, on the rows in the same order."""
    import torch
    from datasets import Dataset
    from torch.utils.data import SequentialSampler
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer

    watch = Watch()
    peaks = [0]
    losses = []

    class Stamps(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            watch.stop("train")
            peaks.append(peak())

        def on_log(self, *_: Any, logs: dict[str, float], **__: Any) -> None:
            if "loss" in logs:
                losses.append(logs["loss"])

    class InOrder(DPOTrainer):  # type: ignore[misc]  # TRL is not in the environment of the type check
        def _get_train_sampler(self, dataset: Any = None) -> Any:
            return SequentialSampler(dataset if dataset is not None else self.train_dataset)

        def _precompute_ref_logps(self, *args: Any, **keys: Any) -> Any:  # called while the trainer is made
            watch.start()
            dataset = super()._precompute_ref_logps(*args, **keys)
            watch.stop("reference")
            return dataset

    rows = [json.loads(line) for line in (folder / "in-order.jsonl").read_text().splitlines()]
    size = int(keys.pop("per_device_train_batch_size", 2))
    config = DPOConfig(
        output_dir=str(folder / "trl"),
        beta=SETTINGS["beta"],
        learning_rate=SETTINGS["learning_rate"],
        warmup_steps=SETTINGS["warmup"],
        lr_scheduler_type="constant",
        per_device_train_batch_size=size,
        gradient_accumulation_steps=BATCH // size,
        num_train_epochs=1,
        logging_steps=1,
        save_strategy="no",
        report_to=[],
        use_cpu=not torch.cuda.is_available(),
        **{"bf16": False, "gradient_checkpointing": False, "max_length": None, "disable_tqdm": True, **keys},
    )
    model = AutoModelForCausalLM.from_pretrained(folder / "model", dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    trainer = InOrder(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        callbacks=[Stamps()],
    )
    if config.precompute_ref_log_probs and "reference" not in watch.seconds:
        raise RuntimeError("this TRL computes the reference elsewhere: tested with 1.16")
    watch.start()
    trainer.train()
    return {"seconds": watch.seconds, "losses": losses, "peak": max(peaks)}


def main(by: str, folder: str, result: str, *keys: str) -> None:
    """Train, and write what it took."""
    pairs = {name: json.loads(value) for name, _, value in (key.partition("=") for key in keys)}
    took = {"ours": ours, "trl": trl}[by](Path(folder), pairs)
    Path(result).write_text(json.dumps(took))


if __name__ == "__main__":
    main(*sys.argv[1:])
