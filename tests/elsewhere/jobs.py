"""``python -m tests.elsewhere.jobs FIRST|REST``: the main jobs in this folder, in a process that may lack much."""

from __future__ import annotations

import io
import json
import sys
from contextlib import closing, redirect_stdout
from pathlib import Path

from mergekit_lite.answers.ledger import Ledger
from mergekit_lite.commands import main

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
    {"FIRST": first, "REST": rest}[sys.argv[1]]()
