"""The table of docs/systems.md is true: its commands run on tiny models, and the tests that it names are there."""

from __future__ import annotations

import json
import pickle
import re
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import pytest
import yaml
from click.testing import CliRunner

from mergekit_lite.answers.tiny_benchmarks import convert
from mergekit_lite.checkpoint.references import plain_reference
from mergekit_lite.commands import main
from tests.adapters import lora, write_adapter
from tests.answers.test_tiny_benchmarks import made_up
from tests.boost.end_to_end import write_models
from tests.models import read_folder, state, tuned, write_folder

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "systems.md").read_text(encoding="utf-8")
YAML = {name: text for text, name in re.findall(r"```yaml\n(# (\S+\.yaml)\n.*?)```", PAGE, re.DOTALL)}
STATES = ("**here**", "**in part**", "not yet", "nothing to build")
CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
LENGTHS = """\
def characters(completions, **columns):
    return [float(len(text)) for text in completions]


def words(completions, **columns):
    return [float(len(text.split())) for text in completions]
"""


class Row(NamedTuple):
    number: str
    paper: str
    here: str
    command: str
    checked: str
    left_out: str

    @property
    def state(self) -> str:
        return next(state for state in STATES if self.here.startswith(state))

    @property
    def keys(self) -> tuple[tuple[str, str], ...]:
        """The keys of a recipe that it names: the objective, the rule, …"""
        return tuple(re.findall(r"`(objective|rule|reference|kind|by): (\w+)`", self.here))


ROWS = [Row(*line[2:-2].split(" | ")) for line in PAGE.splitlines() if re.match(r"\| \d", line)]
# Each command once with each choice of keys, which matter to the recipes of the page alone.
RUNS = sorted({(row.command.strip("`"), row.keys if ".yaml" in row.command else ()) for row in ROWS} - {("–", ())})


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny models that the commands name."""
    folder = tmp_path_factory.mktemp("models")
    write_models(folder)
    head = read_folder(folder / "sft")["lm_head.weight"]
    write_adapter(folder / "adapter", lora("lm_head", *head.shape))
    return folder


@pytest.fixture
def place(models: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with whatever the commands name."""
    for path in (*models.iterdir(), ROOT / "recipes"):
        (tmp_path / path.name).symlink_to(path)
    questions = [f"What is {number}?" for number in range(6)]
    rows: dict[str, list[dict[str, object]]] = {
        "dev.jsonl": [{"prompt": question, "reference": "1"} for question in questions],
        "wanted.jsonl": [{"prompt": question} for question in questions[:2]],
        "prefs.jsonl": [{"prompt": question, "chosen": "It is one.", "rejected": "no"} for question in questions],
        "judged.jsonl": [
            {"instruction": question, "output": "two", "judgment": "It is one."} for question in questions
        ],
    }
    for name, lines in rows.items():
        (tmp_path / name).write_text("".join(json.dumps(line) + "\n" for line in lines))
    completions = [{"model": model, "response": f"It is {word}."} for model in "ab" for word in ("one", "two or three")]
    answers = [{"instruction": question, "completions": completions} for question in questions]
    (tmp_path / "answers.json").write_text(json.dumps(answers))
    (tmp_path / "lengths.py").write_text(LENGTHS)
    (tmp_path / "examples.txt").write_text("# Instruction\n\nAnswer in a word.\n")
    for name in ("skills", "kinds"):
        (tmp_path / f"{name}.txt").write_text("one\ntwo\nthree\n")
    bench, results = made_up()
    (tmp_path / "tiny.pkl").write_bytes(pickle.dumps({"mine": bench}))
    convert(tmp_path / "tiny.pkl", tmp_path / "tiny.npz")
    (tmp_path / "results.txt").write_text("".join(f"{result:g}\n" for result in results))
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.delitem(sys.modules, "lengths", raising=False)  # another test's
    return tmp_path


def write_recipes(place: Path, keys: tuple[tuple[str, str], ...]) -> None:
    """The page's recipes, with these keys."""
    for name, text in YAML.items():
        for key, value in keys:
            text = re.sub(rf"\b{key}: \w+(?=[,}}])", f"{key}: {value}", text)
        (place / name).write_text(text)


def write_named_models(place: Path, recipe: str) -> None:
    """Tiny models under the names of a recipe."""
    document = yaml.safe_load((place / recipe).read_text(encoding="utf-8"))
    names = [document["base_model"], *(model["model"] for model in document["models"])]
    for number, name in enumerate(dict.fromkeys(names)):
        tensors = tuned(state(0, layers=2), number) if number else state(0, layers=2)
        write_folder(place / plain_reference(name), tensors, config=CONFIG)


def carry_out(command: str, keys: tuple[tuple[str, str], ...], place: Path, whole: bool) -> None:
    _, *words = shlex.split(command)
    write_recipes(place, keys)
    if words[0] == "merge":
        write_named_models(place, words[1])
    if words[:2] == ["distill", "run"] and not whole:
        words.append("--dry-run")
    before = {"pair": ("sample", "score"), "export": ("sample", "score", "pair")}
    if words[0] == "distill":
        for stage in before.get(words[1], ()):
            done = CliRunner().invoke(main, ["distill", stage, words[2]])
            assert done.exit_code == 0, (stage, done.output)
    done = CliRunner().invoke(main, words)
    assert done.exit_code == 0, (command, keys, done.output, done.exception)
    if "-o" in words and "--dry-run" not in words and words[0] != "boost":  # boost may find that nothing helps
        assert (place / words[words.index("-o") + 1]).exists()


@pytest.mark.parametrize(("command", "keys"), RUNS, ids=lambda part: str(part))
def test_commands(command: str, keys: tuple[tuple[str, str], ...], place: Path) -> None:
    carry_out(command, keys, place, whole=False)


@pytest.mark.slow
@pytest.mark.parametrize(("command", "keys"), [run for run in RUNS if re.search(r"distill run \S+$", run[0])], ids=str)
def test_training(command: str, keys: tuple[tuple[str, str], ...], place: Path) -> None:
    carry_out(command, keys, place, whole=True)
    (folder,) = re.findall(r"run (\w+)\.yaml", command)
    trained = {"rounds": "rounds/round-2/train/preference", "noise": "noise/train/sft", "cut": "cut/train/sft"}
    assert (place / trained.get(folder, f"{folder}/train/preference") / "config.json").exists()


def test_every_paper_has_a_row() -> None:
    assert [row.number for row in ROWS] == [str(number) for number in range(1, 70)]
    papers = [re.search(r"arxiv\.org/abs/(\d{4}\.\d{5})\)", row.paper) for row in ROWS]
    assert all(papers) and len({paper[1] for paper in papers if paper}) == 69


def test_the_page_counts_its_rows() -> None:
    told = re.search(
        r"Of (\d+) papers (\d+) are here, (\d+) in part and\s(\d+) not yet; of (\d+) there is nothing", PAGE
    )
    counts = [sum(row.state == state for row in ROWS) for state in STATES]
    assert told is not None and [int(number) for number in told.groups()] == [len(ROWS), *counts]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.number)
def test_rows_say_what_they_must(row: Row) -> None:
    """What is here has a command and tests that are there; what is not has neither, and a reason."""
    is_here = row.state in STATES[:2]
    assert (row.command != "–") == (row.checked != "–") == is_here
    assert row.left_out != "–" or row.state == STATES[0]
    for name in re.findall(r"`((?:tests|benchmarks|parity)/[\w/]+\.py)`", row.checked):
        assert (ROOT / name).exists(), name
    assert not is_here or "tests/" in row.checked
    for name in re.findall(r"`(recipes/[^`]+)`", row.here):
        assert list(ROOT.glob(name if name.endswith((".yml", ".yaml")) else f"{name}.y*ml")), name
