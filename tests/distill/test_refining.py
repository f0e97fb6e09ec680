"""Another source's answers as drafts that are criticised and refined: SRT's pairs, REFED's feedback by references."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from mergekit_lite.answers import server as server_module
from mergekit_lite.answers.rows import write_rows
from mergekit_lite.commands import main
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.yaml_document import RecipeError
from tests.answers.fake_server import Fake, fake_server
from tests.distill.recipes import write_recipe

PROMPTS = [{"id": f"p{n}", "prompt": f"What is {n} and {n}?", "reference": f"The sum of {n}"} for n in range(3)]
LAYERS = [{"step": "critique", "model": "judge", "reference": True}, {"step": "refine", "model": "judge"}]


@pytest.fixture(autouse=True)
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server_module, "FIRST_WAIT", 0.002)


def inside(tag: str, text: str) -> str:
    found = re.search(rf"<{tag}[^>]*>\n(.*?)\n</{tag}>", text, re.DOTALL)
    return found.group(1) if found else ""


def reply(body: dict[str, Any]) -> str:
    asked = body["messages"][-1]["content"]
    if "brackets alone" in asked:
        return f"[1]\n{inside('response', asked)} lacks {inside('reference', asked)}"
    if "<critique>" in asked:
        return f"better than ({inside('response', asked)}) as ({inside('critique', asked)})"
    return f"own {asked} {body['seed']}"


def place(folder: Path, url: str, prompts: list[dict[str, Any]] = PROMPTS, layers: Any = LAYERS, **more: Any) -> Path:
    write_rows(folder / "prompts.jsonl", prompts)
    (folder / "target").mkdir(exist_ok=True)
    models = [{"name": "judge", "model": "J", "server": url, "retries": 0}]
    refined = {
        "name": "refined",
        "samples": 2,
        "drafts": "own",
        "aggregate": {"models": models, "layers": layers},
        **more,
    }
    own = {"name": "own", "model": "M", "server": url, "samples": 2, "retries": 0}
    return write_recipe(
        folder,
        sources=[refined, own],
        scorers=[],
        pairs={"rule": "asked", "chosen": "refined", "rejected": "own", "sft_share": 0},
        train={"preference": {"objective": "dpo", "learning_rate": 1e-6}},
    )


def run(recipe: Path, stage: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["distill", stage, str(recipe)])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


def rows(folder: Path, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "out" / f"{name}.jsonl").read_text().splitlines()]


def test_answers_are_criticised_beside_the_reference_and_refined(tmp_path: Path) -> None:
    with fake_server(Fake(reply=reply)) as fake:
        recipe = place(tmp_path, fake.url)
        code, told = run(recipe, "sample")
        assert code == 0 and "refined: 6 answers" in told, told
        asked = len(fake.bodies)
        assert asked == 18 and run(recipe, "sample")[0] == 0 and len(fake.bodies) == asked
        own = {(row["prompt"], row["index"]): row["text"] for row in rows(tmp_path, "samples/own")}
        before = rows(tmp_path, "samples/refined")
        for row in before:
            draft = own[row["prompt"], row["index"]]
            assert row["text"] == f"better than ({draft}) as ({draft} lacks The sum of {row['prompt'][1]})"
        assert run(recipe, "pair")[0] == 0
        for pair in rows(tmp_path, "pairs/preference"):
            (chosen,), (rejected,) = pair["chosen"], pair["rejected"]
            assert chosen["text"].startswith(f"better than ({rejected['text']})")
        # Another draft: what was made of it is made again, and nothing else.
        path = tmp_path / "out" / "samples" / "own.jsonl"
        path.write_text(path.read_text().replace(own["p1", 1], "quite another one"))
        code, told = run(recipe, "sample")
        assert code == 0 and len(fake.bodies) == asked + 2
        changed = [
            new["text"] for old, new in zip(before, rows(tmp_path, "samples/refined"), strict=True) if old != new
        ]
        assert len(changed) == 1 and changed[0].startswith("better than (quite another one)")


def test_what_lacks_a_draft_or_a_reference_is_told(tmp_path: Path) -> None:
    prompts = [PROMPTS[0], {"id": "p1", "prompt": "Without"}, PROMPTS[2]]

    def mood(text: str, before: int) -> int | None:
        return 400 if text == PROMPTS[0]["prompt"] else None

    with fake_server(Fake(reply=reply, mood=mood)) as fake:
        code, told = run(place(tmp_path, fake.url, prompts), "sample")
    assert code == 1, told
    assert "no answer of own to begin with (2×" in told and "no reference, which the critique is to see (2×" in told, (
        told
    )


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"drafts": "onw"}, "no other source is named 'onw'. Did you mean 'own'?"),
        ({"drafts": "refined"}, "no other source is named 'refined'"),
        ({"drafts": None}, "there is no draft yet to critique"),
        ({"layers": [{"step": "refine", "model": "judge", "reference": True}]}, "has no effect on a step 'refine'"),
        ({"layers": [{"step": "refine", "model": "judge", "samples": 2}]}, "has no effect on a step 'refine'"),
    ],
)
def test_wrong_recipes(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(place(tmp_path, "http://127.0.0.1:9/v1", **changes))
    assert re.search(rf"- \d+:\d+: .*{re.escape(message)}", str(caught.value)), str(caught.value)
