"""``make demo-boost``: let ``mergekit-lite boost`` find the alpha for the pair that ``make demo`` trained.

The questions are those that neither model was trained on, and the verifier is the demo's: is the last number right?
"""

import json
import random
import subprocess
import sys
from pathlib import Path
from typing import Any

import click

QUESTIONS = 1600


def right(prompt: Any, answer: str) -> float:
    """The scorer: 1 for a right answer."""
    from demo import task

    return float(task.is_right(prompt.messages[-1]["content"], answer))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default="demo/out", show_default=True)
@click.option("--seed", default=0, show_default=True, help="That the pair was trained with.")
def main(out: Path, seed: int) -> None:
    """Ask the pair in OUT what it has not seen, and choose alpha by its answers."""
    from demo import extrapolate, task

    prompts = out / "questions.jsonl"
    asked = extrapolate.questions(random.Random(seed))[:QUESTIONS]
    prompts.write_text("".join(json.dumps({"prompt": question}) + "\n" for question in asked))
    command = [sys.executable, "-m", "mergekit_lite", "boost", str(out / "sft"), str(out / "dpo")]
    command += ["--prompts", str(prompts), "--score", "function:demo.boost:right,name=right"]
    command += ["--temperature", "1", "--top-p", "1", "--max-tokens", str(task.MAX_ANSWER_TOKENS)]
    command += ["--batch-size", "200", "--threads", "1", "-o", str(out / "boosted")]
    subprocess.run(command, check=True)


if __name__ == "__main__":
    main()
