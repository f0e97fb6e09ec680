"""What takes the answers: distill as given answers and as rows, boost's functions as the other side."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lite.answers.prompts import Prompts, load
from mergekit_lite.answers.scoring.registry import open_scorer
from mergekit_lite.answers.scoring.scorer import Judged, ScorerSettings
from mergekit_lite.commands import main
from mergekit_lite.distillation.data.importing import import_rows
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.schema import GivenRows
from mergekit_lite.distillation.reporter import Reporter
from tests.answers.aggregating.aggregates import PROMPTS, answer, place, reply, rows
from tests.answers.fake_server import Fake, fake_server
from tests.distill.recipes import write_recipe
from tests.distill.test_aggregate import sample
from tests.models import state, tuned, write_folder

LAYERS = [{"step": "generate", "model": ["a", "b"]}, {"step": "fuse", "model": "a"}]
FUNCTION = """
def better(prompts, completions, response, **columns):
    return [float(len(mine[0]["content"]) > len(other)) for mine, other in zip(completions, response)]
"""


@pytest.fixture
def answered(tmp_path: Path) -> Path:
    """A folder with answers, and rows of the aggregator."""
    with fake_server(Fake(reply=reply)) as fake:
        prompts = [{**prompt, "reference": "2", "domain": "sums"} for prompt in PROMPTS]
        assert answer(place(tmp_path, fake.url, LAYERS, prompts), "--rows")[0] == 0
    return tmp_path


@pytest.mark.parametrize("name", ["answers.jsonl", "answers.rows.jsonl"])
def test_both_files_are_rows_of_sft(name: str, answered: Path) -> None:
    given = GivenRows.model_validate({"sft": ({"path": answered / name},)})
    import_rows(Folder(answered / "out"), given, Reporter())
    made = rows(answered / "out" / "pairs" / "sft.jsonl")
    assert [(row["messages"], row["response"], row["domain"]) for row in made] == [
        (row["messages"], row["response"], "sums") for row in rows(answered / name)
    ]


def test_rows_of_other_answers_dont_stay(tmp_path: Path) -> None:
    """New answers without ``--rows``: those that are there are made anew, or go where nothing is fused any more."""
    with fake_server(Fake(reply=reply)) as fake:
        recipe = place(tmp_path, fake.url, LAYERS)
        assert answer(recipe, "--rows")[0] == 0
        before = rows(tmp_path / "answers.rows.jsonl")
        place(tmp_path, fake.url, LAYERS, PROMPTS[:2])
        assert answer(recipe)[0] == 0
        after = rows(tmp_path / "answers.rows.jsonl")
        assert after and after == [row for row in before if row["id"].startswith(("p0/", "p1/"))]
        place(tmp_path, fake.url, [{"step": "generate", "model": ["a"]}], PROMPTS[:2])
        assert answer(recipe)[0] == 0
    assert not (tmp_path / "answers.rows.jsonl").exists()


def test_they_are_given_answers(answered: Path) -> None:
    source = {"name": "moa", "answers": [{"path": "answers.jsonl"}]}
    (answered / "target").mkdir()
    recipe = write_recipe(answered, sources=[source], prompts=[])
    recipe.write_text(recipe.read_text().replace("prompts: []\n", ""))
    assert sample(recipe)[0] == 0
    given = rows(answered / "out" / "samples" / "moa.jsonl")
    assert [row["text"] for row in given] == [row["response"] for row in rows(answered / "answers.jsonl")]


def test_a_function_has_them_beside_a_candidates(answered: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (answered / "aggregates_opponent.py").write_text(FUNCTION)
    monkeypatch.syspath_prepend(str(answered))
    prompts = load([Prompts(path=answered / "answers.jsonl", keep="all")]).prompts
    assert [(prompt.id, prompt.reference, prompt.domain) for prompt in prompts] == [
        (prompt["id"], "2", "sums") for prompt in PROMPTS
    ]
    settings = ScorerSettings(name="better", kind="function", model="aggregates_opponent:better")
    with open_scorer(settings) as scorer:
        for text, value in (("x" * 1000, 1.0), ("x", 0.0)):
            scores = scorer.score([Judged(prompt, text) for prompt in prompts])
            assert [score.value for score in scores] == [value] * len(prompts)
    write_folder(answered / "sft", state(0))
    write_folder(answered / "dpo", tuned(state(0), 1))
    monkeypatch.chdir(answered)
    command = "boost sft dpo --prompts answers.jsonl --score function:aggregates_opponent:better -o out --dry-run"
    ran = CliRunner().invoke(main, [*command.split(), "--device", "cpu"])
    assert ran.exit_code == 0 and f"{len(PROMPTS)} prompts" in ran.output, ran.output
    sys.modules.pop("aggregates_opponent")
