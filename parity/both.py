"""Running a recipe: by mergekit, as it is or in float64; and by mergekit_lite."""

from __future__ import annotations

import tempfile
from pathlib import Path

import torch
import yaml
from safetensors.torch import load_file

from parity.recipes import Yaml

State = dict[str, torch.Tensor]


def by_mergekit(body: Yaml, seed: int = 0) -> State:
    """Return mergekit's merge of the recipe."""
    from mergekit.config import MergeConfiguration
    from mergekit.merge import MergeOptions, run_merge

    options = MergeOptions(
        copy_tokenizer=False, write_model_card=False, quiet=True, random_seed=seed, lazy_unpickle=True
    )
    with tempfile.TemporaryDirectory() as out:
        run_merge(MergeConfiguration.model_validate(body), out, options=options)
        return tensors_in(Path(out))


def in_float64(body: Yaml) -> State:
    """Return mergekit's merge in 64 bits instead of the models' 16 or 32."""
    return by_mergekit({key: value for key, value in body.items() if key != "out_dtype"} | {"dtype": "float64"})


def by_mergekit_lite(body: Yaml) -> State:
    """Return mergekit_lite's merge of the recipe."""
    from mergekit_lite.merging import merge

    with tempfile.TemporaryDirectory() as out:
        recipe = Path(out) / "recipe.yml"
        recipe.write_text(yaml.safe_dump(body))
        merge(recipe, Path(out) / "merged")
        return tensors_in(Path(out) / "merged")


def tensors_in(folder: Path) -> State:
    """Return all tensors of a folder."""
    state: State = {}
    for file in sorted(folder.glob("*.safetensors")):
        state |= load_file(file)
    return state
