"""Combination of LoRA adapters, the result an adapter: any method of the recipes, in a space that they have in common.

Each module is by itself: its factors are read, its products brought into the space (``spaces``), merged there by the
method over a base of zeros, and written as factors with the scale 1. What an adapter doesn't change is zero in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import xxhash

from mergekit_lite import dtypes
from mergekit_lite._version import __version__
from mergekit_lite.checkpoint.adapters.adapter import Adapter
from mergekit_lite.checkpoint.adapters.factors import Factors
from mergekit_lite.checkpoint.encodings.low_rank import MAX_RANK
from mergekit_lite.checkpoint.folder import ADAPTER_CONFIG
from mergekit_lite.checkpoint.opening import open_adapter
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.checkpoint.references import Addition, is_one_file, parse_addition
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.pool import Pool, available_cores, tuned_process
from mergekit_lite.engine.schedule import Progress, expect_elements
from mergekit_lite.errors import NonFiniteError, PlanError, UsageError, counted, nearest
from mergekit_lite.layout import Layout, OutputTensor, is_single_file, output_path, safetensors_layout
from mergekit_lite.methods.in_memory import merge_tensors
from mergekit_lite.methods.registry import Method, method_named
from mergekit_lite.object_stores import Place
from mergekit_lite.options import named_options
from mergekit_lite.output.journal import Record
from mergekit_lite.output.publishing import check_target
from mergekit_lite.output.working_folder import WorkingFolder, as_run_errors
from mergekit_lite.output.workspace import OutputWorkspace, manifest_path
from mergekit_lite.vectors import peft_folder
from mergekit_lite.vectors.extracted import Extracted, StoredTensor, manifest_text
from mergekit_lite.vectors.extraction import digest_of_part
from mergekit_lite.vectors.finished import published
from mergekit_lite.vectors.spaces import SPACES, Product, SpaceName, core_space, knots_space

MAKE_A_VECTOR = "make a task vector of it (vector extract BASE BASE+ADAPTER -o v.safetensors), and combine those"


@dataclass(frozen=True)
class AdapterModule:
    """One module that adapters change.

    Attributes:
        name: its path.
        parts: its factors in each adapter, None in one that leaves it as it is.
        rank: of the result.
        names: of the factors A and B in the result's file.
    """

    name: str
    parts: tuple[Factors | None, ...]
    rank: int
    names: tuple[str, str]

    @property
    def shape(self) -> tuple[int, int]:
        """(m, n) of the product."""
        part = next(filter(None, self.parts))
        return part.b.shape[0], part.a.shape[1]

    @property
    def nbytes(self) -> int:
        """Number of bytes of all factors on disk."""
        return sum(part.a.nbytes + part.b.nbytes for part in self.parts if part is not None)


@dataclass(frozen=True)
class AdapterPlan:
    """A combination of adapters that was found sound: what is merged, how, and where it is written."""

    output: Path
    adapters: tuple[Adapter, ...]
    modules: tuple[AdapterModule, ...]
    method: Method
    parameters: Mapping[str, Any]  # as given, with each adapter's weight
    space: SpaceName
    rank: int | None
    dtype: str
    seed: int
    notes: tuple[str, ...]

    @property
    def layout(self) -> Layout:
        """The file of weights."""
        tensors = []
        for module in self.modules:
            rows, columns = module.shape
            shapes = (module.rank, columns), (rows, module.rank)
            tensors += [OutputTensor(name, self.dtype, of) for name, of in zip(module.names, shapes, strict=True)]
        return safetensors_layout([tensors], [peft_folder.WEIGHTS])

    @property
    def recorded(self) -> dict[str, Any]:
        """What makes the result, for its manifest, with a digest of it."""
        recorded = {
            "format": "lora",
            "combines": [adapter.reference for adapter in self.adapters],
            "method": self.method.name,
            "parameters": dict(self.parameters),
            "space": self.space,
            "rank": self.rank,
            "dtype": self.dtype,
            "seed": self.seed,
        }
        files = [(one.file.name, one.file.size, one.file.header_digest, one.file.etag) for one in self.adapters]
        scales = [[part and part.scale for part in module.parts] for module in self.modules]
        return {"plan": xxhash.xxh3_128_hexdigest(repr((__version__, recorded, files, scales)).encode()), **recorded}


def plan_adapters(
    adapters: Sequence[str],
    output: str | Path,
    method: str,
    parameters: Mapping[str, Any] | None = None,
    *,
    space: SpaceName = "core",
    rank: int | None = None,
    dtype: str = "float32",
    seed: int = 0,
) -> AdapterPlan:
    """Plan a combination of adapters; see ``combine_adapters`` for the arguments and errors."""
    path = output_path(output)
    if isinstance(path, Place) or is_single_file(path):
        raise UsageError(f"{path}: an adapter is a folder on this disk. Name one: -o ./adapter.")
    if space not in SPACES:
        raise UsageError(f"Unknown space {space!r}.{nearest(space, SPACES)} Known: {', '.join(SPACES)}.")
    if rank is not None and rank < 1:
        raise UsageError(f"rank: expected a whole number of at least 1, got {rank}.")
    if not adapters:
        raise UsageError("No adapter was given: mergekit-lite vector combine --space core --method ties ./a ./b -o ./c")
    named = [parse_addition(str(text)) for text in adapters]
    chosen = method_named(method)
    given = _with_weights(chosen, dict(parameters or {}), named)
    arguments = chosen.resolve(given, len(named), not chosen.merges_base)
    if arguments.get("trim") == "global":
        raise UsageError("trim=global: adapters are merged module by module, so density counts in each. Leave it out.")
    wrong = [
        f"{one.path}: is a file, not an adapter's folder; leave --space out" for one in named if is_one_file(one.path)
    ]
    if wrong:
        raise PlanError(wrong)
    opened = [open_adapter(one.path) for one in named]
    problems = [problem for adapter in opened for problem in _refused(adapter)]
    modules, misfits = _modules(opened, rank)
    if problems or misfits:
        raise PlanError(problems + misfits)
    kind, notes = dtypes.float_named(dtype), tuple(_notes(opened, modules))
    return AdapterPlan(path, tuple(opened), tuple(modules), chosen, given, space, rank, kind, seed, notes)


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


def _with_weights(method: Method, parameters: dict[str, Any], named: Sequence[Addition]) -> dict[str, Any]:
    """Return a method's parameters with the adapters' weights. Raises UsageError where it takes none, or two."""
    takes = "weight" in method.parameters and bool(method.parameters["weight"].each)
    if takes and "weight" not in parameters:
        return parameters | {"weight": [one.scale for one in named]}
    weighted = next((one for one in named if one.scale != 1), None)
    if weighted is not None:
        why = "its weight is given twice, here and as a parameter" if takes else f"{method.name} takes no weights"
        raise UsageError(f"{weighted}: {why}. Leave out :{weighted.scale:g}.")
    return parameters


def _refused(adapter: Adapter) -> Iterator[str]:
    """Yield what an adapter holds that is no product of two factors of a layer."""
    kinds = {
        "factors of experts (target_parameters)": [parts[0].a.name for parts in adapter.experts.values()],
        "rows of single tokens": [rows.rows.name for rows in adapter.tokens.values()],
        "tensors in full (modules_to_save, biases)": [spec.name for spec in adapter.replacements.values()],
        "lengths of rows (DoRA), which depend on the base": [
            part.magnitude.name for part in adapter.factors.values() if part.magnitude is not None
        ],
    }
    for kind, names in kinds.items():
        if names:
            number = f" and {len(names) - 1:,} more" if len(names) > 1 else ""
            yield f"{adapter.reference}: {names[0]}{number}: it holds {kind}; {MAKE_A_VECTOR}"


def _modules(adapters: Sequence[Adapter], rank: int | None) -> tuple[list[AdapterModule], list[str]]:
    """Return the modules of all adapters in the order of the first one's file, and what doesn't fit together."""
    modules: list[AdapterModule] = []
    problems: list[str] = []
    for name in dict.fromkeys(name for adapter in adapters for name in adapter.factors):
        parts = tuple(adapter.factors.get(name) for adapter in adapters)
        present = [(adapter, part) for adapter, part in zip(adapters, parts, strict=True) if part is not None]
        of = {(part.b.shape[0], part.a.shape[1], _is_embedding(part), part.transposed): one for one, part in present}
        if len(of) > 1:
            shown = ", ".join(
                f"{rows} × {columns}{' of an embedding' * embedding}{' (fan_in_fan_out)' * (turned and not embedding)}"
                f" in {adapter.reference}"
                for (rows, columns, embedding, turned), adapter in of.items()
            )
            problems.append(f"{name}: is {shown}; are they of one base?")
            continue
        [(rows, columns, embedding, _)] = of
        whole = min(sum(part.a.shape[0] for _, part in present), rows, columns)
        module = name.removesuffix(".weight")
        letters = ("lora_embedding_A", "lora_embedding_B") if embedding else ("lora_A.weight", "lora_B.weight")
        names = (f"{peft_folder.PREFIX}{module}.{letters[0]}", f"{peft_folder.PREFIX}{module}.{letters[1]}")
        modules.append(AdapterModule(module, parts, min(rank or whole, whole), names))
        if modules[-1].rank > MAX_RANK:
            problems.append(f"{name}: the ranks come to {whole:,}, more than {MAX_RANK:,}; cut them with --rank")
    return modules, problems


def _is_embedding(part: Factors) -> bool:
    return "lora_embedding_A" in part.a.name


def _notes(adapters: Sequence[Adapter], modules: Sequence[AdapterModule]) -> Iterator[str]:
    """Yield what a user should know: modules that not all have, other bases, what is left out."""
    for number, adapter in enumerate(adapters):
        missing = sum(module.parts[number] is None for module in modules)
        if missing:
            yield f"{adapter.reference}: leaves {counted(missing, 'module')} of {len(modules):,} alone: zero in it"
    bases = {adapter.config.base: adapter.reference for adapter in reversed(adapters) if adapter.config.base}
    if len(bases) > 1:
        of = ", ".join(f"{reference} of {base!r}" for base, reference in bases.items())
        yield f"the adapters say they are of different bases: {of}"
    for adapter in adapters:
        for name, why in adapter.left_out.items():
            yield f"{adapter.reference}: {name} is left out: {why}"


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
