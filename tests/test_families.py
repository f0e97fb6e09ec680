"""Every family of ``tests/families.py``: arithmetic as floats do it, and outputs that load as what they should be."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

import mergekit_lite
from tests.families import FAMILIES, INPUTS, Family, step, weights
from tests.models import State, same_bytes

pytest.importorskip("transformers").utils.logging.disable_progress_bar()
pytestmark = pytest.mark.filterwarnings("ignore")  # of classes that miss their kernels

ALPHA = 0.5
ONE = {"threads": 1}


@dataclass(frozen=True)
class Pair:
    """A family's base and what training made of it.

    Attributes:
        family: its row of the table.
        model: of the class, whose weights are a test's own.
        base: the base's folder in each layout.
        tuned: the tuned model's.
        states: the state dicts of both.
    """

    family: Family
    model: Any
    base: dict[str, Path]
    tuned: dict[str, Path]
    states: tuple[State, State]


@pytest.fixture(scope="module", params=FAMILIES, ids=lambda family: family.name)
def pair(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    """Write both models in all their layouts, in float32."""
    family: Family = request.param
    folder = tmp_path_factory.mktemp(family.name)
    model = family.make()
    before, base = copy(model.state_dict()), family.write(model, folder / "base")
    step(model, 0.02)
    yield Pair(family, model, base, family.write(model, folder / "tuned"), (before, copy(model.state_dict())))


def copy(state: State) -> State:
    return {name: tensor.clone() for name, tensor in state.items()}


def extrapolated(base: State, tuned: State) -> State:
    """Return b + α·(b − s) in float64, rounded once."""
    assert base.keys() == tuned.keys()
    return {
        name: (b.double() + ALPHA * (b.double() - base[name].double())).to(b.dtype) if b.is_floating_point() else b
        for name, b in tuned.items()
    }


def assert_same(ours: State, wanted: State) -> None:
    assert ours.keys() == wanted.keys()
    assert [name for name, tensor in wanted.items() if not same_bytes(ours[name], tensor)] == []


def test_extrapolated(pair: Pair, tmp_path: Path) -> None:
    """In each layout: every tensor is that of float arithmetic, and the library loads the model that they make."""
    wanted = extrapolated(*pair.states)
    for layout, tuned in pair.tuned.items():
        out = tmp_path / layout
        mergekit_lite.extrapolate(pair.base[layout], tuned, out, ALPHA, **ONE)
        assert_same(weights(out), extrapolated(weights(pair.base[layout]), weights(tuned)))
        assert mergekit_lite.verify(out).sound
        assert layout == "published" or mergekit_lite.inspect(out).doubts == ()
        loaded = pair.family.load(out)
        assert_same(loaded.state_dict(), wanted)
    pair.model.load_state_dict(wanted)
    inputs = INPUTS[pair.family.inputs]
    with torch.no_grad():
        torch.testing.assert_close(loaded(**inputs)[0], pair.model(**inputs)[0])


def test_base_in_another_layout(pair: Pair, tmp_path: Path) -> None:
    """The output has the tuned model's layout."""
    for layout in pair.base.keys() - {"saved"}:
        assert_mixed(pair, layout, "saved", tmp_path / layout)


@pytest.mark.slow
def test_tuned_in_another_layout(pair: Pair, tmp_path: Path) -> None:
    for layout in pair.base.keys() - {"saved"}:
        assert_mixed(pair, "saved", layout, tmp_path / layout)


def assert_mixed(pair: Pair, before: str, after: str, out: Path) -> None:
    mergekit_lite.extrapolate(pair.base[before], pair.tuned[after], out, ALPHA, **ONE)
    assert weights(out).keys() == weights(pair.tuned[after]).keys()
    assert_same(pair.family.load(out).state_dict(), extrapolated(*pair.states))


@pytest.mark.slow
def test_merged(pair: Pair, tmp_path: Path) -> None:
    models = [
        {"model": str(folder), "parameters": {"weight": 1}} for folder in (pair.base["saved"], pair.tuned["saved"])
    ]
    mergekit_lite.merge({"merge_method": "linear", "models": models}, tmp_path / "out", **ONE)
    base, tuned = pair.states
    half = {
        name: ((base[name].double() + b.double()) / 2).to(b.dtype) if b.is_floating_point() else b
        for name, b in tuned.items()
    }
    assert_same(pair.family.load(tmp_path / "out").state_dict(), half)
    assert mergekit_lite.verify(tmp_path / "out").sound


@pytest.mark.slow
def test_vectors(pair: Pair, tmp_path: Path) -> None:
    """What was learnt, taken out and added again, makes the tuned model."""
    base, tuned = pair.base["saved"], pair.tuned["saved"]
    mergekit_lite.extract_vector(base, tuned, tmp_path / "v.safetensors", **ONE)
    mergekit_lite.apply_vectors(base, [str(tmp_path / "v.safetensors")], tmp_path / "out", **ONE)
    assert mergekit_lite.verify(tmp_path / "out").sound
    loaded = pair.family.load(tmp_path / "out").state_dict()
    for name, tensor in pair.states[1].items():
        torch.testing.assert_close(loaded[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_compared(pair: Pair) -> None:
    base, tuned = (weights(folders["saved"]) for folders in (pair.base, pair.tuned))
    moved = math.sqrt(sum(float((tuned[name].double() - base[name].double()).square().sum()) for name in tuned))
    compared = mergekit_lite.compare(pair.base["saved"], [pair.tuned["saved"]])
    assert compared.unmatched == ()
    assert compared.overall.norm == pytest.approx((moved,), rel=1e-6)
