"""Made-up statistics of models, exact numbers on every machine, where merges need some."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
import yaml
from safetensors.torch import save_file

from mergekit_lite import open_checkpoint
from mergekit_lite.checkpoint.statistics_file import Gram, Kind, Prefix, metadata_of
from mergekit_lite.methods import METHODS
from mergekit_lite.planning.statistics import digest_of_merge
from mergekit_lite.recipe import parse


def draws(seed: int, *shape: int) -> np.ndarray:
    """Whole numbers from 0 to 15, as float32."""
    return (np.random.PCG64(seed).random_raw(int(np.prod(shape))) >> 60).astype(np.float32).reshape(shape)


def write_statistics(model: str | Path, kind: Kind, file: str | Path, seed: int, prefix: Prefix | None = None) -> None:
    """Write Fisher information of every tensor of a model, or a Gram matrix for every weight in its layers."""
    checkpoint = open_checkpoint(model)
    tensors: dict[str, torch.Tensor] = {}
    grams: dict[str, Gram] = {}
    for number, (name, spec) in enumerate(sorted(checkpoint.tensors.items())):
        own = 1000 * seed + number
        if kind == "fisher":
            tensors[name] = torch.from_numpy(draws(own, *spec.shape) / 1024)
        elif len(spec.shape) == 2 and ".layers." in name:
            grams[name] = Gram(name.replace(".weight", ".gram"), 1)
            x = (draws(own, spec.shape[1]) - 8) / 16  # a matrix of rank 1, and a diagonal: it can be inverted
            tensors[grams[name].name] = torch.from_numpy(np.outer(x, x) + np.diag(1 + draws(own + 500, spec.shape[1])))
    save_file(tensors, file, metadata_of(kind, checkpoint.identity(), 10, 1, "", "float32 on cpu", grams, prefix))


def write_those_of(recipe: Mapping[str, Any]) -> None:
    """Write the statistics that a recipe names, if any."""
    for number, source in enumerate(recipe.get("models", ())):
        if "statistics" in source:
            method = METHODS[recipe["merge_method"]]
            kind: Any = method.statistics
            prefix = prefix_of(recipe) if method.prefixed else None
            write_statistics(source["model"], kind, source["statistics"], number, prefix)


def prefix_of(recipe: Mapping[str, Any]) -> Prefix:
    """Return what the statistics of a recipe of ``regmean_plus`` say of the merged layers before."""
    asked = parse(yaml.safe_dump(dict(recipe)), "the recipe")
    return Prefix(digest_of_merge(asked, {model: open_checkpoint(model) for model in asked.models}), "")
