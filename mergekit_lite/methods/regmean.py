"""RegMean: linear layers merged so that each answers its own model's inputs as that model did. Needs statistics.

Paper: Jin et al., "Dataless Knowledge Fusion by Merging Weights of Language Models", ICLR 2023, arXiv 2212.09849.

    minimise Σ w·‖X(W − Wᵢ)ᵀ‖² over W:   W = (Σ w·WᵢGᵢ)·(Σ w·Gᵢ)⁻¹,   Gᵢ = XᵀX / tokens of the inputs X of layer i

``mergekit-lite statistics MODEL --prompts FILE`` writes G of every linear layer, padding not counted; each model names
its file by ``statistics``. Elements of G off the diagonal are scaled by ``non_diagonal`` first: below 1 the merge is
nearer to a weighted average of each column.

To every G is added λ·I with λ = ridge·trace(Σ w·G) / (d·Σ w), d being the number of inputs: so a solution is always
there, by Cholesky's factors in float64, and inputs that no model ever saw get the average. Much less than the default
may not do where there are fewer tokens than inputs: the matrices are stored in float32, and rounding makes eigenvalues
that are 0 negative, of 2,048 inputs by up to 6e-6 of the mean eigenvalue (measured). That is an error. The released
code adds nothing and inverts: with fewer tokens than inputs, its matrix is singular. Few tokens leave much free: of two
random changes to SmolLM2 135M, each with 32 short texts, the merge came to lie nine times as far from the base as
either of them. A larger ridge brings it nearer to the average.

``regmean_plus`` is RegMean++ (Nguyen et al., TMLR 2026, arXiv 2508.03121): the same formula, with G of the inputs that
each layer of a model gets from the merged layers before it. As those hang on all models and numbers, one command
gathers them for a whole recipe, layer by layer: ``mergekit-lite statistics RECIPE --plus --prompts MODEL=FILE``. The
released code is for CLIP's image encoder; a language model's causal mask and its head, which reads what the merged
model makes, are our reading. It adds nothing to G either.

Tensors without a Gram matrix (embeddings, heads tied to them, norms, biases, experts and their routers) are averaged
with the models' weights. Of layers stored transposed (GPT-2's Conv1D) the file says so. A worker holds one matrix and
its Gram matrices at a time, which the plan's figure of memory counts; fewer ``--threads`` take less.
"""

from __future__ import annotations

from typing import Annotated, Any

from mergekit_lite.deferred import torch
from mergekit_lite.errors import RunError
from mergekit_lite.methods.contract import Block, Merge, Reduction, Steps, TensorInfo
from mergekit_lite.methods.linear import have_a_mean, linear
from mergekit_lite.methods.parameters import Bounds, NotNegative, PerModel, Share
from mergekit_lite.methods.registry import method


@method(
    given="data",
    base="none",
    statistics="gram",
    check=have_a_mean,
    formula="(Σ w·W·G)·(Σ w·G)⁻¹, G = XᵀX of the layer's inputs",
    source="Jin et al. 2023, arXiv 2212.09849",
)
def regmean(
    info: TensorInfo,
    *,
    weight: PerModel[NotNegative] = (1.0,),
    non_diagonal: Share = 1.0,
    ridge: Annotated[float, Bounds(1e-12)] = 1e-4,
) -> Merge | Steps:
    """Merge linear layers so that each model's inputs are answered as by that model.

    Args:
        weight: of each model.
        non_diagonal: what elements of the Gram matrices off their diagonals are multiplied with.
        ridge: added to their diagonals, as a share of their mean diagonal element.
    """
    if info.gram_axis is None:
        return linear(info, weight=weight)
    return _solved(info, info.gram_axis, weight, non_diagonal, ridge)


@method(
    given="data",
    base="none",
    statistics="gram",
    prefixed=True,
    check=have_a_mean,
    formula="(Σ w·W·G)·(Σ w·G)⁻¹, G = XᵀX of what merged layers hand to the layer",
    source="Nguyen et al. 2026, arXiv 2508.03121",
)
def regmean_plus(
    info: TensorInfo,
    *,
    weight: PerModel[NotNegative] = (1.0,),
    non_diagonal: Share = 1.0,
    ridge: Annotated[float, Bounds(1e-12)] = 1e-4,
) -> Merge | Steps:
    """Merge linear layers so that each model's inputs, as they come through the merged layers before, are answered.

    Args:
        weight: of each model.
        non_diagonal: what elements of the Gram matrices off their diagonals are multiplied with.
        ridge: added to their diagonals, as a share of their mean diagonal element.
    """
    return regmean(info, weight=weight, non_diagonal=non_diagonal, ridge=ridge)


def _solved(info: TensorInfo, axis: int, weight: tuple[float, ...], non_diagonal: float, ridge: float) -> Steps:
    def solution(block: Block, _: int) -> torch.Tensor:
        merged = _solution(info, block, axis, weight, non_diagonal, ridge)
        return (merged.mT if axis == 1 else merged).reshape(-1)

    whole: Any = yield Reduction(solution, held=6 * info.numel + 3 * info.shape[axis] ** 2)

    def merged(block: Block, start: int) -> torch.Tensor:
        part: torch.Tensor = whole[start : start + block[0].numel()]
        return part.to(block[0].dtype)

    return merged


def _solution(
    info: TensorInfo, block: Block, axis: int, weight: tuple[float, ...], non_diagonal: float, ridge: float
) -> torch.Tensor:
    """Return the merged matrix, inputs first: float64 (d, outputs).

    It is found as the first model and what the others add: where all agree, the result is theirs to the bit.
    """
    models, size = info.models, info.shape[axis]
    first = block[0].mT if axis == 1 else block[0]
    grams = first.new_zeros(size, size)
    wanted, mean = torch.zeros_like(first), torch.zeros_like(first)
    for number, share in enumerate(weight):
        gram = _scaled(block[models + number], non_diagonal).mul_(share)
        grams += gram
        if number:
            x = block[number]
            added = (x.mT if axis == 1 else x) - first
            wanted.addmm_(gram, added)
            mean.add_(added, alpha=share)
    if not bool(torch.isfinite(grams).all()):
        raise RunError(f"{info.name}: a Gram matrix holds NaN or infinity: collect the statistics anew.")
    least = ridge * float(grams.trace()) / (size * sum(weight))
    if least == 0:  # no model ever saw an input
        return first + mean / sum(weight)
    grams.diagonal().add_(least * sum(weight))
    factor, failed = torch.linalg.cholesky_ex(grams)
    if bool(failed):
        raise RunError(f"{info.name}: its Gram matrices are not positive definite. Take a larger ridge than {ridge:g}.")
    return first + torch.cholesky_solve(wanted.add_(mean, alpha=least), factor)


def _scaled(gram: torch.Tensor, non_diagonal: float) -> torch.Tensor:
    """Return a Gram matrix, which is changed, with elements off the diagonal scaled."""
    if non_diagonal != 1:
        diagonal = gram.diagonal().clone()
        gram.mul_(non_diagonal).diagonal().copy_(diagonal)
    return gram
