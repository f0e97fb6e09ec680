"""Checkpoints to measure on: tensors filled with noise, and the same after small steps.

All are rounded from float32, as training with float32 master weights leaves them. After steps as small as those of
DPO, far below bfloat16's spacing, most weights are equal in all of them; after steps like those of supervised
fine-tuning few are, and the differences are small multiples of the spacing, so that many are equal in size. They are
made block by block in their files, whatever their size; one thread a shard.

    python -m benchmarks.checkpoints FAMILY_AS_JSON
"""

from __future__ import annotations

import json
import math
import shutil
import struct
import sys
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

WEIGHT_RMS = 0.02
DPO_RMS = 6e-6  # of SFT → DPO on a 7B model
SFT_RMS = 1e-4  # of base → SFT
VOCABULARY = 32_000
WIDTHS = {1e9: (2048, 5632), 0: (512, 1536)}  # parameters from which on: hidden size, MLP size
BLOCK = 1 << 20  # elements

STORED = {"bfloat16": ("BF16", 2), "float32": ("F32", 4)}  # in a file of safetensors: name, bytes an element

Shapes = dict[str, tuple[int, ...]]


@dataclass(frozen=True)
class Family:
    """Checkpoints of one model.

    Attributes:
        folder: holds them and, once they are complete, ``family.json``.
        names: of the checkpoints. The first is where all others started from.
        step: rms of the others' differences from it, each drawn by itself.
        size: parameters wanted; ``parameters`` is what whole layers come to.
        kind: ``model``, a Llama in two shards; ``tensor``, a single one in one file.
        dtype: of the weights, ``bfloat16`` or ``float32``: not rounded, so that hardly two differences are equal.
    """

    folder: Path
    names: tuple[str, ...]
    step: float
    size: float
    kind: str = "model"
    dtype: str = "bfloat16"

    @property
    def models(self) -> tuple[Path, ...]:
        """The checkpoints."""
        return tuple(self.folder / (f"{name}.safetensors" if self.kind == "tensor" else name) for name in self.names)

    @property
    def shapes(self) -> Shapes:
        """Every tensor of one checkpoint."""
        if self.kind == "tensor":
            return {"weight": (round(self.size / 4096), 4096)}
        return _llama(**self._dimensions())

    @property
    def parameters(self) -> int:
        """Elements of one checkpoint."""
        return sum(map(math.prod, self.shapes.values()))

    @property
    def nbytes(self) -> int:
        """Bytes of one checkpoint's weights."""
        return STORED[self.dtype][1] * self.parameters

    def is_made(self) -> bool:
        """Return whether the folder has this family, complete."""
        note = self.folder / "family.json"
        return note.exists() and note.read_text() == self.as_json()

    def make(self) -> None:
        """Write all checkpoints, and the note that says so last."""
        self.remove()
        self.folder.mkdir(parents=True)
        if self.kind == "tensor":
            self._fill(self.models, self.shapes, seed=0)
        else:
            self._make_folders()
        (self.folder / "family.json").write_text(self.as_json())

    def remove(self) -> None:
        """Remove all checkpoints."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def as_json(self) -> str:
        """Return all attributes."""
        return json.dumps(asdict(self), default=str)

    @classmethod
    def from_json(cls, text: str) -> Family:
        """Return the value that ``as_json`` wrote."""
        data = json.loads(text)
        return cls(**data | {"folder": Path(data["folder"]), "names": tuple(data["names"])})

    def _make_folders(self) -> None:
        shards = _halves(self.shapes)
        names = [f"model-{number + 1:05}-of-{len(shards):05}.safetensors" for number in range(len(shards))]
        index = {
            "metadata": {"total_size": self.nbytes},
            "weight_map": {tensor: name for name, shard in zip(names, shards, strict=True) for tensor in shard},
        }
        for model in self.models:
            model.mkdir()
            (model / "config.json").write_text(json.dumps(self._config(), indent=2))
            (model / "model.safetensors.index.json").write_text(json.dumps(index, indent=2))
        files = [tuple(model / name for model in self.models) for name in names]
        with ThreadPoolExecutor() as pool:
            list(pool.map(self._fill, files, shards, range(len(shards))))

    def _fill(self, files: tuple[Path, ...], shapes: Shapes, seed: int) -> None:
        """Write the same shard of all checkpoints."""
        import torch

        def stored(values: Any) -> memoryview:
            view: memoryview = values.to(getattr(torch, self.dtype)).view(torch.uint8).numpy().data
            return view

        header = _header(shapes, self.dtype)
        normal = torch.Generator().manual_seed(seed)
        weight, delta = torch.empty(BLOCK), torch.empty(BLOCK)
        with ExitStack() as stack:
            first, *others = (stack.enter_context(file.open("wb")) for file in files)
            for file in (first, *others):
                file.write(header)
            left = sum(map(math.prod, shapes.values()))
            while left:
                count = min(BLOCK, left)
                weight.normal_(0, WEIGHT_RMS, generator=normal)
                first.write(stored(weight[:count]))
                for file in others:
                    file.write(stored((weight + delta.normal_(0, self.step, generator=normal))[:count]))
                left -= count

    def _dimensions(self) -> dict[str, int]:
        hidden, mlp = next(widths for least, widths in WIDTHS.items() if self.size >= least)
        layers = (self.size - 2 * VOCABULARY * hidden) / (4 * hidden**2 + 3 * hidden * mlp)
        return {"hidden": hidden, "mlp": mlp, "layers": max(1, round(layers))}

    def _config(self) -> dict[str, Any]:
        dimensions = self._dimensions()
        return {
            "architectures": ["LlamaForCausalLM"],
            "model_type": "llama",
            "hidden_size": dimensions["hidden"],
            "intermediate_size": dimensions["mlp"],
            "num_hidden_layers": dimensions["layers"],
            "num_attention_heads": dimensions["hidden"] // 64,
            "vocab_size": VOCABULARY,
            "torch_dtype": self.dtype,
            "tie_word_embeddings": False,
        }


def _llama(hidden: int, mlp: int, layers: int) -> Shapes:
    shapes: Shapes = {"model.embed_tokens.weight": (VOCABULARY, hidden)}
    for layer in range(layers):
        prefix = f"model.layers.{layer}"
        shapes |= {f"{prefix}.self_attn.{name}_proj.weight": (hidden, hidden) for name in "qkvo"}
        shapes |= {f"{prefix}.mlp.{name}_proj.weight": (mlp, hidden) for name in ("gate", "up")}
        shapes |= {f"{prefix}.mlp.down_proj.weight": (hidden, mlp)}
        shapes |= {f"{prefix}.{name}_layernorm.weight": (hidden,) for name in ("input", "post_attention")}
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (VOCABULARY, hidden)}


def _halves(shapes: Shapes) -> list[Shapes]:
    """Two shards of nearly the same size."""
    shards: list[Shapes] = [{}, {}]
    whole, done = sum(map(math.prod, shapes.values())), 0
    for name, shape in shapes.items():
        shards[done >= whole / 2][name] = shape
        done += math.prod(shape)
    return shards


def _header(shapes: Shapes, dtype: str) -> bytes:
    """Return the start of a safetensors file, padded so that the weights are aligned."""
    name_of_dtype, size = STORED[dtype]
    entries: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    end = 0
    for name, shape in shapes.items():
        begin, end = end, end + size * math.prod(shape)
        entries[name] = {"dtype": name_of_dtype, "shape": shape, "data_offsets": [begin, end]}
    text = json.dumps(entries, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


if __name__ == "__main__":  # in a process of its own, see processes.own_peak
    Family.from_json(sys.argv[1]).make()
