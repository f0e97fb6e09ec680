"""Task vectors that lie: refused with one clear message when they are opened, or at the latest when they are read."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.vector_file import KEY, read_vector
from mergekit_lite.errors import CheckpointError, MergekitLiteError, NonFiniteError, RunError
from mergekit_lite.vectors.application import apply_vectors
from mergekit_lite.vectors.extraction import ExtractSettings, extract_vector
from tests.checkpoint.reading import read_all
from tests.models import State, state, tuned, write_folder

Q = "model.layers.0.self_attn.q_proj.weight"
FORMATS = {
    "dense": ExtractSettings(),
    "sparse": ExtractSettings("sparse", density=0.3),
    "sign": ExtractSettings("sign"),
    "lowrank": ExtractSettings("lowrank", rank=2),
}
About = dict[str, Any]
Lie = Callable[[State, About], object]


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A base, and a sound vector of each format."""
    write_folder(tmp_path / "base", state(0, hidden=32))
    write_folder(tmp_path / "tuned", tuned(state(0, hidden=32), 1))
    for name, how in FORMATS.items():
        extract_vector(tmp_path / "base", tmp_path / "tuned", tmp_path / f"{name}.safetensors", **vars(how))
    return tmp_path


def forged(path: Path, lie: Lie) -> Path:
    """The vector with something about it changed."""
    tensors = load_file(path)
    with safe_open(path, "pt") as opened:
        about = json.loads(opened.metadata()[KEY])
    lie(tensors, about)
    save_file(tensors, path, metadata={KEY: json.dumps(about)})
    return path


def put(name: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Lie:
    return lambda tensors, _: tensors.update({name: change(tensors[name])})


def drop(name: str) -> Lie:
    return lambda tensors, _: tensors.pop(name)


def about(**changes: object) -> Lie:
    return lambda _, told: told.update(changes)


def describe(value: object) -> Lie:
    return lambda _, told: told["tensors"].update({Q: value})


OPENED: dict[str, tuple[str, Lie, str]] = {
    "another version": ("dense", about(version=2), "version 2, this program reads 1"),
    "no version": ("dense", about(version=None), "version None"),
    "an unknown format": ("dense", about(format="zip"), "format 'zip', expected one of dense"),
    "no base": ("dense", about(base=None), "of the base should hold"),
    "a base with codes for the terminal": (
        "dense",
        lambda _, told: told["base"].update(reference="\x1b[2J"),
        "printable text",
    ),
    "tensors a list": ("dense", about(tensors=[]), "lacks its tensors"),
    "a name with codes for the terminal": ("dense", lambda _, told: told["tensors"].update({"\x1b[2J": 1}), "unprint"),
    "a tensor not described": ("dense", lambda _, told: told["tensors"].pop(Q), "stored, but not described"),
    "a tensor not stored": ("dense", drop(Q), "no way to store"),
    "described by a number": ("dense", describe(3), "expected a dtype and a shape"),
    "an unknown dtype": ("dense", describe(["float3", [32, 32]]), "expected a dtype and a shape"),
    "an integer dtype": ("dense", describe(["int64", [32, 32]]), "not for arithmetic"),
    "a negative size": ("dense", describe(["bfloat16", [-8, -8]]), "expected a dtype and a shape"),
    "another shape": ("dense", describe(["bfloat16", [16, 64]]), "expected bfloat16|expected float64"),
    "integers for differences": ("dense", put(Q, lambda x: x.to(torch.int16)), "is int16"),
    "signs for more elements": ("sign", describe(["bfloat16", [8, 1 << 40]]), "is uint8"),
    "too few signs": ("sign", put(f"{Q}:bits", lambda x: x[:-1]), "is uint8"),
    "too few sizes": ("sign", put(f"{Q}:sizes", lambda x: x[:-1]), "is float32"),
    "signs without sizes": ("sign", drop(f"{Q}:sizes"), "no way to store a difference"),
    "factors of two ranks": ("lowrank", put(f"{Q}:left", lambda x: x[:, :1].clone()), "expected float64"),
    "a factor of no rank": ("lowrank", put(f"{Q}:left", lambda x: x[:, :0].clone()), "rank"),
    "fewer places than values": ("sparse", put(f"{Q}:places", lambda x: x[:-1]), "is uint16"),
    "places of another kind": ("sparse", put(f"{Q}:places", lambda x: x.to(torch.int16)), "is int16"),
    "an index of too few chunks": ("sparse", put(f"{Q}:starts", lambda x: x[:1]), "is int64"),
    "an index that counts too many": ("sparse", put(f"{Q}:starts", lambda x: x + x[-1:]), "counts from"),
    "an index below zero": ("sparse", put(f"{Q}:starts", lambda x: -x), "counts from"),
    "two ways at once": (
        "sparse",
        lambda tensors, _: tensors.update({f"{Q}:bits": torch.zeros(8, dtype=torch.uint8)}),
        "no way to store",
    ),
}


@pytest.mark.parametrize("case", OPENED)
def test_refused_when_opened(case: str, place: Path) -> None:
    form, lie, told = OPENED[case]
    path = forged(place / f"{form}.safetensors", lie)
    with pytest.raises(CheckpointError, match=told) as caught:
        read_vector(str(path), path)
    message = str(caught.value)
    assert str(path) in message and len(message) < 10_000 and message.replace("\n", "").isprintable()


def test_metadata_that_are_no_description(place: Path) -> None:
    for text in ("{", "[" * 100_000, "3", "[]", '"x"'):
        save_file({"a": torch.ones(2)}, place / "x.safetensors", metadata={KEY: text})
        with pytest.raises(CheckpointError):
            read_vector("x", place / "x.safetensors")


@pytest.mark.parametrize(
    ("form", "name", "change", "error"),
    [
        ("sparse", f"{Q}:places", lambda x: x.int().flip(0).to(torch.uint16), RunError),
        ("sparse", f"{Q}:places", lambda x: (x.int() * 0 + 65_535).to(torch.uint16), RunError),
        ("sign", f"{Q}:sizes", lambda x: x * torch.nan, NonFiniteError),
        ("lowrank", f"{Q}:left", lambda x: x * torch.inf, NonFiniteError),
        ("dense", Q, lambda x: x * torch.nan, NonFiniteError),
        ("sparse", f"{Q}:values", lambda x: x * torch.nan, NonFiniteError),
    ],
)
def test_refused_when_read(form: str, name: str, change: Any, error: type[Exception], place: Path) -> None:
    """Nothing is published."""
    path = forged(place / f"{form}.safetensors", put(name, change))
    with pytest.raises(error, match="q_proj"):
        apply_vectors(place / "base", [str(path)], place / "out")
    assert not (place / "out").exists()


def test_another_base_is_refused_though_shapes_fit(place: Path) -> None:
    path = forged(place / "dense.safetensors", lambda _, told: told["base"].update(sample="0" * 32))
    with pytest.raises(CheckpointError, match="whose weights are not those"):
        open_checkpoint(f"{place / 'base'}+{path}")


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow])
@given(data=st.data(), form=st.sampled_from(sorted(FORMATS)))
def test_damaged_anywhere_it_is_refused_or_read(data: st.DataObject, form: str, place: Path) -> None:
    content = bytearray((place / f"{form}.safetensors").read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    path = place / "damaged.safetensors"
    path.write_bytes(content)
    with suppress(MergekitLiteError):
        read_all(open_checkpoint(f"{place / 'base'}+rebase:{path}"))
