"""What combining adapters will do: each module's factors, its rank and the method, or every problem at once."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import xxhash

from mergekit_lite import dtypes
from mergekit_lite._version import __version__
from mergekit_lite.checkpoint.adapters.adapter import Adapter
from mergekit_lite.checkpoint.adapters.factors import Factors
from mergekit_lite.checkpoint.adapters.file import PREFIX
from mergekit_lite.checkpoint.encodings.low_rank import MAX_RANK
from mergekit_lite.checkpoint.opening import open_adapter
from mergekit_lite.checkpoint.references import Addition, is_one_file, parse_addition
from mergekit_lite.errors import PlanError, UsageError, counted, nearest
from mergekit_lite.layout import is_single_file, output_path
from mergekit_lite.methods.registry import Method, method_named
from mergekit_lite.object_stores import Place
from mergekit_lite.vectors.adapter_writing import AdapterModule, AdapterOutput
from mergekit_lite.vectors.spaces import SPACES, SpaceName

MAKE_A_VECTOR = "make a task vector of it (vector extract BASE BASE+ADAPTER -o v.safetensors), and combine those"


@dataclass(frozen=True)
class AdapterPlan(AdapterOutput):
    """A combination of adapters that was found sound: what is merged, how, and where it is written."""

    method: Method
    parameters: Mapping[str, Any]  # as given, with each adapter's weight
    space: SpaceName
    rank: int | None
    seed: int

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
    path = written_to(output)
    if space not in SPACES:
        raise UsageError(f"Unknown space {space!r}.{nearest(space, SPACES)} Known: {', '.join(SPACES)}.")
    if rank is not None and (type(rank) is not int or rank < 1):
        raise UsageError(f"rank: expected a whole number of at least 1, got {rank!r}.")
    if not adapters:
        raise UsageError("No adapter was given: mergekit-lite vector combine --space core --method ties ./a ./b -o ./c")
    named = [parse_addition(str(text)) for text in adapters]
    chosen = method_named(method)
    if chosen.statistics:
        raise UsageError(
            f"{chosen.name} reads statistics, which are of whole models: merge those, each base+adapter, by a recipe."
        )
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
    problems = [problem for adapter in opened for problem in refused(adapter, MAKE_A_VECTOR)]
    modules, misfits = modules_of(opened, rank)
    if problems or misfits:
        raise PlanError(problems + misfits)
    written = (path, tuple(opened), tuple(modules), dtypes.float_named(dtype), tuple(_notes(opened, modules)))
    return AdapterPlan(*written, chosen, given, space, rank, seed)


def written_to(output: str | Path) -> Path:
    """Return the folder that an adapter is written to. Raises UsageError where it can't be one."""
    path = output_path(output)
    if isinstance(path, Place) or is_single_file(path):
        raise UsageError(f"{path}: an adapter is a folder on this disk. Name one: -o ./adapter.")
    return path


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


def refused(adapter: Adapter, remedy: str) -> Iterator[str]:
    """Yield what an adapter holds that is no product of two factors of a layer, each with what to do."""
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
            yield f"{adapter.reference}: {names[0]}{number}: it holds {kind}; {remedy}"


def modules_of(adapters: Sequence[Adapter], rank: int | None) -> tuple[list[AdapterModule], list[str]]:
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
        names = (f"{PREFIX}{module}.{letters[0]}", f"{PREFIX}{module}.{letters[1]}")
        modules.append(AdapterModule(module, parts, min(rank or whole, whole), names))
        if modules[-1].rank > MAX_RANK:
            problems.append(f"{name}: the ranks come to {whole:,}, more than {MAX_RANK:,}; cut them with --rank")
    return modules, [*problems, *_of_two_orientations(modules)]


def _of_two_orientations(modules: Sequence[AdapterModule]) -> Iterator[str]:
    """Yield what one config can't say: that some layers' weights are stored transposed, and others' are not."""
    found = [
        (part.transposed, module) for module in modules for part in module.parts if part and not _is_embedding(part)
    ]
    of = {transposed: module.name for transposed, module in reversed(found)}
    if len(of) > 1:
        yield f"{of[True]} has fan_in_fan_out, {of[False]} has not: one adapter can't say both; {MAKE_A_VECTOR}"


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
