"""``python -m tests.elsewhere.jobs [INPUTS] [FIRST] [REST]``: the main jobs in this folder, on whatever system."""

from __future__ import annotations

import io
import json
import sys
from contextlib import closing, redirect_stdout
from pathlib import Path

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.commands import main

TIES = """merge_method: ties
base_model: sft
models:
  - {model: dpo, parameters: {weight: 1.0, density: 0.5}}
  - {model: other, parameters: {weight: 0.5, density: 0.4}}
dtype: bfloat16
"""
KEYS = range(20)
UNFINISHED = ["extrapolate", "sft", "dpo", "--alpha", "0.3", "--threads", "2", "-o", "resumed"]
JOBS = (
    ["extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", "one.safetensors"],
    ["extrapolate", "sft", "dpo", "--alpha", "0.7", "-o", "one.safetensors", "--force"],
    ["extrapolate", "sft", "dpo", "--alpha", "0.7", "-o", "resumed", "--force", "--sync"],
    ["merge", "ties.yml", "-o", "ties"],
    ["vector", "extract", "sft", "dpo", "-o", "v.safetensors"],
    ["extrapolate", "sft", "sft+vector:v.safetensors:0.5", "--alpha", "1", "-o", "added"],
    ["verify", "resumed", "--all", "--quiet"],
    ["compare", "sft", "dpo", "ties", "--json"],
)


def make_inputs(place: Path = Path()) -> None:
    """Write three small models, and a recipe for them."""
    from tests.models import state, tuned, write_folder  # and torch

    base = state(1, layers=3, hidden=64)
    for seed, name in enumerate(("sft", "dpo", "other"), 1):
        write_folder(place / name, base if name == "sft" else tuned(base, seed), shards=2)
    (place / "ties.yml").write_text(TIES)


def do(arguments: list[str]) -> str:
    """What a command says on standard output, and its exit code."""
    said, code = io.StringIO(), 0
    try:
        with redirect_stdout(said):
            main(arguments, standalone_mode=False)
    except SystemExit as leaving:
        code = int(leaving.code or 0)
    return f"{said.getvalue()}{code}"


def ledger() -> Ledger[int]:
    """The ledger of some rows."""
    return Ledger(Path("rows.jsonl"), KEYS, lambda row: row["key"])


def first() -> None:
    """Begin what is to be killed."""
    with closing(ledger()) as rows:
        rows.append({"key": key, "text": f"α{key}"} for key in KEYS if key % 3)
        do(UNFINISHED)


def rest() -> None:
    """Go on with it, and do all others."""
    rows = ledger()
    rows.append({"key": key, "text": f"α{key}"} for key in reversed(rows.missing))
    rows.finish()
    do([*UNFINISHED, "--resume"])
    Path("said.json").write_text(json.dumps([do(arguments) for arguments in JOBS]), encoding="utf-8")


if __name__ == "__main__":
    for part in sys.argv[1:]:
        {"INPUTS": make_inputs, "FIRST": first, "REST": rest}[part]()
