"""WUDI: the change that interferes least with what each fine-tune does to its own inputs. Experimental.

Paper: Cheng et al., "Whoever Started the Interference Should End It", ICML 2025, arXiv 2503.08099.

    minimise Σ ‖(τ − δ)·δᵀ‖² / ‖δ‖² over the change τ of a matrix, from τ = Σδ on; out = base + τ

The rows of δ stand for the inputs that a linear layer was tuned on, so no data is needed. The loss is quadratic, and
its minimiser is known:

    τ = (Σ δG)·(Σ G)⁺, G = δᵀδ / ‖δ‖², and Σδ in the directions in which no δ changes anything

The released code instead takes 300 steps of Adam of 1e-5 each: ``steps: 300``. They move no element by more than about
3e-3, whatever the size of the deltas; the minimiser scales with them. Which is better is not known.

Where the deltas together have no more directions than the matrix has columns, as those of adapters do in a space of
their own, the minimiser satisfies all of them, loss 0. It can then be many times as long as Σδ and break the model: see
"Which merge helps?" in the documentation. So it is with grouped-query keys and values of whole fine-tunes: of three
random changes to a model whose keys have 192 rows and 576 columns (SmolLM2 135M), where 3 × 192 directions fill the
space, the keys' change came out 275 times as long as one of the three, the queries' twice as long. The released steps
stay near Σδ.

Which tensors are merged so, and the memory it takes, is told of the methods by singular vectors; the others get
base + mean(δ). A step takes as long as multiplying the matrix by a square one of its columns: hundreds of them are for
a GPU.
"""

from __future__ import annotations

from typing import Annotated, Literal

from mergekit_lite.deferred import torch
from mergekit_lite.methods.contract import Merge, Steps, TensorInfo
from mergekit_lite.methods.matrices import Deltas, Matrices, added, eigen, inverse, is_taken, mean
from mergekit_lite.methods.parameters import Bounds
from mergekit_lite.methods.registry import method

RATE, MOMENTUM, SQUARES, EPSILON = 1e-5, 0.9, 0.999, 1e-8  # of the released Adam


@method(
    given="fine-tunes", formula="base + argmin Σ |(τ − δ)·δᵀ|² / |δ|²", source="Cheng et al. 2025, arXiv 2503.08099"
)
def wudi(
    info: TensorInfo,
    *,
    steps: Annotated[int | Literal["exact"], Bounds(0)] = "exact",
    matrices: Matrices = "linear",
) -> Merge | Steps:
    """Add the change that disturbs least what each model does to the inputs it was tuned on. Experimental.

    Args:
        steps: exact, the minimiser; or a number of steps of Adam from the sum of the deltas on (released: 300).
    """
    if not is_taken(info, matrices):
        return mean(info)
    held = 7 * info.numel + 6 * info.shape[1] ** 2
    return added(lambda deltas: _least_interference(deltas, steps), held)


def _least_interference(deltas: Deltas, steps: int | str) -> torch.Tensor:
    """Return τ: float64 (m, n). The gradient of the loss is 2·(τ·ΣG − ΣδG)."""
    change = deltas.total()
    grams = change.new_zeros(change.shape[1], change.shape[1])
    wanted = torch.zeros_like(change)
    for delta in deltas:
        square = float(delta.square().sum())
        if square != 0:
            own = (delta.mT @ delta).div_(square)
            grams += own
            wanted += delta @ own
    if steps == "exact":
        values, vectors = eigen(grams)
        residual = change @ grams - wanted
        return change.sub_((residual @ vectors * inverse(values)) @ vectors.mT)
    first, second = torch.zeros_like(change), torch.zeros_like(change)
    for step in range(1, int(steps) + 1):
        gradient = (change @ grams).sub_(wanted).mul_(2)
        first.lerp_(gradient, 1 - MOMENTUM)
        second.mul_(SQUARES).addcmul_(gradient, gradient, value=1 - SQUARES)
        size = second.div(1 - SQUARES**step).sqrt_().add_(EPSILON)
        change.addcdiv_(first, size, value=-RATE / (1 - MOMENTUM**step))
    return change
