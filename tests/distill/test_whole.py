"""WRPO from prompts to a report, by the one command, with tiny models of different kinds and vocabularies."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import yaml
from click.testing import CliRunner

from mergekit_lite.commands import main
from mergekit_lite.distillation.folder import Folder
from tests.causal import causal_model
from tests.tokenizers import tokenizer

STAGE = {"learning_rate": 1e-3, "batch_size": 4, "per_device_batch_size": 2, "dtype": "float32"}
SAMPLING = {"temperature": 1.0, "top_p": 1.0, "max_tokens": 8}


def write_model(folder: Path, architecture: str, style: str, seed: int) -> None:
    causal_model(architecture, seed=seed).save_pretrained(folder)
    tokenizer(style).save_pretrained(folder)


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    write_model(tmp_path / "target", "llama", "chatml", 0)
    write_model(tmp_path / "gpt2", "gpt2", "llama-3", 1)
    write_model(tmp_path / "qwen2", "qwen2", "qwen2.5", 2)
    for name, number in (("train", 12), ("held-out", 6)):
        rows = [json.dumps({"prompt": f"{name} question {index}"}) for index in range(number)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(rows))
    (tmp_path / "variety.py").write_text(
        "def score(completions, **columns):\n    return [len(set(answer)) for answer in completions]\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    recipe = {
        "folder": "made",
        "target": "./target",
        "prompts": [{"path": "train.jsonl"}],
        "sources": [
            {"name": name, "model": f"./{name}", "samples": 2, "sampling": SAMPLING, "device": "cpu"}
            for name in ("gpt2", "qwen2")
        ],
        "target_source": {"samples": 3, "sampling": SAMPLING, "device": "cpu"},
        "scorers": [{"name": "variety", "kind": "function", "model": "variety:score"}],
        # Models of random weights never end an answer.
        "pairs": {"rule": "wrpo", "score": "variety", "sft_share": 0.33333333, "cut": "keep"},
        "train": {"sft": STAGE, "preference": {**STAGE, "objective": "wrpo", "trainer": {"use_cpu": True}}},
        "report": {"prompts": [{"path": "held-out.jsonl"}], "sampling": {**SAMPLING, "temperature": 0}},
    }
    recipe["train"]["sft"] = {**STAGE, "trainer": {"use_cpu": True}}  # type: ignore[index]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump(recipe))
    yield tmp_path
    torch.set_num_threads(threads)


def test_wrpo_by_one_command(place: Path) -> None:
    result = CliRunner().invoke(main, ["distill", "run", str(place / "recipe.yaml")], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    folder = Folder(place / "made")
    table = json.loads((place / "made/pairs/table.json").read_text())["all"]
    assert table["prompts"] == 12 == table["sft"] + table["preference"] + sum(table["dropped"].values())
    assert table["sft"] == 4 and table["waiting"] == 0 and table["preference"] >= 4
    for line in folder.pairs("preference").read_text().splitlines():
        row = json.loads(line)
        assert [one["role"] for one in (*row["chosen"], *row["rejected"])] == ["source", "target", "target"]
    log = [json.loads(line) for line in (folder.trained("preference") / "log.jsonl").read_text().splitlines()]
    assert {"rewards/source", "rewards/target", "rewards/rejected", "accuracy", "margin", "alpha", "kl"} <= log[
        -1
    ].keys()
    written = json.loads((folder.report / "report.json").read_text())
    assert set(written["held_out"]["models"]) == {"untrained", "sft", "preference"}
    assert written["held_out"]["models"]["preference"]["variety"]["prompts"] == 6
    assert {file.name for file in folder.report.glob("*.png")} == {"held-out.png", "sft.png", "preference.png"}
    files = {path: path.read_bytes() for path in (place / "made").rglob("*") if path.is_file()}
    again = CliRunner().invoke(main, ["distill", "run", str(place / "recipe.yaml")], catch_exceptions=False)
    assert again.exit_code == 0, again.output
    assert {path: path.read_bytes() for path in (place / "made").rglob("*") if path.is_file()} == files
