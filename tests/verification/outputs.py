"""Models, outputs made of them, and ways to damage those."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import yaml
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite.commands import main
from mergekit_lite.output.manifest import SEAL, seal, text_of
from mergekit_lite.output.workspace import manifest_path
from tests.models import state, tuned, write_folder

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
DELTAS = [{"model": "b", "parameters": {"weight": 0.6}}, {"model": "c", "parameters": {"weight": 0.7}}]
BASED: dict[str, Any] = {"base_model": "a", "models": DELTAS, "seed": 3}
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": DELTAS},
    "gradient": {"merge_method": "linear", "models": [{"model": "b"}, DELTAS[1]], "parameters": {"weight": [0, 1]}},
    "dare": BASED | {"merge_method": "dare_ties", "parameters": {"density": 0.5}},
    "ties": BASED | {"merge_method": "ties", "parameters": {"density": 0.5}},
    "ties-global": BASED | {"merge_method": "ties", "parameters": {"density": 0.5, "trim": "global"}},
    "varm-model": {"merge_method": "varm", "base_model": "a", "models": [{"model": "b"}, {"model": "c"}],
                   "parameters": {"granularity": "model"}},
    "varm-layer": {"merge_method": "varm", "base_model": "a", "models": [{"model": "b"}, {"model": "c"}],
                   "parameters": {"granularity": "layer"}},
    "franken": {"merge_method": "passthrough",
                "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]},
                           {"sources": [{"model": "b", "layer_range": [1, 2]}]}]},
    "exclude": {"merge_method": "linear", "models": DELTAS, "exclude": ["norm", "lm_head"]},
    "stochastic": {"merge_method": "linear", "models": DELTAS, "rounding": "stochastic", "seed": 7},
    "wide": {"merge_method": "linear", "models": DELTAS, "out_dtype": "float32"},
    "expo": {"merge_method": "expo", "base_model": "a", "models": [{"model": "b"}], "parameters": {"alpha": 0.3}},
}  # fmt: skip
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest": ("out", {"alpha": 0.3}),
    "stochastic": ("out", {"alpha": 0.3, "rounding": "stochastic", "seed": 5}),
    "unused seed": ("out", {"alpha": 0.3, "seed": 5}),
    "wide": ("out", {"alpha": 0.3, "out_dtype": "float32"}),
    "parts": ("out", {"alpha": 0.3, "alpha_for": {"norm": 0.0, "layers.1": 1.0}, "exclude": ["lm_head"]}),
    "only": ("out", {"alpha": 0.3, "include": ["mlp"]}),
    "shards": ("out", {"alpha": 0.3, "shard_size": 1000}),
    "several": ("out-{alpha}", {"alpha": [0.1, 1.0]}),
    "several files": ("out-{alpha}.pt", {"alpha": [0.1, 1.0], "rounding": "stochastic"}),
    "safetensors": ("out.safetensors", {"alpha": 0.3}),
    "torch": ("out.pt", {"alpha": 0.3}),
}


def write_models(folder: Path) -> None:
    """A model ``a`` and two tuned ones, ``b`` and ``c``."""
    base = state(0, hidden=16) | {"ids": torch.arange(7)}
    write_folder(folder / "a", base, config=CONFIG)
    write_folder(folder / "b", tuned_floats(base, 1), shards=2, config=CONFIG)
    write_folder(folder / "c", tuned_floats(base, 2), config=CONFIG)
    (folder / "b" / "tokenizer.json").write_text("{}")


def tuned_floats(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    """The state after a step of all but its numbers."""
    return tuned({name: tensor for name, tensor in base.items() if name != "ids"}, seed) | {"ids": base["ids"]}


def merged(name: str) -> Path:
    """The output of one of ``RECIPES``."""
    Path("r.yml").write_text(yaml.safe_dump(RECIPES[name]))
    return mergekit_lite.merge("r.yml", "out").outputs[0]


def extrapolated(name: str = "nearest") -> tuple[Path, ...]:
    """The outputs of one of ``PAIRS``."""
    output, options = PAIRS[name]
    return mergekit_lite.extrapolate("a", "b", output, **options).outputs


def edit(output: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool = True) -> None:
    """Change a manifest, and let its own digest agree again."""
    path = manifest_path(output)
    content = json.loads(path.read_bytes())
    change(content)
    text = text_of(content | ({SEAL: seal(content)} if sealed else {}))
    path.write_bytes(text.encode(errors="backslashreplace"))


def flip(path: Path, position: int, bit: int = 0) -> None:
    """Flip one bit of a file."""
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def invoke(*arguments: str) -> tuple[int, str]:
    """Exit code and output of ``verify``; nothing but messages may come of it."""
    result = CliRunner().invoke(main, ["verify", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output
