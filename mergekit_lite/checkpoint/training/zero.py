"""Folders of DeepSpeed's ZeRO: the float32 masters of the optimizer put together, or the weights of the model.

    mp_rank_00_model_states.pt                        the model in its training dtype, shapes in the optimizer's order
    zero_pp_rank_R_mp_rank_00_model_states.pt         with ZeRO-3 each process's: buffers, parts of what is frozen
    [bf16_]zero_pp_rank_R_mp_rank_00_optim_states.pt  each process's part of the masters, as flat vectors

ZeRO-1 and -2 cut the vector of all parameters of a group into one part a process; ZeRO-3 cuts each parameter, padded,
into one part a process. What is put together is what ``deepspeed/utils/zero_to_fp32.py`` puts together, see
https://github.com/deepspeedai/DeepSpeed.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import folder as folders
from mergekit_lite.checkpoint.encodings.tiled import Tile
from mergekit_lite.checkpoint.formats import plain_pickle
from mergekit_lite.checkpoint.formats.header import WeightFile, check_name
from mergekit_lite.checkpoint.formats.plain_pickle import StoredTensor
from mergekit_lite.checkpoint.formats.torch_zip import Record, read_records, spec_in_record
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.checkpoint.training.state import State, in_file_order, joined
from mergekit_lite.errors import CheckpointError, listing, shortened
from mergekit_lite.input_files import opened

MODEL = re.compile(r"(zero_pp_rank_(?P<rank>\d+)_)?mp_rank_(?P<part>\d+)_model_states\.pt")
OPTIMIZER = re.compile(r"(bf16_)?zero_pp_rank_(?P<rank>\d+)_mp_rank_(?P<part>\d+)_optim_states\.pt")
ENDINGS = ("_model_states.pt", "-model_states.pt", "_optim_states.pt")
MODULE = "module"  # the key of the weights in the training dtype
STATE = "optimizer_state_dict"
GROUPS = {"single_partition_of_fp32_groups": 2, "fp32_flat_groups": 3}  # masters by the stage that stores them so
UNIVERSAL = "Convert it with DeepSpeed's own ds_to_universal.py, or save the whole model with save_16bit_model"


class File:
    """One file of a process: what it describes, and where its tensors lie."""

    def __init__(self, path: Path) -> None:
        self.path = path
        try:
            with opened(path) as file:
                pickled, self._records = read_records(file, path)
        except CheckpointError:
            raise
        except OSError as error:
            raise CheckpointError(f"{path}: can't be read: {error.strerror or error}") from error
        except Exception as error:  # a damaged zip makes zipfile raise nearly anything
            raise CheckpointError(f"{path}: is no file of torch.save, or cut short. Copy the folder again.") from error
        content = plain_pickle.load(path, pickled, {}, others=True)
        if not isinstance(content, dict):
            raise CheckpointError(f"{path}: holds no dictionary, as DeepSpeed writes one. Copy the folder again.")
        self.content: Mapping[Any, Any] = content
        self.identity = WeightFile.identify(path, pickled)

    def spec(self, name: str, stored: object) -> TensorSpec:
        """Return the place of one of its tensors. Raises CheckpointError where it is none, or lies nowhere."""
        if not isinstance(stored, StoredTensor) or stored.dtype not in dtypes.BY_NAME:
            raise CheckpointError(f"{self.path}: {name!r} is no dense tensor. The checkpoint is damaged or forged.")
        record = self._records.get(f"data/{stored.record}", Record(0, 0))
        return spec_in_record(self.path, name, stored.dtype, stored.shape, stored.strides, stored.start, record)

    def flat(self, name: str, stored: object) -> TensorSpec:
        """Return the place of a vector of floats."""
        spec = self.spec(name, stored)
        if len(spec.shape) != 1 or not spec.is_plain or not dtypes.is_float(spec.dtype):
            raise CheckpointError(f"{self.path}: {name!r} is no vector of floats. The checkpoint is damaged or forged.")
        return spec


def read_zero(folder: Path, names: set[str], within: str = "") -> State:
    """Put the weights of a model together: the float32 masters, or what is under ``module``, if ``within`` says so.

    Args:
        folder: that of one step.
        names: the files in it.
        within: ``module`` for the weights in the training dtype, empty for the masters where there are any.

    Raises:
        CheckpointError: of several tensor-parallel or pipeline-parallel ranks, or damaged, incomplete or forged.
    """
    if within not in ("", MODULE):
        raise CheckpointError(
            f"{folder}:{within}: a checkpoint of DeepSpeed has the float32 masters, which need no key, and {MODULE}."
        )
    _refuse_parallel(folder, names)
    models = {int(match["rank"] or 0): name for name in sorted(names) if (match := MODEL.fullmatch(name))}
    optimizers = {int(match["rank"]): name for name in sorted(names) if (match := OPTIMIZER.fullmatch(name))}
    if 0 not in models:
        raise CheckpointError(f"{folder}: has no model_states.pt of the first process. Copy the folder again.")
    is_partitioned = any(name.startswith("zero_pp") for name in models.values())
    first = File(folders.inside(folder, models[0]))
    if any(isinstance(key, str) and "autoep" in key for key in first.content):
        raise CheckpointError(f"{folder}: has experts that were partitioned by AutoEP. {UNIVERSAL}.")
    if within == MODULE or not optimizers:
        if is_partitioned:
            raise CheckpointError(
                f"{folder}: is of ZeRO-3, which keeps no weights but the float32 masters of the optimizer"
                + (". Name the folder alone." if optimizers else ", and their files (*_optim_states.pt) are missing.")
            )
        return _module(first, "" if optimizers else "it has no float32 masters of an optimizer: ")
    later = [File(folders.inside(folder, models[rank])) for rank in sorted(models) if rank]
    masters = [File(folders.inside(folder, optimizers[rank])) for rank in sorted(optimizers)]
    _check_world(folder, masters, optimizers)
    return _Masters(folder, [first, *later], masters).state()


def _refuse_parallel(folder: Path, names: set[str]) -> None:
    """Raise CheckpointError where the model was cut in ways that the files don't describe."""
    known = [match for name in names if (match := MODEL.fullmatch(name) or OPTIMIZER.fullmatch(name))]
    others = sorted(
        name for name in names if name.endswith(ENDINGS) and not MODEL.fullmatch(name) and not OPTIMIZER.fullmatch(name)
    )
    if experts := [name for name in others if "expert" in name or name.startswith("expp_rank")]:
        raise CheckpointError(
            listing(f"{folder}: keeps its experts in files of their own, which aren't put together yet", experts, 3)
            + f"\n{UNIVERSAL}."
        )
    if others:
        raise CheckpointError(
            listing(
                f"{folder}: is cut by pipeline parallelism, and the files don't say which layer is which", others, 3
            )
            + f"\n{UNIVERSAL}."
        )
    parts = {int(match["part"]) for match in known}
    if parts != {0}:
        raise CheckpointError(
            f"{folder}: is cut by tensor parallelism (mp_rank_{max(parts):02d}), and the files don't say along which "
            f"dimension each tensor is cut. {UNIVERSAL}."
        )


def _check_world(folder: Path, masters: Sequence[File], optimizers: Mapping[int, str]) -> None:
    """Raise CheckpointError where the files of some process are missing, as far as the first one says."""
    count = _optimizer(masters[0]).get("partition_count")
    counts = count if isinstance(count, list) else [count]
    world = max((each for each in counts if type(each) is int), default=len(masters))
    if sorted(optimizers) != list(range(world)):
        raise CheckpointError(
            f"{folder}: was written by {world} process{'es' if world > 1 else ''}, but has the optimizer "
            f"states of {', '.join(map(str, sorted(optimizers)))}. Copy the files of all processes."
        )


def _optimizer(file: File) -> Mapping[Any, Any]:
    state = file.content.get(STATE)
    if not isinstance(state, dict):
        raise CheckpointError(f"{file.path}: holds no {STATE}, as ZeRO writes one. Copy the folder again.")
    return state


def _module(file: File, why: str) -> State:
    """Return the weights of the model as they were trained."""
    module = file.content.get(MODULE)
    tensors = {
        str(name): file.spec(str(name), value)
        for name, value in (module.items() if isinstance(module, dict) else ())
        if isinstance(name, str) and isinstance(value, StoredTensor)
    }
    if not tensors:
        raise CheckpointError(f"{file.path}: holds no tensors under {MODULE}. Save it with a newer DeepSpeed.")
    for name in tensors:
        check_name(file.path, name)
    kinds = " and ".join(sorted({spec.dtype for spec in tensors.values() if dtypes.is_float(spec.dtype)}))
    note = f"{why}read are the {kinds} weights of DeepSpeed's {MODULE}"
    return State((file.identity,), in_file_order(tensors), _others(file), (note,), (MODULE,))


def _others(file: File) -> dict[str, str]:
    labels = (key if isinstance(key, str) and key.isprintable() else type(key).__name__ for key in file.content)
    return {shortened(key, 80): "not a tensor of the model's state" for key in labels if key != MODULE}


@dataclass(frozen=True)
class _Masters:
    """The files of all processes of a folder that has masters."""

    folder: Path
    models: Sequence[File]
    optimizers: Sequence[File]

    def state(self) -> State:
        """Return the masters, with buffers, frozen and shared parameters."""
        first = self.models[0]
        key = next((key for key in GROUPS if key in _optimizer(self.optimizers[0])), None)
        if key is None:
            raise self._damaged(f"has no float32 masters (neither {' nor '.join(GROUPS)})")
        vectors = [self._vectors(file, key) for file in self.optimizers]
        module = first.content.get(MODULE)
        module = module if isinstance(module, dict) else {}
        buffers = first.content.get("buffer_names")
        tensors = {
            name: first.spec(name, module[name])
            for name in (buffers if isinstance(buffers, list | tuple) else ())
            if isinstance(name, str) and name in module
        }
        tensors |= self._frozen(GROUPS[key])
        tensors |= dict(self._of_groups(vectors) if GROUPS[key] == 2 else self._of_parameters(vectors))
        shared = first.content.get("shared_params")
        for name, other in shared.items() if isinstance(shared, dict) else ():
            if isinstance(name, str) and isinstance(other, str) and other in tensors:
                tensors[name] = replace(tensors[other], name=name)
        if GROUPS[key] == 2:  # ZeRO-1 doesn't say what is frozen: it is what the module has besides
            rest = {name: value for name, value in module.items() if isinstance(name, str) and _is_tensor(value)}
            tensors |= {name: first.spec(name, value) for name, value in rest.items() if name not in tensors}
        for name in tensors:
            check_name(first.path, name)
        left_out = {**_others(first), STATE: "what is not a master is the optimizer's own"}
        files = tuple(file.identity for file in (*self.models, *self.optimizers))
        note = "read are the float32 masters of DeepSpeed's optimizer, and what it doesn't train as it is" + (
            f"; FOLDER:{MODULE} names the weights in the training dtype" if GROUPS[key] == 2 else ""
        )
        return State(files, in_file_order(tensors), left_out, (note,))

    def _damaged(self, what: str) -> CheckpointError:
        return CheckpointError(
            f"{self.folder}: {what}. The checkpoint is incomplete, damaged or forged; copy it again."
        )

    def _vectors(self, file: File, key: str) -> list[TensorSpec]:
        groups = _optimizer(file).get(key)
        if not isinstance(groups, list) or not groups:
            raise self._damaged(f"{file.path.name} has no {key}")
        return [file.flat(f"{key}.{number}", group) for number, group in enumerate(groups)]

    def _shapes(self, key: str = "param_shapes") -> list[Mapping[str, tuple[int, ...]]]:
        """Return the shapes of the parameters of each group, in the order of the masters."""
        shapes = self.models[0].content.get(key)
        groups = shapes if isinstance(shapes, list) else [shapes if shapes is not None else {}]
        for group in groups:
            if not isinstance(group, dict) or not all(
                isinstance(name, str)
                and isinstance(shape, tuple | list)
                and all(type(size) is int and 0 <= size < 1 << 63 for size in shape)
                for name, shape in group.items()
            ):
                raise self._damaged(f"{key} are no shapes by name")
        return [{name: tuple(shape) for name, shape in group.items()} for group in groups]

    def _joined(self, name: str, shape: tuple[int, ...], runs: Sequence[TensorSpec]) -> TensorSpec:
        """Return a parameter that is these runs of elements, one after another."""
        tiles, position = [], 0
        for run in runs:
            tiles.append(Tile((position,), run))
            position += run.numel
        return joined(self.folder, name, shape, (math.prod(shape),), tiles)

    def _of_groups(self, vectors: Sequence[Sequence[TensorSpec]]) -> Iterator[tuple[str, TensorSpec]]:
        """Yield the parameters of ZeRO-1 and -2: a group's vector is what all processes have, one after another."""
        groups = self._shapes()
        paddings = _optimizer(self.optimizers[0]).get("param_alignment_paddings")
        if any(len(of_rank) != len(groups) for of_rank in vectors):
            raise self._damaged(f"has shapes of {len(groups)} groups of parameters, and masters of another number")
        for number, shapes in enumerate(groups):
            vector = [of_rank[number] for of_rank in vectors]
            padding = self._padding(paddings, number, len(shapes))
            offset = 0
            for (name, shape), gap in zip(shapes.items(), padding, strict=True):
                length = math.prod(shape)
                yield name, self._joined(name, shape, list(_cut(vector, offset, length)))
                offset += length + gap
            # The vector is padded to a multiple of twice the number of processes, in ways that differ by version.
            align, stored = 2 * len(vectors), sum(part.numel for part in vector)
            if -(-offset // align) != -(-stored // align):
                raise self._damaged(f"group {number} has {stored:,} elements of masters for {offset:,} of parameters")

    def _padding(self, paddings: object, number: int, count: int) -> Sequence[int]:
        """Return how many elements lie behind each parameter of a group."""
        if not isinstance(paddings, list | tuple):
            return [0] * count
        own = paddings[number] if number < len(paddings) else None
        if (
            not isinstance(own, list | tuple)
            or len(own) != count
            or not all(type(gap) is int and gap >= 0 for gap in own)
        ):
            raise self._damaged(f"param_alignment_paddings don't fit group {number}")
        return own

    def _of_parameters(self, vectors: Sequence[Sequence[TensorSpec]]) -> Iterator[tuple[str, TensorSpec]]:
        """Yield the parameters of ZeRO-3: each process has an equal part of each one, the last ones padded."""
        world, offset = len(vectors), 0
        lengths = {sum(part.numel for part in of_rank) for of_rank in vectors}
        for shapes in self._shapes():
            for name, shape in shapes.items():
                length = math.prod(shape)
                part = -(-length // world)
                yield name, self._of_parts(name, shape, [_cut(vector, offset, part) for vector in vectors])
                offset += part
        if lengths != {offset}:
            raise self._damaged(f"each process should have {offset:,} elements of masters")

    def _of_parts(self, name: str, shape: tuple[int, ...], parts: Sequence[Iterator[TensorSpec]]) -> TensorSpec:
        """Return a parameter whose parts lie one after another, without the padding at their end."""
        runs = [run for part in parts for run in part]
        return self._joined(name, shape, list(_cut(runs, 0, math.prod(shape))))

    def _frozen(self, stage: int) -> dict[str, TensorSpec]:
        """Return the parameters that weren't trained, in their own dtype."""
        tensors: dict[str, TensorSpec] = {}
        for shapes in self._shapes("frozen_param_shapes"):
            for name, shape in shapes.items():
                fragments = [self._fragment(file, name) for file in (self.models if stage == 3 else self.models[:1])]
                if stage == 3:
                    tensors[name] = self._of_parts(name, shape, [iter([fragment]) for fragment in fragments])
                elif fragments[0].shape != shape:
                    raise self._damaged(f"the frozen parameter {name!r} is {fragments[0].shape}, expected {shape}")
                else:
                    tensors[name] = fragments[0]
        return tensors

    def _fragment(self, file: File, name: str) -> TensorSpec:
        fragments = file.content.get("frozen_param_fragments")
        if not isinstance(fragments, dict) or name not in fragments:
            raise self._damaged(f"{file.path.name} lacks its part of the frozen parameter {name!r}")
        return file.spec(name, fragments[name])


def _is_tensor(value: object) -> bool:
    return isinstance(value, StoredTensor)


def _cut(vector: Sequence[TensorSpec], offset: int, length: int) -> Iterator[TensorSpec]:
    """Yield the runs that hold ``length`` elements from ``offset`` on, of vectors that lie one after another."""
    for part in vector:
        begin, end = max(offset, 0), min(offset + length, part.numel)
        if begin < end:
            yield replace(part, shape=(end - begin,), offset=part.offset + begin * dtypes.size(part.dtype))
        offset -= part.numel
