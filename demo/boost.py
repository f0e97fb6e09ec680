"""``make demo-boost``: let ``mergekit-lite boost`` find the alpha for the pair that ``make demo`` trained.

Then it finds the step to which the run of that training is best followed, by its checkpoints (RELEX). The questions are
those that neither model was trained on, and the verifier is the demo's: is the last number right?
"""

import json
import os
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

BATCH = 200


def right(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Return 1 for each right answer, else 0: the scorer of the search."""
    from demo import task

    return [float(task.is_right(asked, answer)) for asked, answer in zip(prompts, completions, strict=True)]


def write_questions(path: Path, seed: int) -> None:
    """Return all questions that a pair trained with this seed has not seen, as prompts."""
    from demo import extrapolate

    asked = extrapolate.questions(random.Random(seed))[: extrapolate.CHOOSING + extrapolate.REPORTING]
    rows = [{"id": str(number), "prompt": question} for number, question in enumerate(asked)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def command(pair: Path, prompts: Path, output: Path, *run: str) -> list[str]:
    """Return the search over a pair, or over its ``run``, as the command that a user would type."""
    from demo import task

    words = [sys.executable, "-m", "mergekit_lite", "boost", str(pair / "sft"), *(run or [str(pair / "dpo")])]
    words += ["--prompts", str(prompts), "--score", "function:demo.boost:right,name=right"]
    words += ["--temperature", "1", "--top-p", "1", "--max-tokens", str(task.MAX_ANSWER_TOKENS)]
    return [*words, "--batch-size", str(BATCH), "--threads", "1", "-o", str(output)]


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo/out", show_default=True)
@click.option("--seed", default=0, show_default=True, help="That the pair was trained with.")
def main(out: Path, seed: int) -> None:
    """Ask the pair in OUT what it has not seen, and choose alpha by its answers, then the step to follow its run to."""
    from demo.training import DPO_STEPS

    prompts = out / "questions.jsonl"
    write_questions(prompts, seed)
    # A model this small gains nothing from a second thread, and gives the same numbers on any number of cores.
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    of_run = [str(out / "run"), "--tune", f"to_step={DPO_STEPS}:{DPO_STEPS * 33}"]  # as far as alpha = 32
    for name, run in (("boosted", []), ("boosted-run", of_run)):
        subprocess.run(command(out, prompts, out / name, *run), check=True, env=environment)


if __name__ == "__main__":
    main()
