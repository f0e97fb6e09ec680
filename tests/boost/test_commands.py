"""Every command of docs/boost.md and recipes/boost can be carried out: dry runs over tiny models."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lite.commands import main
from tests.models import state, tuned, write_folder

ROOT = Path(__file__).parents[2]
DOCS = ["docs/boost.md"]
RECIPES = sorted(path.relative_to(ROOT) for path in (ROOT / "recipes/boost").iterdir())
CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
MODELS = ("alignment-handbook/zephyr-7b-sft-full", "allenai/tulu-2-7b", "base", "org/base", "sft")
TUNED = (
    *(f"chujiezheng/zephyr_0.{share}" for share in (1, 2, 4)), "allenai/tulu-2-dpo-7b", "org/tuned-a", "org/tuned-b",
    "dpo", "run/step-25", "run/step-50", "run/step-75", "tulu-2-7b", "tulu-2-dpo-7b",
)  # fmt: skip


def commands(path: Path | str) -> list[list[str]]:
    """The boost commands of a file, without the marks of comments and the comments behind them."""
    text = re.sub(r"^#? *", "", (ROOT / path).read_text(encoding="utf-8"), flags=re.MULTILINE)
    found = re.findall(r"^mergekit-lite (boost .*)$", text.replace("\\\n", ""), flags=re.MULTILINE)
    return [shlex.split(re.sub(r"  +# .*", "", command)) for command in found]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with whatever the commands name."""
    base = state(0, layers=4)
    for name in MODELS:
        write_folder(tmp_path / name, base, config=CONFIG)
    for number, name in enumerate(TUNED):
        write_folder(tmp_path / name, tuned(base, number + 1), config=CONFIG)
    rows = [{"prompt": f"What is {n}?", "reference": str(n)} for n in range(3)]
    for name in ("dev.jsonl", "maths.jsonl"):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "prefs.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    (tmp_path / "wiki.txt").write_text("A text.\n")
    (tmp_path / "merge.yml").write_text(
        "merge_method: task_arithmetic\nbase_model: org/base\nmodels: [{model: org/tuned-a}]\nparameters: {weight: 1}\n"
    )
    (tmp_path / "moa.yml").write_text(
        "models: [{name: one, model: org/base}]\nlayers: [{step: generate, model: one}]\n"
    )
    (tmp_path / "recipes").symlink_to(ROOT / "recipes")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("path", [*DOCS, *RECIPES], ids=str)
def test_commands_can_be_carried_out(path: Path | str, place: Path) -> None:
    found = commands(path)
    assert found
    before = set(place.iterdir())
    for command in found:
        ran = CliRunner().invoke(main, [*command, "--device", "cpu", "--dry-run"])
        assert ran.exit_code == 0, (command, ran.output)
    assert set(place.iterdir()) == before


def test_the_published_searches_are_all_there() -> None:
    assert len(commands("recipes/boost/published.sh")) == 5
