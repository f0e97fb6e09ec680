"""Servers that nobody here wrote, started by the recipe: `transformers serve`, and llama.cpp's `llama-server`.

llama.cpp's needs the program on the path, and the variable GGUF with the path of a small chat model.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml

from mergekit_lite.answers.rows import write_rows
from tests.answers.test_local import write_model
from tests.distill.recipes import write_recipe
from tests.distill.test_sample import invoke, rows
from tests.processes import started
from tests.waiting import is_gone

pytestmark = pytest.mark.slow
PYTHON = os.environ.get("SERVING_PYTHON", sys.executable)  # with transformers[serving]
TRANSFORMERS = f"{PYTHON} -c 'from transformers.cli.transformers import main; main()' serve --port {{port}} {{model}}"
LLAMA = "llama-server -m {model} --port {port} -t 2 -np 4 -c 8192"
SAMPLING = {"max_tokens": 12, "top_k": 5}

needs_transformers = pytest.mark.skipif(
    subprocess.run([PYTHON, "-c", "import fastapi, openai, uvicorn"], capture_output=True, check=False).returncode != 0,
    reason="transformers serve needs its extra `serving`",
)
needs_llama = pytest.mark.skipif(
    shutil.which("llama-server") is None or not os.environ.get("GGUF"), reason="no llama-server, or no model in GGUF"
)


def place(folder: Path, model: str, serve: str, prompts: int = 6, **source: Any) -> Path:
    (folder / "target").mkdir(exist_ok=True)
    texts = ["one two three", "What is one and one?", "You are helpful.", "Name three colours.", "assistant", "two"]
    write_rows(folder / "prompts.jsonl", [{"id": f"p{n}", "prompt": f"{texts[n % 6]} {n}"} for n in range(prompts)])
    common = {"name": "a", "model": model, "serve": serve, "samples": 3, "concurrency": 4, "sampling": SAMPLING}
    return write_recipe(folder, sources=[common | source])


def sampled(folder: Path, model: str, serve: str, **source: Any) -> tuple[list[dict[str, Any]], str]:
    code, _, error = invoke("sample", place(folder, model, serve, **source))
    assert code == 0, error
    return rows(folder / "out" / "samples" / "a.jsonl"), error


@needs_transformers
@pytest.mark.parametrize("drawn", [True, False])
def test_transformers_serve(tmp_path: Path, drawn: bool) -> None:
    """It draws only where the model's own generation config says so; else that is told."""
    model = write_model(tmp_path / "model")
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"do_sample": drawn, "max_length": 64}))
    found, told = sampled(tmp_path, "./model", TRANSFORMERS, sampling={"max_tokens": 12})
    print(told)
    assert len(found) == 18 and all(row["tokens"] for row in found)
    alike = Counter(row["prompt"] for row in found if row["text"] == found[3 * int(row["prompt"][1:])]["text"])
    assert (sum(count == 3 for count in alike.values()) >= 5) == (not drawn)
    assert ("got identical answers" in told) == (not drawn)


@needs_transformers
def test_transformers_serve_refuses_top_k_and_says_so(tmp_path: Path) -> None:
    write_model(tmp_path / "model")
    code, _, error = invoke("sample", place(tmp_path, "./model", TRANSFORMERS))
    assert code == 1 and "refuses 'top_k', which is set for it, and says 422" in error, error


@needs_transformers
def test_transformers_serve_draws_prompts(tmp_path: Path) -> None:
    """It reads the beginning of the template as it is, by its own count, and is asked without what it doesn't take."""
    model = write_model(tmp_path / "model", style="llama-3")
    config = json.loads((model / "generation_config.json").read_text())
    (model / "generation_config.json").write_text(json.dumps(config | {"do_sample": True}))
    path = place(tmp_path, "./model", TRANSFORMERS, samples=1, sampling={"max_tokens": 4})
    stops = [*"aeiost "]  # a model without sense ends no prompt soon
    magpie = {"model": "./model", "serve": TRANSFORMERS, "number": 12, "sampling": {"max_tokens": 64, "stop": stops}}
    content = yaml.safe_load(path.read_text()) | {"prompts": [{"magpie": magpie}]}
    path.write_text(yaml.safe_dump(content))
    code, _, error = invoke("sample", path)
    drawn = rows(tmp_path / "out" / "magpie" / "magpie.jsonl")
    assert code == 0 and len(drawn) == 12 and len({row["text"] for row in drawn}) > 3, error
    assert "refuses 'stop_token_ids'" in error and "chat template of its own" not in error


@needs_llama
def test_llama_cpp(tmp_path: Path) -> None:
    gguf = os.environ["GGUF"]
    found, told = sampled(tmp_path, gguf, LLAMA, sampling={**SAMPLING, "max_tokens": 60, "stop": ["\n", "e"]})
    print(told)
    assert len(found) == 18 and not any("\n" in row["text"] or "e" in row["text"] for row in found)
    greedy = tmp_path / "greedy"
    greedy.mkdir()
    found, _ = sampled(greedy, gguf, LLAMA, sampling={"temperature": 1.5, "top_k": 1, "max_tokens": 8})
    assert all(
        row["text"] == found[row["index"] and 3 * int(row["prompt"][1:])]["text"] for row in found if row["index"]
    )


@needs_llama
def test_llama_cpp_gives_several_answers_to_one_request(tmp_path: Path) -> None:
    found, told = sampled(tmp_path, os.environ["GGUF"], LLAMA, one_request=True)
    print(told)
    assert len(found) == 18 and len({row["text"] for row in found}) > 9 and "identical" not in told


@needs_llama
def test_llama_cpp_is_ended_with_a_killed_run_which_goes_on(tmp_path: Path) -> None:
    path = place(tmp_path, os.environ["GGUF"], LLAMA, prompts=20)
    partial = tmp_path / "out" / "samples" / "a.partial.jsonl"
    with started(tmp_path, "distill", "sample", path) as process:
        until = time.monotonic() + 300
        while not (partial.exists() and partial.stat().st_size) and time.monotonic() < until:
            time.sleep(0.05)
        servers = [int(entry.name) for entry in Path("/proc").iterdir() if entry.name.isdigit() and is_ours(entry)]
        process.send(signal.SIGKILL)
        process.end()
    kept = {(row["prompt"], row["index"]): row["text"] for row in rows(partial)}
    assert kept and servers and all(is_gone(server) for server in servers)
    assert invoke("sample", path)[0] == 0
    found = {(row["prompt"], row["index"]): row["text"] for row in rows(tmp_path / "out" / "samples" / "a.jsonl")}
    assert len(found) == 60 and kept.items() <= found.items()


def is_ours(entry: Path) -> bool:
    """Whether a process is a server of the model."""
    try:
        return os.environ["GGUF"].encode() in (entry / "cmdline").read_bytes()
    except OSError:
        return False
