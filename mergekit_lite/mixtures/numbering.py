"""Whether the experts of two mixtures stand at the same numbers: merges and comparisons go by these."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.deferred import np, torch
from mergekit_lite.errors import CheckpointError
from mergekit_lite.mixtures.layers import ExpertLayer, expert_layers

if TYPE_CHECKING:
    import numpy.typing as npt

ALIKE = 0.9  # cosine of two rows of routers from which their experts may be one
APART = 0.5  # and below which they are two: fine-tunes of one mixture have 0.99 and more


def renumbered(models: Sequence[Checkpoint]) -> Iterator[str]:
    """Yield what the user should know of mixtures whose experts seem to stand at other numbers than the first one's.

    Rows of the routers decide, some kilobytes of each layer: an expert stands elsewhere where its own row is unlike
    that of the first model's expert, and another one's is like it.

    Raises:
        RunError: a file can't be read.
    """
    first = _layers(models[0])
    if not first:
        return
    with Reader() as reader:
        for model in models[1:]:
            others = {layer.number: layer for layer in _layers(model)}
            moved = {
                layer.number: found
                for layer in first
                if layer.number in others and (found := _moved(layer, others[layer.number], reader))
            }
            if moved:
                number, pairs = next(iter(moved.items()))
                shown = ", ".join(f"{one} → {other}" for one, other in pairs[:4])
                yield (
                    f"{model.reference}: in {len(moved)} of {len(first)} layers experts seem to stand at other numbers "
                    f"than in {models[0].reference}, by their rows in the routers (layer {number}: {shown}"
                    f"{' …' if len(pairs) > 4 else ''}). Experts are taken by their numbers."
                )


def _layers(model: Checkpoint) -> list[ExpertLayer]:
    try:
        return expert_layers(model)
    except CheckpointError:
        return []


def _moved(one: ExpertLayer, other: ExpertLayer, reader: Reader) -> list[tuple[int, int]]:
    """Return the experts that stand elsewhere in another model, each with its number there."""
    if one.rows.shape != other.rows.shape:
        return []
    cosines = _unit(one, reader) @ _unit(other, reader).T
    best = cosines.argmax(axis=1).tolist()
    return [
        (number, there)
        for number, there in enumerate(best)
        if cosines[number, there] >= ALIKE and cosines[number, number] < APART
    ]


def _unit(layer: ExpertLayer, reader: Reader) -> npt.NDArray[np.float64]:
    """Return a router's rows (experts, hidden), each of length 1."""
    rows = layer.rows.elements(reader, 0, layer.rows.numel).to(torch.float64).view(layer.rows.shape).numpy()
    lengths = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: npt.NDArray[np.float64] = np.divide(rows, lengths, out=np.zeros_like(rows), where=lengths > 0)
    return unit
