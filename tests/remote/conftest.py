"""Models of which outputs are made, and a store to write them to."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.models import state, tuned, write_folder
from tests.remote.outputs import extrapolate, use
from tests.stores.object_stores import EACH, Store, serving


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """sft and dpo, and what extrapolating them makes on a disk."""
    place = tmp_path_factory.mktemp("models")
    sft = state(1, layers=8, hidden=64, vocabulary=500)
    write_folder(place / "sft", sft)
    write_folder(place / "dpo", tuned(sft, 2), shards=2)
    extrapolate(place, "out", threads=1)
    return place


@pytest.fixture(scope="module", params=EACH)
def server(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Store]:
    with serving(tmp_path_factory.mktemp("store"), request.param) as store:
        yield store


@pytest.fixture
def store(server: Store, monkeypatch: pytest.MonkeyPatch) -> Store:
    use(server, monkeypatch)
    return server
