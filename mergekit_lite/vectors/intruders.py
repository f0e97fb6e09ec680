"""Intruder dimensions: what a LoRA brought among a weight's strongest singular vectors that resembles none it had.

Paper: Shuttleworth et al., "LoRA vs Full Fine-tuning: An Illusion of Equivalence", 2024, arXiv 2410.21228. Of a weight
W (outputs × inputs) and its product ΔW = s·B·A, with the left singular vectors uⱼ of W and W + ΔW = Σ σᵢ·xᵢ·yᵢᵀ:

    i is an intruder, of the first top_k:   maxⱼ |⟨xᵢ, uⱼ⟩| < epsilon
    ΔW' = ΔW + (λ − 1)·Σ σᵢ·xᵢ·yᵢᵀ over the intruders, cut to the rank of ΔW

λ = 1 changes nothing, λ = 0 takes the intruders out. What fine-tuning forgot comes back, at the price of some of what
it learnt. The same as peft's ``reduce_intruder_dimension`` (0.21), but for this: there the sides of embeddings and of
layers that store their weights transposed are taken the other way round; here outputs are always the left side. A
direction that W doesn't have at all, its singular value being zero, resembles nothing.

The singular vectors follow from the smaller Gram matrix in float64, a weight at a time: two eigendecompositions, for
which some seven matrices of its size are in memory. On the adapter's side all is small: its factors, with a column and
a row more for each intruder, are cut in their core space (``spaces``).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
import xxhash

from mergekit_lite import dtypes
from mergekit_lite._version import __version__
from mergekit_lite.checkpoint import Checkpoint, open_checkpoint, tied_weights
from mergekit_lite.checkpoint.adapters.names import matched
from mergekit_lite.checkpoint.formats.header import WeightFile
from mergekit_lite.checkpoint.opening import open_adapter
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.engine.schedule import Progress
from mergekit_lite.errors import NonFiniteError, PlanError, UsageError
from mergekit_lite.methods.matrices import eigen, inverse, singular
from mergekit_lite.options import finite_number, named_options
from mergekit_lite.vectors.adapter_plan import modules_of, refused, written_to
from mergekit_lite.vectors.adapter_writing import AdapterModule, AdapterOutput, read_product, write_adapter
from mergekit_lite.vectors.extracted import Extracted
from mergekit_lite.vectors.spaces import Cut, Product, core_space

NO_PRODUCT = "only adapters of products B · A alone have intruder dimensions to reduce"


@dataclass(frozen=True)
class IntruderPlan(AdapterOutput):
    """An adapter whose intruder dimensions will be scaled, found sound."""

    base: Checkpoint
    top_k: int
    epsilon: float
    scale: float

    @property
    def recorded(self) -> dict[str, Any]:
        """What makes the result, for its manifest, with a digest of it."""
        recorded = {
            "format": "lora",
            "intruders_of": self.adapters[0].reference,
            "base": self.base.identity()._asdict(),
            "top_k": self.top_k,
            "epsilon": self.epsilon,
            "lambda": self.scale,
            "dtype": self.dtype,
        }
        files = [(file.name, file.size, file.header_digest, file.etag) for file in self.files]
        return {"plan": xxhash.xxh3_128_hexdigest(repr((__version__, recorded, files)).encode()), **recorded}

    @property
    def files(self) -> Sequence[WeightFile]:
        """The files that are read."""
        return [*super().files, *self.base.files]

    @property
    def paths(self) -> Sequence[Path]:
        """Where the models lie that it is made of."""
        return [*super().paths, self.base.path]


@named_options
def reduce_intruders(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    scale: float = 0.75,
    dtype: str = "float32",
    threads: int | None = None,
    resume: bool = False,
    force: bool = False,
    sync: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Scale what a LoRA adapter brought among its base's strongest singular vectors, and write it as an adapter.

    Args:
        base: the model that the adapter was trained on: any reference.
        adapter: a folder or hub repository.
        output: a folder.
        top_k: how many of the strongest directions of base + adapter are looked at, in each matrix.
        epsilon: the cosine with every direction of the base below which one is an intruder; in (0, 1].
        scale: what intruders are multiplied by; λ of the paper, from 0 on.
        dtype: of the result.
        threads: workers, each of which holds a matrix; one for each core by default.
        resume: as of ``combine_adapters``.
        force: as of ``combine_adapters``.
        sync: as of ``combine_adapters``.
        progress: called with (bytes read, bytes in all) after each module.

    Returns:
        The output's path, its bytes, and for each module its intruders and what its rank cut off.

    Raises:
        UsageError: an option is out of its range, or the output exists.
        CheckpointError: a model can't be opened, or the adapter is none for this base.
        PlanError: the adapter holds what is no product (DoRA, experts, tensors in full).
        NonFiniteError: a weight, a factor or the result is NaN or infinite.
        RunError: reading or writing failed.
    """
    plan = plan_intruders(base, adapter, output, top_k=top_k, epsilon=epsilon, scale=scale, dtype=dtype)
    return run_intruders(plan, threads=threads, resume=resume, force=force, sync=sync, progress=progress)


def plan_intruders(
    base: str | Path,
    adapter: str | Path,
    output: str | Path,
    *,
    top_k: int = 10,
    epsilon: float = 0.5,
    scale: float = 0.75,
    dtype: str = "float32",
) -> IntruderPlan:
    """Plan it; see ``reduce_intruders`` for the arguments and errors."""
    path = written_to(output)
    if top_k < 1:
        raise UsageError(f"top-k: expected a whole number of at least 1, got {top_k}.")
    if not 0 < finite_number(epsilon, "epsilon") <= 1:
        raise UsageError(f"epsilon: expected a cosine above 0 and up to 1, got {epsilon:g}.")
    if finite_number(scale, "lambda") < 0:
        raise UsageError(f"lambda: expected a number from 0 on, got {scale:g}.")
    model, own = open_checkpoint(base), open_adapter(str(adapter))
    problems = list(refused(own, NO_PRODUCT))
    modules, misfits = modules_of([own], None)
    if problems or misfits:
        raise PlanError(problems + misfits)
    own.added_to(model.tensors, model.config)  # raises where it is none for this base
    names = matched(own.factors, {}, {}, {}, model.tensors, model.config).names
    weights = (tied_weights.counterpart(names[f"{module.name}.weight"], model.tensors) for module in modules)
    with_weights = (replace(module, weight=weight) for module, weight in zip(modules, weights, strict=True))
    written = (path, (own,), tuple(with_weights), dtypes.float_named(dtype), tuple(_notes(own, model)))
    return IntruderPlan(*written, model, top_k, float(epsilon), float(scale))


def run_intruders(plan: IntruderPlan, **how: Any) -> Extracted:
    """Carry out a plan; see ``reduce_intruders`` for what else it takes."""
    return write_adapter(plan, partial(_reduced, plan), **how)


def _reduced(plan: IntruderPlan, module: AdapterModule, reader: Reader) -> Cut:
    """Make one module."""
    [part], spec = module.parts, module.weight
    assert part is not None and spec is not None
    product = read_product(part, reader)
    weight = spec.elements(reader, 0, spec.numel).view(spec.shape).double()
    if not bool(torch.isfinite(weight).all()):
        raise NonFiniteError(f"NaN or infinity in {spec.name} ({spec.file}): it has no singular vectors.")
    square = spec.shape[0] == spec.shape[1]
    turned = part.transposed if square else spec.shape != module.shape
    changed, found = without_intruders(weight.mT if turned else weight, product, plan.top_k, plan.epsilon, plan.scale)
    space = core_space([changed])
    return space.outside(space.tasks[0], module.rank)._replace(intruders=found)


def without_intruders(
    weight: torch.Tensor, product: Product, top_k: int, epsilon: float, scale: float
) -> tuple[Product, int]:
    """Return a product with its intruders scaled, of a rank higher by their number, and that number.

    ``weight`` is (m, n), the product's shape, in float64.
    """
    left, values, right = singular(torch.addmm(weight, product.b, product.a), min(top_k, *weight.shape))
    intrudes = likeness(weight, left) < epsilon
    taken = (left * values * (scale - 1))[:, intrudes]
    changed = Product(torch.cat([product.b, taken], 1), torch.cat([product.a, right[:, intrudes].mT]))
    return changed, int(intrudes.sum())


def likeness(weight: torch.Tensor, directions: torch.Tensor) -> torch.Tensor:
    """Return how like each column of (m, k) is to the left singular vector of (m, n) that it is most like: |cosine|."""
    if weight.shape[0] <= weight.shape[1]:
        squares, vectors = eigen(weight @ weight.mT)
        cosines = (vectors.mT @ directions) * (squares != 0)[:, None]
    else:
        squares, vectors = eigen(weight.mT @ weight)
        cosines = (vectors.mT @ (weight.mT @ directions)) * inverse(squares.sqrt())[:, None]
    return cosines.abs().amax(0)


def _notes(own: Any, model: Checkpoint) -> list[str]:
    said = own.config.base
    other = [f"the adapter says it is of {said!r}"] if said and said != model.reference else []
    return [*other, *(f"{own.reference}: {name} is left out: {why}" for name, why in own.left_out.items())]
