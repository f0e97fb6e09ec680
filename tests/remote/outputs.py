"""Outputs in an object store, as the tests of writing there make them and look at them."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

import mergekit_lite
from tests.stores.object_stores import Store

MANIFEST = "mergekit_lite_manifest.json"
SHARD = 50_000  # bytes
Objects = dict[str, bytes]


def use(store: Store, monkeypatch: pytest.MonkeyPatch) -> None:
    from mergekit_lite import object_stores

    for name, value in store.environment.items():
        monkeypatch.setenv(name, value)
    object_stores._store.cache_clear()


def extrapolate(
    models: Path, output: str, alpha: float | list[float] = 0.3, **options: object
) -> mergekit_lite.Finished:
    """Extrapolate models that are named as the command names them: their names are part of the plan."""
    settings = {"shard_size": SHARD, "threads": 2, **options}
    here = Path.cwd()
    os.chdir(models)
    try:
        return mergekit_lite.extrapolate("sft", "dpo", output, alpha, **settings)
    finally:
        os.chdir(here)


def under(store: Store, prefix: str) -> Objects:
    """The objects of an output and of what is beside it, by their names in it."""
    folder = f"{prefix.rpartition('/')[0]}/".lstrip("/")
    return {key.removeprefix(f"{prefix}/").removeprefix(folder): each for key, each in store.objects(prefix).items()}


def without_card(objects: Objects) -> Objects:
    """All but the card, which has the output's name in it."""
    return {name: content for name, content in objects.items() if name != "README.md"}
