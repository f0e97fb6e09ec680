"""Adapters written module by module: products made one at a time, journalled, published as a PEFT folder of scale 1."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.adapters.adapter import Adapter
from mergekit_lite.checkpoint.adapters.factors import Factors
from mergekit_lite.checkpoint.folder import ADAPTER_CONFIG
from mergekit_lite.checkpoint.formats.header import WeightFile
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.pool import Pool, available_cores, tuned_process
from mergekit_lite.engine.schedule import Progress, expect_elements
from mergekit_lite.errors import NonFiniteError
from mergekit_lite.layout import Layout, OutputTensor, safetensors_layout
from mergekit_lite.output.journal import Record
from mergekit_lite.output.publishing import check_target
from mergekit_lite.output.working_folder import WorkingFolder, as_run_errors
from mergekit_lite.output.workspace import OutputWorkspace, manifest_path
from mergekit_lite.vectors import peft_folder
from mergekit_lite.vectors.extracted import Extracted, StoredTensor, manifest_text
from mergekit_lite.vectors.extraction import digest_of_part
from mergekit_lite.vectors.finished import published
from mergekit_lite.vectors.spaces import Cut, Product


@dataclass(frozen=True)
class AdapterModule:
    """One module that adapters change.

    Attributes:
        name: its path.
        parts: its factors in each adapter, None in one that leaves it as it is.
        rank: of the result.
        names: of the factors A and B in the result's file.
        weight: the base's tensor, where that is read, too.
    """

    name: str
    parts: tuple[Factors | None, ...]
    rank: int
    names: tuple[str, str]
    weight: TensorSpec | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        part = next(filter(None, self.parts))
        return part.b.shape[0], part.a.shape[1]

    @property
    def specs(self) -> list[TensorSpec]:
        """What is read for it."""
        factors = [spec for part in self.parts if part is not None for spec in (part.a, part.b)]
        return [*factors, *([self.weight] if self.weight is not None else [])]

    @property
    def nbytes(self) -> int:
        """Number of bytes of it on disk."""
        return sum(spec.nbytes for spec in self.specs)


@dataclass(frozen=True)
class AdapterOutput(ABC):
    """An adapter to be written: of what, as what, where.

    Attributes:
        output: its folder.
        adapters: those that it is made of.
        modules: its modules, in the order of its file.
        dtype: of its factors.
        notes: facts that the user should know.
    """

    output: Path
    adapters: tuple[Adapter, ...]
    modules: tuple[AdapterModule, ...]
    dtype: str
    notes: tuple[str, ...]

    @property
    @abstractmethod
    def recorded(self) -> dict[str, Any]:
        """What makes the result, for its manifest, with a digest of it."""

    @property
    def files(self) -> Sequence[WeightFile]:
        """The files that are read."""
        return [one.file for one in self.adapters]

    @property
    def paths(self) -> Sequence[Path]:
        """Where the models lie that it is made of."""
        return [one.path for one in self.adapters]

    @property
    def layout(self) -> Layout:
        """The file of weights."""
        tensors = []
        for module in self.modules:
            rows, columns = module.shape
            shapes = (module.rank, columns), (rows, module.rank)
            tensors += [OutputTensor(name, self.dtype, of) for name, of in zip(module.names, shapes, strict=True)]
        return safetensors_layout([tensors], [peft_folder.WEIGHTS])


def write_adapter(
    plan: AdapterOutput,
    make: Callable[[AdapterModule, Reader], Cut],
    *,
    threads: int | None = None,
    resume: bool = False,
    force: bool = False,
    sync: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Write an adapter of which ``make`` makes the products, one module after the other, on all threads.

    The other arguments and the errors are those of ``combine_adapters``.
    """
    recorded, layout = plan.recorded, plan.layout
    sources = [(str(file.path), file.size, file.mtime_ns) for file in plan.files]
    if resume and (done := published(plan.output, recorded, sources, force=force, sync=sync)) is not None:
        return done
    check_target(plan.output, plan.paths, resume=resume, force=force)
    with ExitStack() as stack:
        target = stack.enter_context(WorkingFolder(plan.output, fresh=force and not resume))
        stack.enter_context(as_run_errors(target.path))
        names = [manifest_path(plan.output).name, ADAPTER_CONFIG]
        workspace = OutputWorkspace(target, layout, recorded["plan"], sources, names)
        try:
            with tuned_process():
                records = dict(_carried_out(plan, make, workspace, threads or available_cores(), progress))
            result = _result(plan, layout, records)
            digests = {
                name: digest
                for module in plan.modules
                for name, digest in zip(module.names, records[module.name].output.split(), strict=True)
            }
            with workspace.adding_companions() as folder:
                text = manifest_text(result, recorded, folder / peft_folder.WEIGHTS, digests)
                (folder / manifest_path(plan.output).name).write_bytes(text.encode())
                _write_config(plan, folder)
            workspace.publish(force=force, sync=sync)
        finally:
            workspace.close()
    return result


def _carried_out(
    plan: AdapterOutput,
    make: Callable[[AdapterModule, Reader], Cut],
    workspace: OutputWorkspace,
    threads: int,
    progress: Progress | None,
) -> Iterator[tuple[str, Record]]:
    """Make every module, on all threads; yield its name and the journal's record of it."""
    done, in_all = 0, sum(module.nbytes for module in plan.modules)

    def work(_: WorkerBuffers, reader: Reader, numbered: tuple[int, AdapterModule]) -> tuple[AdapterModule, Record]:
        return numbered[1], _written(plan, make, *numbered, reader, workspace)

    def expect(reader: Reader, numbered: tuple[int, AdapterModule]) -> None:
        expect_elements(reader, [([spec], 0, spec.numel) for spec in numbered[1].specs])

    pool = Pool(threads, [CPU], 0, 0)
    for module, record in pool.run(list(enumerate(plan.modules)), work, expect, size=lambda pair: pair[1].nbytes):
        workspace.done(record)
        done += module.nbytes
        if progress is not None:
            progress(done, in_all)
        yield module.name, record


def _written(
    plan: AdapterOutput,
    make: Callable[[AdapterModule, Reader], Cut],
    number: int,
    module: AdapterModule,
    reader: Reader,
    workspace: OutputWorkspace,
) -> Record:
    """Make one module and write its factors, unless an earlier run did."""
    places = {tensor.name: tensor.nbytes for tensor in workspace.layout.files[0].tensors}
    earlier = workspace.record(number, 0)
    if earlier is not None and earlier.output == " ".join(
        digest_of_part(workspace, name, places[name]) for name in module.names
    ):
        return earlier
    cut = make(module, reader)
    digests = []
    for name, factor, axis in zip(module.names, (cut.product.a, cut.product.b), (0, 1), strict=True):
        values = _padded(factor, axis, module.rank).to(dtypes.torch_dtype(plan.dtype)).contiguous()
        if not _all_finite(values):
            raise NonFiniteError(f"{module.name}: its factors are NaN or infinite in {plan.dtype}.")
        data = bytes_of(values)
        workspace.write(name, 0, data)
        digests.append(xxhash.xxh3_128_hexdigest(data))
    found = () if cut.intruders is None else (float(cut.intruders),)
    return Record(number, 0, (), " ".join(digests), (cut.square, cut.lost, *found), ())


def read_product(part: Factors, reader: Reader) -> Product:
    """Read the factors of one product, its scale inside b. Raises RunError, NonFiniteError."""
    factors = []
    for spec in (part.b, part.a):
        values = spec.elements(reader, 0, spec.numel).view(spec.shape).double()
        if not _all_finite(values):
            raise NonFiniteError(f"NaN or infinity in {spec.name} ({spec.file}): it has no singular values.")
        factors.append(values)
    return Product(factors[0] * part.scale, factors[1])


def _all_finite(values: torch.Tensor) -> bool:
    """Return whether no value is NaN or infinite: by the ends of their range, a fifth of the time of ``isfinite``."""
    return not values.numel() or all(math.isfinite(end.item()) for end in torch.aminmax(values))


def _padded(factor: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """Return a factor of the planned rank, with zeros for directions that the products turned out not to have."""
    missing = rank - factor.shape[axis]
    if not missing:
        return factor
    shape = [*factor.shape]
    shape[axis] = missing
    return torch.cat([factor, factor.new_zeros(shape)], axis)


def _result(plan: AdapterOutput, layout: Layout, records: Mapping[str, Record]) -> Extracted:
    sizes = {tensor.name: tensor.nbytes for tensor in layout.files[0].tensors}
    stored = []
    for module in plan.modules:
        square, lost, *found = records[module.name].sums
        nbytes = sum(sizes[name] for name in module.names)
        stored.append(StoredTensor(f"{module.name}.weight", "lowrank", nbytes, square, lost, *map(int, found)))
    return Extracted(plan.output, layout.nbytes, tuple(stored), 0, plan.notes)


def _write_config(plan: AdapterOutput, folder: Path) -> None:
    """Write the adapter's config: scale 1 everywhere, and what the adapters agree on."""
    configs = [adapter.config for adapter in plan.adapters]
    tasks = {config.task for config in configs}
    first = next((config for config in configs if config.base), configs[0])
    changes = {
        "task_type": tasks.pop() if len(tasks) == 1 else None,
        "base_model_name_or_path": first.base,
        "revision": first.base_revision,
        "fan_in_fan_out": any(config.transposed for config in configs),
    }
    peft_folder.write_config_of(folder, {module.name: module.rank for module in plan.modules}, None, changes)
