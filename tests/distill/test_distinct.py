"""One prompt of each neighbourhood: against brute force, by a column and by a model, of drawn prompts, in a dry run."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from mergekit_lite.answers.embedding import Embedder
from mergekit_lite.answers.rows import write_rows
from mergekit_lite.commands.distill import command
from mergekit_lite.distillation import distinct
from mergekit_lite.distillation.distinct import places_of_distinct
from mergekit_lite.distillation.prompts import read, settled
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.yaml_document import RecipeError
from tests.answers.fake_server import Fake, fake_server
from tests.distill.recipes import recipe, write_recipe
from tests.distill.test_magpie import words, written
from tests.distill.test_nearest import ids
from tests.distill.test_nearest import models as models  # a fixture
from tests.distill.test_pair import Heard


def brute(vectors: np.ndarray, within: float) -> list[int]:
    """The authors' rule, one pair after the other: kept where no earlier one is near."""
    unit = [vector / (np.linalg.norm(vector) or 1) for vector in vectors.astype(float)]
    return [
        place
        for place, vector in enumerate(unit)
        if all(sum((vector - before) ** 2) >= within for before in unit[:place])
    ]


@pytest.mark.parametrize("block", [1, 7, 2048])
def test_against_brute_force(monkeypatch: pytest.MonkeyPatch, block: int) -> None:
    monkeypatch.setattr(distinct, "BLOCK", block)
    seed = random.SystemRandom().randrange(10**6)
    print(f"seed {seed}")
    draws = np.random.default_rng(seed)
    vectors = draws.normal(size=(60, 3)) * draws.uniform(0.1, 10, (60, 1))
    vectors[draws.permutation(60)[:9]] = vectors[0]  # equal ones
    vectors[draws.permutation(60)[:3]] = 0
    for within in (1e-6, 0.05, 0.3, 4):
        found = places_of_distinct(vectors.astype(np.float32), within)
        assert found == brute(vectors.astype(np.float32), within), within
    assert len(places_of_distinct(vectors, 0.05)) < 60


def test_at_the_bound() -> None:
    """Less than the bound is near, the bound itself is not, to the last bit. Of a chain the first prompt is left."""
    assert places_of_distinct(np.array([[1.0, 0], [0, 1], [0, 2]]), 2) == [0, 1]
    assert places_of_distinct(np.array([[1.0, 0], [0, 1]]), np.nextafter(2, 3)) == [0]
    angles = np.arange(4) * 0.2
    chain = np.stack([np.cos(angles), np.sin(angles)], 1)  # each is near to the next alone
    assert places_of_distinct(chain, 0.05) == [0]


def test_by_a_column_and_then_the_nearest(tmp_path: Path) -> None:
    vectors = [[1, 0], [1, 0.01], [0, 1], [0.1, 1], [-1, 0]]
    write_rows(tmp_path / "p.jsonl", [{"id": f"p{n}", "prompt": f"Q{n}?", "v": v} for n, v in enumerate(vectors)])
    write_rows(tmp_path / "t.jsonl", [{"prompt": "T?", "v": [1, 0.01]}])
    near = {"to": [{"path": "t.jsonl"}], "k": 2, "column": "v"}
    heard = Heard()
    entry: dict[str, Any] = {"path": "p.jsonl", "distinct": {"column": "v"}}
    found = read(recipe(tmp_path, prompts=[entry]), heard)
    assert ids(found) == ["p0", "p2", "p4"] and not any(prompt.columns for prompt in found)
    assert heard.lines == ["p.jsonl: 3 of 5 prompts kept, none within 0.05 of an earlier one"]
    assert ids(read(recipe(tmp_path, prompts=[{**entry, "nearest": near}]), Heard())) == ["p0", "p2"]
    assert [prompt.columns["v"] for prompt in read(recipe(tmp_path, prompts=[{**entry, "keep": ["v"]}]), Heard())] == [
        vectors[0],
        vectors[2],
        vectors[4],
    ]


def test_one_model_embeds_the_pool_once_for_both(
    tmp_path: Path, models: dict[str, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The nearest of those that are distinct are looked for by the same embeddings, which are there already."""
    texts = [f"What is {'one ' * (number % 9)}?" for number in range(30)]
    write_rows(tmp_path / "p.jsonl", [{"id": f"p{n}", "prompt": f"{n} {text}"} for n, text in enumerate(texts)])
    write_rows(tmp_path / "t.jsonl", [{"prompt": "What is one one?"}])
    keys = {"model": str(models["gpt2"])}
    vectors = Embedder(keys["model"]).embed([f"{n} {text}" for n, text in enumerate(texts)]).astype(float)
    unit = vectors / np.linalg.norm(vectors, axis=1, keepdims=True)
    gaps = ((unit[:, None] - unit[None]) ** 2).sum(2) + 9 * np.triu(np.ones((30, 30)))
    within = float(np.median(gaps.min(1)[1:]))  # which about half of the prompts are near to
    near = {**keys, "to": [{"path": "t.jsonl"}], "k": 3}
    embedded: list[str] = []
    embed = Embedder.embed
    monkeypatch.setattr(Embedder, "embed", lambda self, some: embedded.extend(some) or embed(self, some))
    entry = {"path": "p.jsonl", "distinct": {**keys, "within": within}}
    kept = read(recipe(tmp_path, prompts=[entry]), Heard())
    found = read(recipe(tmp_path, prompts=[{**entry, "nearest": near}]), Heard())
    assert len(embedded) == len(set(embedded)) == 31 and 3 < len(kept) < 30
    vectors = Embedder(str(models["gpt2"])).embed([prompt.messages[-1]["content"] for prompt in kept])
    target = Embedder(str(models["gpt2"])).embed(["What is one one?"])
    away = np.argsort(((vectors - target) ** 2).sum(1), kind="stable")[:3]
    assert ids(found) == [kept[place].id for place in sorted(away)]
    embedded.clear()
    read(recipe(tmp_path, prompts=[{**entry, "nearest": {**near, "max_length": 2}}]), Heard())
    assert len(embedded) == len(kept) + 1  # others, of those that are kept alone


def test_drawn_prompts_by_a_model(tmp_path: Path, models: dict[str, Path]) -> None:
    """What a model drew is embedded, once; a dry run embeds nothing and counts with all."""
    said = [f"What is {'one ' * number}" for number in range(1, 8)]
    with fake_server(Fake(reply=lambda body: said[body["seed"] % len(said)])) as fake:
        magpie = {"model": "org/m", "server": fake.url, "number": 40, "tokenizer": written(tmp_path)}
        entry = {"magpie": magpie, "distinct": {"model": str(models["gpt2"]), "within": 0.02}}
        made = recipe(tmp_path, prompts=[entry])
        path = write_recipe(tmp_path, prompts=[entry], target=str(models["gpt2"]))
        ran = CliRunner().invoke(command, ["run", str(path), "--dry-run"])
        assert ran.exit_code == 0 and "magpie: at most 40 prompts kept" in " ".join(ran.output.split()), ran.output
        found = settled(made, Heard())
        files = {file: file.stat().st_mtime_ns for file in (made.folder / "embeddings").iterdir()}
        assert settled(made, Heard()) == found == read(made, Heard(), plan=True)
        assert files == {file: file.stat().st_mtime_ns for file in (made.folder / "embeddings").iterdir()}
    rows = [json.loads(line)["text"].strip() for line in (made.folder / "magpie/magpie.jsonl").read_text().splitlines()]
    pool = list(dict.fromkeys(rows))
    expected = [pool[place] for place in brute(Embedder(str(models["gpt2"])).embed(pool), 0.02)]
    assert words(found) == expected and 0 < len(expected) < len(pool)


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"path": "p.jsonl", "distinct": {}}, "exactly one of 'model' and 'column'"),
        ({"path": "p.jsonl", "distinct": {"column": "v", "dtype": "float32"}}, "'dtype' has no effect here"),
        ({"path": "p.jsonl", "distinct": {"column": "v", "within": 0}}, "greater than 0"),
        ({"magpie": {"model": "./m", "number": 2}, "distinct": {"column": "v"}}, "have no columns: give a `model`"),
    ],
)
def test_wrong_recipes(tmp_path: Path, entry: dict[str, Any], message: str) -> None:
    with pytest.raises(RecipeError) as caught:
        load(write_recipe(tmp_path, prompts=[entry]))
    assert re.search(rf"- \d+:\d+: .*{re.escape(message)}", str(caught.value)), str(caught.value)
