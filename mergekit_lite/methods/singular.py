"""Fine-tunes merged matrix by matrix, by the singular vectors of their deltas. Experimental.

Papers: Gargiulo et al., "Task Singular Vectors", CVPR 2025, arXiv 2412.00081 (TSV-M); Marczak et al., "No Task Left
Behind: Isotropic Model Merging", ICML 2025, arXiv 2502.04959 (Iso-C).

With δ = x − base of N models, each m × n with r = min(m, n) singular values, and U S Vᵀ a singular value decomposition:

    out = base + lambda·τ
    iso_c     τ = mean(S)·U Vᵀ, where Σδ = U S Vᵀ

Their evidence is vision models (CLIP with a classifier for each task), not language models: measure before you trust
them.

Only matrices of linear layers are merged so. Embeddings, heads, and whatever isn't a matrix (norms, biases, experts
stacked in one tensor) get base + lambda·mean(δ); so do matrices with fewer rows or columns than there are models, in
which no model would have a direction of its own. The released code decomposes embeddings and heads too where nobody
leaves them out by name: ``matrices: all``, which a recipe can say for some tensors by a filter.

A matrix is decomposed whole, in float64, by the eigenvectors of its smaller Gram matrix: on a GPU where the merge runs
on one, else by one core for each worker. Each worker holds one matrix at a time, which the plan's figure of memory
counts; fewer ``--threads`` take less. Singular values below a millionth of the largest count as zero, and their
directions are left out: the released code takes whatever directions its library happens to return there.
"""

from __future__ import annotations

from typing import Annotated

from mergekit_lite.methods.contract import Merge, Steps, TensorInfo
from mergekit_lite.methods.matrices import Matrices, added, is_taken, isotropic, mean
from mergekit_lite.methods.parameters import Doc
from mergekit_lite.methods.registry import method

Lambda = Annotated[float, Doc("scales what is added; the papers choose it on validation data.")]
ISO = "Marczak et al. 2025, arXiv 2502.04959"


@method(formula="base + lambda·mean(S)·U Vᵀ, U S Vᵀ = Σδ", source=ISO)
def iso_c(info: TensorInfo, *, lambda_: Lambda = 1.0, matrices: Matrices = "linear") -> Merge | Steps:
    """Give all directions of the summed deltas the same strength, their mean. Experimental."""
    if not is_taken(info, matrices):
        return mean(info, lambda_)
    return added(lambda deltas: isotropic(deltas.total()), 4 * info.numel + 4 * min(info.shape) ** 2, lambda_)
