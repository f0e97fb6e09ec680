"""The check of a written model folder, the same for every way of training: nothing is published that fails it.

Names and shapes are held to the folder's own configuration, as transformers reads both; every element is read by the
package's own reader, a block at a time, and must be finite.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import torch

from mergekit_lite.answers import loading
from mergekit_lite.checkpoint import formats, open_checkpoint
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.distillation.training.model import ADAPTER, OWN_CODE
from mergekit_lite.errors import RunError, counted, listing

READ_ELEMENTS = 1 << 20  # at once


def check_sound(folder: Path, title: str, advice: str) -> int:
    """Read a model folder in full and return the number of its tensors.

    Args:
        folder: with the model, and maybe with an adapter beside it.
        title: the start of the message where it is not sound.
        advice: the end of that message: what to do.

    Raises:
        RunError: tensors are missing, unknown to the configuration, of other shapes, or not finite; with all of them.
        CheckpointError: the folder can't be read.
    """
    tensors = open_checkpoint(folder).tensors
    problems = [*_unlike_config(folder), *_not_finite(tensors.values())]
    for file in sorted((folder / ADAPTER).glob("*.safetensors")):
        problems += [f"the adapter's {problem}" for problem in _not_finite(formats.read_header(file).tensors.values())]
    if problems:
        raise RunError(listing(f"{title}: {counted(len(problems), 'problem')}", problems) + f"\n{advice}")
    return len(tensors)


def _unlike_config(folder: Path) -> Iterator[str]:
    """Yield how names and shapes differ from those of the configuration, without memory for the weights."""
    from transformers import AutoModelForCausalLM

    def load() -> Any:
        how: dict[str, Any] = {"device_map": "meta", "ignore_mismatched_sizes": True, "output_loading_info": True}
        return AutoModelForCausalLM.from_pretrained(folder, **loading.NO_CODE, **how)

    _, info = loading.fetched(str(folder), loading.CAUSAL, load, OWN_CODE)
    yield from (f"{name} is missing" for name in sorted(info["missing_keys"]))
    yield from (f"{name} is nothing that the configuration knows" for name in sorted(info["unexpected_keys"]))
    for name, found, expected in sorted(info["mismatched_keys"]):
        yield f"{name} has the shape {tuple(found)}, the configuration says {tuple(expected)}"


def _not_finite(tensors: Iterable[TensorSpec]) -> Iterator[str]:
    with Reader() as reader:
        for spec in tensors:
            parts = (
                int(values.numel() - torch.isfinite(values).sum())
                for start in range(0, spec.numel, READ_ELEMENTS)
                if (values := spec.elements(reader, start, min(READ_ELEMENTS, spec.numel - start))).is_floating_point()
            )
            if wrong := sum(parts):
                yield f"{spec.name}: {wrong:,} of {counted(spec.numel, 'element')} not finite (NaN or infinite)"
