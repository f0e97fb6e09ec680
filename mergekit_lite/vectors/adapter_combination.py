"""Combination of LoRA adapters, the result an adapter: any method of the recipes, in a space that they have in common.

Each module is by itself: its factors are read, its products brought into the space (``spaces``), merged there by the
method over a base of zeros, and written as factors with the scale 1. What an adapter doesn't change is zero in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.adapters.factors import Factors
from mergekit_lite.checkpoint.folder import ADAPTER_CONFIG
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.pool import Pool, available_cores, tuned_process
from mergekit_lite.engine.schedule import Progress, expect_elements
from mergekit_lite.errors import NonFiniteError
from mergekit_lite.layout import Layout
from mergekit_lite.methods.in_memory import merge_tensors
from mergekit_lite.options import named_options
from mergekit_lite.output.journal import Record
from mergekit_lite.output.publishing import check_target
from mergekit_lite.output.working_folder import WorkingFolder, as_run_errors
from mergekit_lite.output.workspace import OutputWorkspace, manifest_path
from mergekit_lite.vectors import peft_folder
from mergekit_lite.vectors.adapter_plan import AdapterModule, AdapterPlan, plan_adapters
from mergekit_lite.vectors.extracted import Extracted, StoredTensor, manifest_text
from mergekit_lite.vectors.extraction import digest_of_part
from mergekit_lite.vectors.finished import published
from mergekit_lite.vectors.spaces import Product, SpaceName, core_space, knots_space


@named_options
def combine_adapters(
    adapters: Sequence[str],
    output: str | Path,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    space: SpaceName = "core",
    rank: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
    threads: int | None = None,
    resume: bool = False,
    force: bool = False,
    sync: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Combine LoRA adapters of one base into one, by a method that works on their products, never on A and B apart.

    Args:
        adapters: folders or hub repositories, each ``PATH`` or ``PATH:WEIGHT`` where the method gives every model a
            weight; of any ranks, alphas and patterns, rsLoRA too.
        output: a folder.
        method: any method of the recipes; the base of those that need one is zero.
        parameters: the method's, for all modules.
        space: ``core`` (Panariello et al. 2025, arXiv 2509.17786) or ``knots`` (Stoica et al. 2024, arXiv 2410.19735):
            what the method sees of each product (see ``spaces``).
        rank: cut the result of each module to this rank; None for the sum of the ranks, with nothing lost.
        dtype: of the result.
        seed: of methods that draw.
        threads: workers; one for each core by default.
        resume: go on with what an earlier run of the same combination left.
        force: replace an existing output, and drop what an earlier run left unless ``resume`` is set too.
        sync: bring the output to the disk before it gets its name, and its name after.
        progress: called with (bytes read, bytes in all) after each module.

    Returns:
        The output's path, its bytes, and for each module the length of the product and what the rank cut off.

    Raises:
        UsageError: an option, the method or a parameter is wrong, or the output exists.
        CheckpointError: an adapter can't be opened.
        PlanError: adapters don't fit together, or hold what is no product (DoRA, experts, tensors in full); every
            problem is named.
        NonFiniteError: a factor, or the result in its dtype, is NaN or infinite.
        RunError: reading or writing failed.
    """
    plan = plan_adapters(adapters, output, method, parameters, space=space, rank=rank, dtype=dtype, seed=seed)
    return run_adapters(plan, threads=threads, resume=resume, force=force, sync=sync, progress=progress)


def run_adapters(
    plan: AdapterPlan,
    *,
    threads: int | None = None,
    resume: bool = False,
    force: bool = False,
    sync: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Carry out a plan; see ``combine_adapters``."""
    recorded, layout = plan.recorded, plan.layout
    sources = [(str(one.file.path), one.file.size, one.file.mtime_ns) for one in plan.adapters]
    if resume and (done := published(plan.output, recorded, sources, force=force, sync=sync)) is not None:
        return done
    check_target(plan.output, [one.path for one in plan.adapters], resume=resume, force=force)
    with ExitStack() as stack:
        target = stack.enter_context(WorkingFolder(plan.output, fresh=force and not resume))
        stack.enter_context(as_run_errors(target.path))
        names = [manifest_path(plan.output).name, ADAPTER_CONFIG]
        workspace = OutputWorkspace(target, layout, recorded["plan"], sources, names)
        try:
            with tuned_process():
                records = dict(_carried_out(plan, workspace, threads or available_cores(), progress))
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
    plan: AdapterPlan, workspace: OutputWorkspace, threads: int, progress: Progress | None
) -> Iterator[tuple[str, Record]]:
    """Combine every module, on all threads; yield its name and the journal's record of it."""
    done, in_all = 0, sum(module.nbytes for module in plan.modules)

    def work(_: WorkerBuffers, reader: Reader, numbered: tuple[int, AdapterModule]) -> tuple[AdapterModule, Record]:
        return numbered[1], _combined(plan, *numbered, reader, workspace)

    def expect(reader: Reader, numbered: tuple[int, AdapterModule]) -> None:
        specs = [spec for part in numbered[1].parts if part is not None for spec in (part.a, part.b)]
        expect_elements(reader, [([spec], 0, spec.numel) for spec in specs])

    pool = Pool(threads, [CPU], 0, 0)
    for module, record in pool.run(list(enumerate(plan.modules)), work, expect, size=lambda pair: pair[1].nbytes):
        workspace.done(record)
        done += module.nbytes
        if progress is not None:
            progress(done, in_all)
        yield module.name, record


def _combined(
    plan: AdapterPlan, number: int, module: AdapterModule, reader: Reader, workspace: OutputWorkspace
) -> Record:
    """Combine one module and write its factors, unless an earlier run did."""
    places = {tensor.name: tensor.nbytes for tensor in workspace.layout.files[0].tensors}
    earlier = workspace.record(number, 0)
    if earlier is not None and earlier.output == " ".join(
        digest_of_part(workspace, name, places[name]) for name in module.names
    ):
        return earlier
    products = [None if part is None else _product(part, reader) for part in module.parts]
    space = (core_space if plan.space == "core" else knots_space)([one for one in products if one is not None])
    own = iter(space.tasks)
    nothing = torch.zeros_like(space.tasks[0])
    tasks = [nothing if one is None else next(own) for one in products]
    base = None if plan.method.merges_base else nothing
    weight = f"{module.name}.weight"
    merged = merge_tensors(plan.method.name, base, tasks, tensor_name=weight, seed=plan.seed, **plan.parameters)
    cut = space.outside(merged, module.rank)
    digests = []
    for name, factor, axis in zip(module.names, (cut.product.a, cut.product.b), (0, 1), strict=True):
        values = _padded(factor, axis, module.rank).to(dtypes.torch_dtype(plan.dtype)).contiguous()
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"{module.name}: its merged factors are NaN or infinite in {plan.dtype}.")
        data = bytes_of(values)
        workspace.write(name, 0, data)
        digests.append(xxhash.xxh3_128_hexdigest(data))
    return Record(number, 0, (), " ".join(digests), (cut.square, cut.lost), ())


def _product(part: Factors, reader: Reader) -> Product:
    """Read the factors of one product. Raises RunError, NonFiniteError."""
    factors = []
    for spec in (part.b, part.a):
        values = spec.elements(reader, 0, spec.numel).view(spec.shape).double()
        if not bool(torch.isfinite(values).all()):
            raise NonFiniteError(f"NaN or infinity in {spec.name} ({spec.file}): it has no singular values.")
        factors.append(values)
    return Product(factors[0] * part.scale, factors[1])


def _padded(factor: torch.Tensor, axis: int, rank: int) -> torch.Tensor:
    """Return a factor of the planned rank, with zeros for directions that the products turned out not to have."""
    missing = rank - factor.shape[axis]
    if not missing:
        return factor
    shape = [*factor.shape]
    shape[axis] = missing
    return torch.cat([factor, factor.new_zeros(shape)], axis)


def _result(plan: AdapterPlan, layout: Layout, records: Mapping[str, Record]) -> Extracted:
    sizes = {tensor.name: tensor.nbytes for tensor in layout.files[0].tensors}
    stored = []
    for module in plan.modules:
        square, lost = records[module.name].sums
        nbytes = sum(sizes[name] for name in module.names)
        stored.append(StoredTensor(f"{module.name}.weight", "lowrank", nbytes, square, lost))
    return Extracted(plan.output, layout.nbytes, tuple(stored), 0, plan.notes)


def _write_config(plan: AdapterPlan, folder: Path) -> None:
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
