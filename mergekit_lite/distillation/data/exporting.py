"""The rows of ``pairs/`` as other tools read them, as JSON Lines: TRL, LLaMA-Factory, ShareGPT.

    trl             sft.jsonl {prompt, completion}, preference.jsonl {prompt, chosen, rejected}; all lists of messages
    llama-factory   {conversations, system} and with preferences {…, chosen, rejected}, and dataset_info.json
    sharegpt        the same without dataset_info.json, the system prompt as the first turn

None of them has a place for an answer that was cut: its end of turn would be trained. Such rows are left out and
counted. None has several chosen answers: each makes a row with each rejected one.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from itertools import product
from pathlib import Path
from typing import Any, Literal

from mergekit_lite.answers.data_files import Data
from mergekit_lite.answers.rows import Message, write_rows, write_text
from mergekit_lite.distillation.data.examples import Example, Given
from mergekit_lite.distillation.data.given import examples
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.errors import UsageError, counted, listing

Format = Literal["trl", "llama-factory", "sharegpt"]
FILES = ("sft", "preference")
SPEAKERS = {"system": "system", "user": "human", "assistant": "gpt"}
CUT = "with an answer that was cut, whose end would be trained"
TURNS = "whose turns don't alternate between user and assistant"


def export(recipe: Recipe, reporter: Reporter, *, to: Path, form: Format) -> None:
    """Write the rows that training reads, in the form of another tool.

    Args:
        recipe: whose rows; the stage ``pair`` has made them.
        reporter: takes what was written and left out.
        to: a new or empty folder.
        form: of which tool.

    Raises:
        UsageError: there are no rows, a line is none, or the folder has files.
    """
    paths = {name: Folder(recipe.folder).pairs(name) for name in FILES}
    paths = {name: path for name, path in paths.items() if path.exists()}
    if not paths:
        raise UsageError(f"There are no rows in {recipe.folder / 'pairs'}: run the stage `pair` first.")
    if to.exists() and (not to.is_dir() or any(to.iterdir())):
        raise UsageError(f"{to} is there already and not an empty folder. Name another one, or remove it.")
    problems: list[str] = []
    found = {name: [example for example, _ in examples(Data(path=path), problems)] for name, path in paths.items()}
    if problems:
        raise UsageError(listing("Rows can't be read", problems))
    for name, rows in found.items():
        left: Counter[str] = Counter()
        written = [row for example in rows for row in _rows(example, form, left)]
        write_rows(to / f"{name}.jsonl", written)
        reporter.line(f"{counted(len(written), 'row')} in {to / f'{name}.jsonl'}")
        for why, number in left.items():
            reporter.line(f"{name}: {counted(number, 'row')} left out: {why}")
        several = sum(len(example.chosen) > 1 or len(example.rejected) > 1 for example in rows)
        if several:
            reporter.line(
                f"{name}: {counted(several, 'row')} with several chosen or rejected answers became one of each"
            )
    if form == "llama-factory":
        info = {name: _description(name) for name in found}
        write_text(to / "dataset_info.json", json.dumps(info, indent=2) + "\n")


def _rows(example: Example, form: Format, left: Counter[str]) -> Iterator[dict[str, Any]]:
    pairs: Iterable[Sequence[Given]] = (
        product(example.chosen, example.rejected) if example.chosen else [example.answers]
    )
    for answers in pairs:
        if any(answer.cut for answer in answers):
            left[CUT] += 1
        elif form != "trl" and not _alternates(example.prompt.messages):
            left[TURNS] += 1
        else:
            yield _for_trl(example, answers) if form == "trl" else _as_sharegpt(example, answers, form)


def _alternates(messages: Sequence[Message]) -> bool:
    roles = [message["role"] for message in messages]
    turns = roles[1:] if roles[0] == "system" else roles
    return turns == [("user", "assistant")[place % 2] for place in range(len(turns))]


def _for_trl(example: Example, answers: Sequence[Given]) -> dict[str, Any]:
    keys = ("chosen", "rejected") if example.chosen else ("completion",)
    said = ([Message(role="assistant", content=answer.text)] for answer in answers)
    return {"prompt": list(example.prompt.messages), **dict(zip(keys, said, strict=True))}


def _as_sharegpt(example: Example, answers: Sequence[Given], form: Format) -> dict[str, Any]:
    turns = [{"from": SPEAKERS[turn["role"]], "value": turn["content"]} for turn in example.prompt.messages]
    said = [{"from": "gpt", "value": answer.text} for answer in answers]
    system = {}
    if form == "llama-factory":  # it wants the column in every row or in none
        system = {"system": turns.pop(0)["value"] if turns[0]["from"] == "system" else ""}
    if not example.chosen:
        return {"conversations": [*turns, *said], **system}
    return {"conversations": turns, "chosen": said[0], "rejected": said[1], **system}


def _description(name: str) -> dict[str, Any]:
    """Return the entry of a file in LLaMA-Factory's ``dataset_info.json``, as its data/README.md describes it."""
    ranking = {"ranking": True} if name == "preference" else {}
    answers = {"chosen": "chosen", "rejected": "rejected"} if ranking else {}
    columns = {"messages": "conversations", "system": "system", **answers}
    return {"file_name": f"{name}.jsonl", "formatting": "sharegpt", **ranking, "columns": columns}
