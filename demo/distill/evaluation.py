"""``python -m demo.distill.evaluation``: models answer held-out prompts and are checked.

Answers come from the respondent that distillations use, and the verifier is theirs as well. What counts is an answer
drawn at temperature 1: a share of right ones then is the probability that the model gives to them. The most probable
answer, which a greedy model gives, is checked beside it.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import fmean

import click

from demo.distill.skills import MAX_ANSWER_TOKENS
from mergekit_lite.answers.asking import Sampling, Task
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.rows import Prompt, read_rows, seed_of
from mergekit_lite.answers.scoring.registry import open_scorer
from mergekit_lite.answers.scoring.scorer import Judged, ScorerSettings

PATTERN = "[0-9a-z]+$"  # as in the recipes
DRAWS = 2  # answers to each prompt


@click.command()
@click.argument("prompts", type=click.Path(exists=True, path_type=Path))
@click.argument("output", type=click.Path(path_type=Path))
@click.argument("models", nargs=-1, type=click.Path(exists=True, path_type=Path))
def main(prompts: Path, output: Path, models: Sequence[Path]) -> None:
    """Score all MODELS on all PROMPTS; OUTPUT gets ``{model: {right, greedy, length: [a figure a prompt]}}``."""
    asked = read_prompts(prompts)
    partial = output.with_name(f"{output.name}.partial")
    partial.write_text(json.dumps({str(model): scored(model, asked) for model in models}) + "\n")
    partial.rename(output)  # what has its name is complete


def read_prompts(path: Path) -> list[Prompt]:
    rows = (line.row for line in read_rows(path, []))
    return [
        Prompt(row["id"], ({"role": "user", "content": row["prompt"]},), row["domain"], row["reference"])
        for row in rows
    ]


def scored(model: Path, asked: Sequence[Prompt]) -> dict[str, list[float]]:
    """Return one model's figures for each prompt."""
    drawn, length = verdicts(model, asked, DRAWS, Sampling(temperature=1, top_p=1, max_tokens=MAX_ANSWER_TOKENS))
    greedy, _ = verdicts(model, asked, 1, Sampling(temperature=0, max_tokens=MAX_ANSWER_TOKENS))
    return {"right": drawn, "greedy": greedy, "length": length}


def verdicts(model: Path, asked: Sequence[Prompt], draws: int, sampling: Sampling) -> tuple[list[float], list[float]]:
    """Return the share of right answers to each prompt, and their mean length. Answers that the limit cut are wrong."""
    tasks = [Task(prompt, draw, seed=seed_of(prompt.id, draw)) for prompt in asked for draw in range(draws)]
    respondent = Local(model.name, str(model), sampling, batch_size=256)
    answers = {answer.key: answer for answer in respondent.answers(tasks, frozenset(task.key for task in tasks))}
    found = [answers[task.key] for task in tasks]
    with open_scorer(ScorerSettings(name="right", kind="exact", options={"pattern": PATTERN})) as exact:
        scores = exact.score([Judged(task.prompt, answer.text) for task, answer in zip(tasks, found, strict=True)])
    right = [float(score.value == 1 and answer.finish == "stop") for score, answer in zip(scores, found, strict=True)]
    return means(right, draws), means([float(len(answer.text)) for answer in found], draws)


def means(values: Sequence[float], of: int) -> list[float]:
    """Return the mean of every ``of`` values."""
    return [fmean(values[start : start + of]) for start in range(0, len(values), of)]


if __name__ == "__main__":
    main()
