"""Aggregates of tests, and a server whose replies tell all of what it was asked."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml
from click.testing import CliRunner

from mergekit_lite.answers.prompts import digest_of
from mergekit_lite.answers.rows import write_rows
from mergekit_lite.commands import main

PROMPTS = [
    {"id": "p0", "prompt": "What is one and one?"},
    {"id": "p1", "messages": [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "And two?"}]},
    {"id": "p2", "messages": [{"role": role, "content": role} for role in ("user", "assistant", "user")]},
]
MOST = 64  # tokens of a reply
Conversation = Sequence[dict[str, str]]


def says(model: str, messages: Conversation) -> str:
    """What a model of the server says: all of the conversation counts. Judgements have the form that is asked for."""
    asked = messages[-1]["content"]
    drafts = len(re.findall(r'^<response(?:-\d+)? number="', asked, re.MULTILINE))
    if "\nRanking: [" in asked:
        order = sorted(range(1, drafts + 1), key=lambda number: digest_of([*messages, _turn(f"{model} {number}")]))
        return "They differ.\n**Ranking:** " + " > ".join(f"[{number}]" for number in order)
    if "brackets alone" in asked:
        return "\n".join(f"[{number}]\nof {model}: {digest_of(messages)} {number}" for number in range(1, drafts + 1))
    if "Verdict: correct\nor" in asked:
        right = digest_of([*messages, _turn(model)]) < "8"
        return f"Well.\nVerdict: {'correct' if right else 'incorrect'}"
    return f"{model} says {digest_of(messages)}"


def reply(body: dict[str, Any]) -> str:
    """The same, of a request."""
    return says(body["model"], body["messages"])


def _turn(content: str) -> dict[str, str]:
    return {"role": "user", "content": content}


def place(folder: Path, url: str, layers: list[Any], prompts: list[dict[str, Any]] = PROMPTS, **changes: Any) -> Path:
    """Write prompts and a recipe whose models are those that its layers name; return the recipe."""
    folder.mkdir(exist_ok=True)
    write_rows(folder / "prompts.jsonl", prompts)
    steps = [step for layer in layers for step in (layer if isinstance(layer, list) else [layer])]
    names = sorted({name for step in steps for name in ([*step["model"]])})
    models = [
        {"name": name, "model": name.upper(), "server": url, "retries": 1, "sampling": {"max_tokens": MOST}}
        for name in names
    ]
    path = folder / "recipe.yml"
    path.write_text(yaml.safe_dump({"models": models, "layers": layers, **changes}))
    return path


def answer(recipe: Path, *options: str) -> tuple[int, str, str]:
    """Run the command; return its exit code, and what it wrote to both streams."""
    folder = recipe.parent
    given = ["answer", str(folder / "prompts.jsonl"), "--recipe", str(recipe), "-o", str(folder / "answers.jsonl")]
    result = CliRunner().invoke(main, [*given, *options])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.stdout, result.stderr


def rows(path: Path) -> list[dict[str, Any]]:
    """The rows of a file."""
    return [json.loads(line) for line in path.read_bytes().splitlines()]
