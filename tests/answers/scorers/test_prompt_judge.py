"""A judge of prompts behind a real server: what it sees, how often it is asked, and what it leaves out of the rows."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from pydantic import ValidationError

from mergekit_lite.answers.rows import Prompt, write_rows
from mergekit_lite.answers.scorers.prompt_judge import Options, PromptJudge
from mergekit_lite.answers.scoring.scorer import Judged, Score, ScorerSettings
from mergekit_lite.commands import main
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.yaml_document import RecipeError
from tests.answers.fake_server import Fake, fake_server
from tests.distill.recipes import write_recipe


def prompt(name: str, text: str) -> Prompt:
    return Prompt(name, ({"role": "system", "content": "Be kind."}, {"role": "user", "content": text}))


def graded(body: dict[str, Any]) -> str:
    """The number in the question, or none."""
    asked = re.search(r"user: .*?(\d+)\?", body["messages"][-1]["content"])
    return f"Clear.\nGrade: {asked[1]}" if asked else "No idea."


@pytest.mark.parametrize("of", ["quality", "difficulty"])
def test_the_prompt_alone_is_shown_once(of: str) -> None:
    with fake_server(Fake(reply=graded)) as fake:
        settings = ScorerSettings(name="p", kind="prompt_judge", model="J", server=fake.url)
        scorer = PromptJudge(settings, Options(of=of))  # type: ignore[arg-type]
        asked = [prompt("a", "Is it 3?"), prompt("b", "Is it 5?"), prompt("c", "Is it?"), prompt("d", "Is it 6?")]
        judged = [Judged(each, f"secret answer {number}") for number in range(3) for each in asked]
        scores = scorer.score(judged)
        grades = dict(zip("abcd", scores, strict=False))
        again = scorer.score(judged[1:3])
        assert again == [grades["b"], grades["c"]] and len(fake.bodies) == 5  # what has no grade is asked about again
        assert scorer.score(judged[:2]) == scores[:2] and len(fake.bodies) == 5
        del fake.bodies[4:]
    assert [score.value for score in scores] == [3, 5, None, None] * 3
    assert "no grade" in scores[2].why and scores[3] == Score(None, "a grade off the scale: 6")
    assert len(fake.bodies) == 4
    for body in fake.bodies:
        text = body["messages"][-1]["content"]
        assert "secret" not in text and "system: Be kind.\n\nuser: Is it" in text and "{" not in text
        assert ("How hard" in text) == (of == "difficulty") and "from 1 (" in text and " to 5 (" in text


def test_words_of_the_user() -> None:
    with fake_server(Fake(reply=graded)) as fake:
        settings = ScorerSettings(name="p", kind="prompt_judge", model="J", server=fake.url)
        options = Options(prompt="{lowest}-{highest}: {conversation}", highest=9)
        assert PromptJudge(settings, options).score([Judged(prompt("a", "Is it 8?"), "")]) == [Score(8)]
    assert fake.bodies[0]["messages"][-1]["content"] == "1-9: system: Be kind.\n\nuser: Is it 8?"
    for wrong, why in (
        ("Grade it.", "would not see the prompt"),
        ("{conversation} {answer}", "no field 'answer'"),
        ("{conversation:d}", "has 'd' behind it"),
    ):
        with pytest.raises(ValidationError, match=why):
            Options(prompt=wrong)


@pytest.mark.parametrize(
    ("pairs", "message"),
    [
        ({"rule": "best_worst", "score": "q"}, "'q' grades prompts: all answers to one have the same score, so none"),
        (
            {"rule": "as_is", "score": "q", "domains": {"d": {"rule": "best_worst"}}},
            "so none is better. Rank by another",
        ),
        ({"rule": "best_worst", "score": {"mean": ["q", "r"]}}, ""),
        ({"rule": "as_is", "score": "q", "sft_rows": {"least": 4}}, ""),
        (
            {"rule": "as_is", "score": "q", "sft_rows": {"by": "difficulty", "student": "a", "least": 0}},
            "the student's",
        ),
    ],
)
def test_it_ranks_no_answers(tmp_path: Path, pairs: dict[str, Any], message: str) -> None:
    model = {"model": "m", "server": "http://127.0.0.1:9/v1"}
    scorers = [{"name": "q", "kind": "prompt_judge", **model}, {"name": "r", "kind": "judge", **model}]
    sources = [{"name": name, **model} for name in "ab"]
    path = write_recipe(tmp_path, sources=sources, scorers=scorers, pairs=pairs, train={"sft": {"learning_rate": 1e-6}})
    if not message:
        load(path)
        return
    with pytest.raises(RecipeError, match=re.escape(message)):
        load(path)


def test_a_veto_leaves_prompts_out(tmp_path: Path) -> None:
    """Grades of quality and difficulty, and a least reward, as Magpie filters; reports don't have such scores."""
    write_rows(tmp_path / "prompts.jsonl", [{"id": f"p{n}", "prompt": f"Is it {n}?"} for n in range(1, 6)])
    (tmp_path / "target").mkdir()
    with fake_server(Fake(reply=lambda body: graded(body) if body["model"] == "J" else "It is.")) as fake:
        judge = {"kind": "prompt_judge", "model": "J", "server": fake.url}
        recipe = write_recipe(
            tmp_path,
            sources=[{"name": "a", "model": "M", "server": fake.url, "samples": 2, "retries": 0}],
            scorers=[
                {**judge, "name": "quality"},
                {**judge, "name": "easy", "minimise": True, "options": {"of": "difficulty"}},
            ],
            pairs={"rule": "as_is", "veto": {"quality": 2, "easy": -4}},
            train={"sft": {"learning_rate": 1e-6}},
        )
        for stage in ("sample", "score", "pair"):
            result = CliRunner().invoke(main, ["distill", stage, str(recipe)])
            assert result.exit_code == 0, result.output
    rows = [json.loads(line) for line in (tmp_path / "out/pairs/sft.jsonl").read_text().splitlines()]
    assert [row["prompt"] for row in rows] == ["p2", "p3", "p4"]
    assert rows[0]["scores"] == {"quality": 2, "easy": -2}
    assert sum(body["model"] == "J" for body in fake.bodies) == 10  # five prompts, two judges
