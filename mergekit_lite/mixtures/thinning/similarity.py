"""How alike the experts of a layer are: cosines of their weights, or of their rows in the router.

    similarity(i, j) = ⟨w_i, w_j⟩ / (‖w_i‖ ‖w_j‖)

where w_i is everything that expert i is made of, as one vector, or its row in the router. Inner products are summed in
float64, piece by piece: memory is that of one piece of each expert.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Literal

from mergekit_lite.checkpoint import TensorSpec
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.deferred import np, torch
from mergekit_lite.mixtures.layers import ExpertLayer

if TYPE_CHECKING:
    from mergekit_lite.mixtures.thinning.grouping import Similarities

Measured = Literal["weights", "router"]
PIECES = 1 << 22  # elements of all experts of a layer that are compared at once


def similarities(
    layers: Sequence[ExpertLayer], of: Measured, progress: Callable[[int, int], None] | None = None
) -> list[Similarities]:
    """Return for each layer the cosines between its experts (experts, experts), float64.

    Args:
        layers: the layers.
        of: ``weights``, for which all experts are read, or ``router``.
        progress: called with (bytes read, bytes in all).

    Raises:
        RunError: a file can't be read.
    """
    vectors = [_vectors(layer, of) for layer in layers]
    in_all = sum(spec.nbytes for of_layer in vectors for expert in of_layer for spec in expert)
    done = 0
    found = []
    with Reader() as reader:
        for of_layer in vectors:
            found.append(_cosines(of_layer, reader))
            done += sum(spec.nbytes for expert in of_layer for spec in expert)
            if progress is not None:
                progress(done, in_all)
    return found


def _vectors(layer: ExpertLayer, of: Measured) -> list[list[TensorSpec]]:
    """Return what each expert's vector is made of."""
    if of == "router":
        return [[row] for row in layer.router_rows]
    return [[expert[role] for role in ("gate", "up", "down")] for expert in layer.experts]


def _cosines(vectors: Sequence[Sequence[TensorSpec]], reader: Reader) -> Similarities:
    products = torch.zeros(len(vectors), len(vectors), dtype=torch.float64)
    most = max(1, PIECES // len(vectors))
    for turn in range(len(vectors[0])):
        specs = [vector[turn] for vector in vectors]
        for start in range(0, specs[0].numel, most):
            count = min(most, specs[0].numel - start)
            piece = torch.stack([spec.elements(reader, start, count).double() for spec in specs])
            products += piece @ piece.T
    lengths = products.diagonal().sqrt().clamp(min=torch.finfo(torch.float64).tiny)
    cosines: Similarities = np.asarray((products / lengths / lengths[:, None]).clamp(-1, 1))
    return cosines
