"""The benchmarks' checkpoints are what they claim to be, and their recipes run."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

import mergekit_lite
from benchmarks.checkpoints import Family
from benchmarks.merge import MERGES, Merge


@pytest.fixture(scope="module")
def family(tmp_path_factory: pytest.TempPathFactory) -> Family:
    folder = tmp_path_factory.mktemp("benchmark") / "family"
    made = Family(folder, ("base", "one", "two"), step=1e-4, size=1 << 17, kind="tensor")
    assert not made.is_made()
    made.make()
    return made


def test_fine_tunes_are_small_independent_steps_away(family: Family) -> None:
    assert family.is_made() and Family.from_json(family.as_json()) == family
    base, *tuned = (load_file(path)["weight"] for path in family.models)
    assert base.numel() == family.parameters == 1 << 17 and base.dtype == torch.bfloat16
    one, two = (model.double() - base.double() for model in tuned)
    for delta in (one, two):
        assert 0.9e-4 < delta.square().mean().sqrt() < 1.5e-4  # rounding adds to it
        assert (delta == 0).double().mean() > 0.1 and delta.unique().numel() < 0.05 * delta.numel()
    shared = torch.corrcoef(torch.stack([one.flatten(), two.flatten()]))[0, 1]
    assert shared < 0.15  # that of rounding the base


def test_float32_is_not_rounded(family: Family, tmp_path: Path) -> None:
    """Differences of few amounts would be told apart sooner than a real fine-tune's in float32."""
    wide = replace(family, folder=tmp_path / "wide", dtype="float32")
    wide.make()
    base, one, _ = (load_file(path)["weight"] for path in wide.models)
    assert base.dtype == torch.float32 and wide.nbytes == 2 * family.nbytes
    assert torch.equal(base.bfloat16(), load_file(family.models[0])["weight"])
    assert (one - base).unique().numel() > 0.1 * base.numel()


@pytest.mark.parametrize("merge", MERGES, ids=lambda merge: merge.label)
def test_recipes_run(merge: Merge, family: Family, tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yml"
    recipe.write_text(json.dumps(merge.recipe(family)))
    mergekit_lite.merge(recipe, tmp_path / "out.safetensors")
    merged, base = (load_file(path)["weight"] for path in (tmp_path / "out.safetensors", family.models[0]))
    assert merged.shape == base.shape and not torch.equal(merged, base)
