"""Rows as mergekit 0.1.5 has them where it is right, and the right ones where it fails.

The constants are printed by ``python -m parity.vocabularies``, which runs mergekit on the same models.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

import mergekit_lite
from parity.vocabularies import CASES, MODELS, model, recipe
from tests.models import read_folder

MERGEKITS = {
    "union with one superset": [150.0, 151.0, 152.0, 153.0, 154.0, 155.0, 206.0],
    "a model's": [200.0, 201.0, 203.5, 203.5, 203.5, 203.5],
    "a model's with more": [150.0, 151.0, 152.0, 153.0, 154.0, 155.0, 206.0],
    "the base's": [150.0, 151.0, 152.0, 153.0, 154.0, 155.0],
    "tokens": [200.0, 201.0, 0.0, 304.0, 305.0, 100.0],
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    for number, (name, tokens) in enumerate(MODELS.items()):
        model(Path(name), number + 1, tokens)
    return tmp_path


@pytest.mark.parametrize("case", CASES)
def test_rows_are_those_of_mergekit(place: Path, case: str) -> None:
    mergekit_lite.merge(recipe(CASES[case]), "out")
    made = read_folder(place / "out")
    assert made["model.embed_tokens.weight"][:, 0].tolist() == MERGEKITS[case]
    forced = CASES[case]["tokenizer"].get("tokens", {}).get("a")
    heads = [row + 50 * (not (forced and row == 0)) for row in MERGEKITS[case]]
    assert made["lm_head.weight"][:, 0].tolist() == heads
    assert json.loads((place / "out/config.json").read_text())["vocab_size"] == len(heads)


def test_tokens_beyond_the_rows_are_told(place: Path) -> None:
    """mergekit fails with a KeyError."""
    content = json.loads((place / "more/tokenizer.json").read_text())
    content["model"]["vocab"]["f"] = 9
    (place / "more/tokenizer.json").write_text(json.dumps(content))
    asked = recipe({"models": ("one", "more"), "tokenizer": {"source": "more"}})
    assert "more: 1 token of its tokenizer without a row" in mergekit_lite.plan_merge(asked, "x").notes
    mergekit_lite.merge(asked, "out")
    assert read_folder(place / "out")["model.embed_tokens.weight"][:, 0].tolist() == MERGEKITS["a model's with more"]
