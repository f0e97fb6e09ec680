"""What a run did to the weights, from the sums in its journal."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import xxhash

from mergekit_lite.engine.tiling import bounds
from mergekit_lite.output.journal import Record
from mergekit_lite.planning import Job, Plan

ONLY_SOME_HAVE = ("fp8_error", "explained")  # what a report in JSON lacks where there is none


@dataclass(frozen=True, slots=True)
class TensorEffect:
    """One merged tensor: the alpha asked for, the alpha its written bytes have, and RMS(delta).

    ``effective`` is None where nothing was seen to change between the inputs.
    """

    name: str
    asked: float
    effective: float | None
    rms_delta: float


@dataclass(frozen=True, slots=True)
class Explained:
    """How much of the models' changes a method that relies on it took in: shares of their squared distances.

    Attributes:
        share: over all tensors together.
        bound: below it the output should not be trusted.
        tensors: the share of each tensor; None where no model changed it, or one isn't finite.
    """

    share: float | None
    bound: float
    tensors: Mapping[str, float | None]

    @property
    def is_enough(self) -> bool:
        """Whether the share reaches the bound, or there is nothing to explain."""
        return self.share is None or self.share >= self.bound

    @property
    def least(self) -> list[tuple[str, float]]:
        """The tensors that were changed with their shares, the least first."""
        shares = [(name, share) for name, share in self.tensors.items() if share is not None]
        return sorted(shares, key=lambda each: each[1])


@dataclass(frozen=True, slots=True)
class Report:
    """One output.

    Attributes:
        merged, copied: how many tensors.
        identical: merged tensors whose bytes are the same in both inputs.
        asked, effective: for ExPO, alpha over all merged tensors, weighted by ⟨delta, delta⟩; None where there is no
            delta.
        rms_delta: root mean square of an element's change between the inputs.
        exact: whether every element was looked at, or a fixed sample of them.
        tensors: the tensors that were observed, one by one; none where the method observes nothing.
        coefficients: where a method finds them by statistics, those of each tensor by model.
        fp8_error: of an FP8 output, how far its quantised weights are from the exact results: the root of the sum of
            squares of the differences, divided by that of the results.
        explained: of a method that relies on it (RELEX), the share of the models' changes that it took in.
    """

    merged: int
    copied: int
    identical: int
    asked: float | None
    effective: float | None
    rms_delta: float
    exact: bool
    tensors: tuple[TensorEffect, ...]
    coefficients: Mapping[str, Mapping[str, float]]
    fp8_error: float | None = None
    explained: Explained | None = None

    @property
    def worst(self) -> list[TensorEffect]:
        """The tensors whose effective alpha is furthest from the asked one, furthest first."""
        changed = [tensor for tensor in self.tensors if tensor.effective is not None]
        return sorted(changed, key=lambda tensor: -abs((tensor.effective or 0.0) - tensor.asked))

    def to_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        content = asdict(self)
        return {name: value for name, value in content.items() if value is not None or name not in ONLY_SOME_HAVE}

    @classmethod
    def from_json(cls, content: Mapping[str, Any]) -> Report:
        """Return the report that ``to_json`` gave."""
        tensors = tuple(TensorEffect(**tensor) for tensor in content["tensors"])
        explained = Explained(**content["explained"]) if "explained" in content else None
        return cls(**{**content, "tensors": tensors, "explained": explained})


def report(plan: Plan, number: int, records: Mapping[tuple[int, int], Record]) -> Report:
    """Sum up one output. Sums are taken in a fixed order, so the figures are the same for any number of threads."""
    effects: list[TensorEffect] = []
    moved: list[float] = []  # ⟨out − aligned, delta⟩ of each tensor, scaled up from the sample
    deltas: list[float] = []  # ⟨delta, delta⟩ likewise
    errors: list[tuple[float, float]] = []  # of the quantised tensors: what changed, what there was, both squared
    coefficients: dict[str, dict[str, float]] = {}
    explained: dict[str, Sequence[float]] = {}
    identical = seen_all = merged = elements = 0
    for index, job in enumerate(plan.jobs):
        merged += bool(job.merged_elements)
        elements += job.merged_elements
        of_job = _of_job(records, index, job)
        if of_job and of_job[0].coefficients:
            coefficients[job.name] = _by_model(plan, job, of_job[0].coefficients)
        if of_job and of_job[0].explained:
            explained[job.name] = of_job[0].explained
        if of_job and of_job[0].squared_error:
            errors += [(change, square) for change, square in (record.squared_error for record in of_job)]
        of_job = [record for record in of_job if record.sums]  # none of a job that is only copied
        if not of_job:
            continue
        dot, square, seen = (math.fsum(record.sums[k] for record in of_job) for k in range(3))
        identical += all(len(set(record.inputs)) == 1 for record in of_job)
        seen_all += seen == job.merged_elements
        asked = job.parameters[number].get("alpha", 0.0)
        effects.append(
            TensorEffect(job.name, asked, dot / square if square else None, math.sqrt(square / seen) if seen else 0.0)
        )
        moved.append(dot * job.merged_elements / seen if seen else 0.0)
        deltas.append(square * job.merged_elements / seen if seen else 0.0)
    total = math.fsum(deltas)
    return Report(
        merged=merged,
        copied=len(plan.copied),
        identical=identical,
        asked=math.fsum(e.asked * d for e, d in zip(effects, deltas, strict=True)) / total if total else None,
        effective=math.fsum(moved) / total if total else None,
        rms_delta=math.sqrt(total / elements) if effects and elements else 0.0,
        exact=seen_all == len(effects),
        tensors=tuple(effects),
        coefficients=coefficients,
        fp8_error=_relative_error(errors) if errors else None,
        explained=_explained(explained) if explained else None,
    )


def _explained(by_tensor: Mapping[str, Sequence[float]]) -> Explained:
    """Return the shares from what is explained, what there is, and the bound of each tensor."""
    changed = {name: sums for name, sums in by_tensor.items() if sums[1] and all(map(math.isfinite, sums))}
    total = math.fsum(whole for _, whole, _ in changed.values())
    share = math.fsum(along for along, _, _ in changed.values()) / total if total else None
    bound = math.fsum(whole * bound for _, whole, bound in changed.values()) / total if total else 0.0
    shares = {name: changed[name][0] / changed[name][1] if name in changed else None for name in by_tensor}
    return Explained(share, bound, shares)


def _relative_error(errors: Sequence[tuple[float, float]]) -> float:
    change, square = (math.fsum(column) for column in zip(*errors, strict=True))
    return math.sqrt(change / square) if square else 0.0


def _of_job(records: Mapping[tuple[int, int], Record], index: int, job: Job) -> list[Record]:
    """Return the records of a job's spans, in their order."""
    of_job = [records.get((index, begin)) for begin, _ in bounds(job.numel, job.merged_elements, job.dtype)]
    return [record for record in of_job if record is not None]


def _by_model(plan: Plan, job: Job, coefficients: Sequence[float]) -> dict[str, float]:
    """Return the coefficients of a tensor by model; those of a model that is listed twice are added up."""
    by_model: dict[str, float] = {}
    for model, coefficient in zip(job.models, coefficients, strict=False):  # a base comes last, without one
        reference = plan.inputs[model].reference
        by_model[reference] = by_model.get(reference, 0.0) + coefficient
    return by_model


class TensorDigests(Mapping[str, dict[str, Any]]):
    """For each output tensor the digests of its bytes and its inputs': xxh3-128 over the digests of the spans.

    Where there are several spans, theirs too, one behind the other; and how many elements went through the method where
    the rest was copied, as the two parts have spans of their own. They are computed when they are asked for.
    """

    def __init__(self, plan: Plan, records: Mapping[tuple[int, int], Record]) -> None:
        self._plan = plan
        self._records = records
        self._indices = {job.name: index for index, job in enumerate(plan.jobs)}

    def __getitem__(self, name: str) -> dict[str, Any]:
        index = self._indices[name]
        job = self._plan.jobs[index]
        return _digests(job, _of_job(self._records, index, job))

    def __iter__(self) -> Iterator[str]:
        return iter(self._indices)

    def __len__(self) -> int:
        return len(self._indices)


def _digests(job: Job, records: list[Record]) -> dict[str, Any]:
    output = "".join(record.output for record in records)
    inputs = [
        "".join(record.inputs[number] for record in records if number < len(record.inputs))
        for number in range(len(job.inputs))
    ]
    digests: dict[str, Any] = {"output": of_spans(output), "inputs": [of_spans(each) for each in inputs]}
    if len(records) > 1:
        digests["spans"] = {"output": output, "inputs": inputs}
    if 0 < job.merged_elements < job.numel:
        digests["merged"] = job.merged_elements
    return digests


def of_spans(digests: str) -> str:
    """Return a tensor's digest from the hex digests of its spans, one behind the other."""
    return xxhash.xxh3_128_hexdigest(digests.encode())
