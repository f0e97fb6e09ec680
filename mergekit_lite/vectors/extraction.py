"""Extraction of a task vector from two models: tuned − base, tensor by tensor, into one file or a PEFT adapter.

Each tensor is read twice: once to compute how long its parts will be, so that the file's header can be written first,
and once to write them. The output appears under its name when it is complete.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args

import torch
import xxhash

from mergekit_lite import dtypes
from mergekit_lite._version import __version__
from mergekit_lite.checkpoint import Checkpoint, open_checkpoint, tied_weights
from mergekit_lite.checkpoint.encodings.low_rank import MAX_RANK
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.checkpoint.vector_file import check_output, described
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.devices import chosen_device, explained
from mergekit_lite.engine.pool import Pool, available_cores, tuned_process
from mergekit_lite.engine.schedule import Progress
from mergekit_lite.engine.tiling import CHUNK, cut
from mergekit_lite.errors import PlanError, UsageError
from mergekit_lite.layout import Layout, OutputTensor, is_single_file, safetensors_layout
from mergekit_lite.options import named_options
from mergekit_lite.output.journal import Record
from mergekit_lite.output.workspace import (
    OutputWorkspace,
    check_target,
    finish_publishing,
    manifest_path,
    working_folder,
)
from mergekit_lite.vectors import encoders, peft_folder
from mergekit_lite.vectors.differences import TensorDifference, TensorPair, pair_tensors
from mergekit_lite.vectors.encoders import Encoder, StoragePlan, StoredPart
from mergekit_lite.vectors.low_rank_encoder import LowRankEncoder

VectorFormat = Literal["dense", "sparse", "lowrank", "sign", "lora"]
T = TypeVar("T")


@dataclass(frozen=True)
class ExtractSettings:
    """Options of an extraction; those that the format doesn't take are None."""

    format: VectorFormat = "dense"
    density: float | None = None
    threshold: float | None = None
    rank: int | None = None
    energy: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise UsageError where an option is out of bounds, or the format doesn't take it."""
        if self.format not in get_args(VectorFormat):
            raise UsageError(f"Unknown format {self.format!r}: expected one of {', '.join(get_args(VectorFormat))}.")
        takes = {"sparse": ("density", "threshold"), "lowrank": ("rank", "energy"), "lora": ("rank", "energy")}
        choices = takes.get(self.format, ())
        given = [name for name in ("density", "threshold", "rank", "energy") if getattr(self, name) is not None]
        if strange := [name for name in given if name not in choices]:
            raise UsageError(f"--format {self.format} takes no --{strange[0]}.")
        if choices and len(given) != 1:
            raise UsageError(f"--format {self.format} takes one of --{choices[0]} and --{choices[1]}.")
        for name, most in (("density", 1), ("energy", 1), ("rank", MAX_RANK), ("threshold", 1e38)):
            value = getattr(self, name)
            if value is not None and not 0 < value <= most:
                raise UsageError(f"--{name}: expected a number above 0 up to {most:g}, got {value:g}.")


@dataclass(frozen=True, slots=True)
class StoredTensor:
    """One tensor of a vector.

    Attributes:
        name: of the tensor.
        encoder: name of the encoder that stored it.
        nbytes: number of bytes stored.
        square, lost: ‖difference‖² and ‖what is thrown away‖².
    """

    name: str
    encoder: str
    nbytes: int
    square: float
    lost: float

    @property
    def error(self) -> float:
        """‖what is thrown away‖ / ‖difference‖."""
        return math.sqrt(self.lost / self.square) if self.square else 0.0


@dataclass(frozen=True)
class Extracted:
    """Result of an extraction.

    Attributes:
        output: path of the vector.
        nbytes: number of bytes of its file of weights.
        tensors: the tensors that differ.
        unchanged: number of tensors that don't.
        notes: facts that the user should know.
    """

    output: Path
    nbytes: int
    tensors: tuple[StoredTensor, ...]
    unchanged: int
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """‖what is thrown away‖ / ‖difference‖ over all tensors."""
        square = math.fsum(tensor.square for tensor in self.tensors)
        return math.sqrt(math.fsum(tensor.lost for tensor in self.tensors) / square) if square else 0.0

    def to_json(self) -> dict[str, Any]:
        """Return the result as plain data."""
        tensors = {
            tensor.name: {
                "stored": tensor.encoder,
                "bytes": tensor.nbytes,
                "norm": math.sqrt(tensor.square),
                "error": tensor.error,
            }
            for tensor in self.tensors
        }
        return {
            "path": str(self.output),
            "bytes": self.nbytes,
            "error": self.error,
            "unchanged": self.unchanged,
            "notes": list(self.notes),
            "tensors": tensors,
        }


@named_options
def extract_vector(
    base: str | Path,
    tuned: str | Path,
    output: str | Path,
    *,
    format: VectorFormat = "dense",
    density: float | None = None,
    threshold: float | None = None,
    rank: int | None = None,
    energy: float | None = None,
    seed: int = 0,
    threads: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    progress: Progress | None = None,
) -> Extracted:
    """Make the task vector ``tuned − base``.

    Args:
        base: the model before tuning: any reference.
        tuned: the model after.
        output: a ``.safetensors`` file; for the format ``lora`` a folder.
        format: ``dense`` is exact; ``sparse``, ``lowrank``, ``sign`` and ``lora`` throw some of the difference away.
        density: sparse: the share of each tensor that is kept, its largest differences, in (0, 1].
        threshold: sparse, instead of ``density``: the least size of a difference that is kept.
        rank: lowrank, lora: of the factors.
        energy: lowrank, lora, instead of ``rank``: the least rank that keeps this share of ‖difference‖², in (0, 1].
        seed: lowrank, lora: of the random projections.
        threads: workers; one for each core by default.
        device: where low-rank factors are computed.
        resume: go on with what an earlier run of the same extraction left.
        force: replace an existing output, and drop what an earlier run left unless ``resume`` is set too.
        progress: called with (bytes read, bytes in all) after each tensor.

    Returns:
        The output's path, its bytes, and for each tensor how it is stored and what share is thrown away.

    Raises:
        UsageError: an option is wrong, the output exists or an earlier run was not finished, or its name doesn't fit
            the format.
        CheckpointError: a model can't be opened.
        PlanError: the models don't fit together; every problem is named.
        NonFiniteError: a weight is NaN or infinite.
        RunError: reading or writing failed.
    """
    settings = ExtractSettings(format, density, threshold, rank, energy, seed)
    path = Path(output).expanduser()
    _check_name(path, settings.format)
    place = chosen_device(device)
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    pairs, notes, problems = pair_tensors(before, after)
    if settings.format == "lora":
        problems += peft_folder.header_problems(pairs)
    if problems:
        raise PlanError(problems)
    if resume:
        finish_publishing(path)
    check_target(path, [*before.paths, *after.paths], resume=resume, force=force)
    spill = working_folder(path) / "factors"
    extraction = _Extraction(
        before, after, settings, threads or available_cores(), place, spill, resume, force, progress
    )
    try:
        with explained(place), tuned_process():
            return extraction.run(path, pairs, notes)
    finally:
        shutil.rmtree(spill, ignore_errors=True)
        with suppress(OSError):
            spill.parent.rmdir()  # unless there is something to go on with


def _check_name(path: Path, form: str) -> None:
    """Raise UsageError where the output's name doesn't fit the format."""
    if form != "lora":
        check_output(path)
    elif is_single_file(path):
        raise UsageError(f"{path}: an adapter is a folder. Name one: -o ./adapter.")


@dataclass(frozen=True, slots=True)
class _ChangedTensor:
    """A tensor that differs: its encoder, the parts to be written, and ‖difference‖²."""

    pair: TensorPair
    encoder: Encoder
    storage: StoragePlan
    square: float

    @property
    def nbytes(self) -> int:
        """Number of bytes of its parts."""
        return sum(map(_part_bytes, self.storage.parts))


@dataclass
class _Extraction:
    """One extraction under way."""

    before: Checkpoint
    after: Checkpoint
    settings: ExtractSettings
    threads: int
    device: str
    spill: Path
    resume: bool
    force: bool
    progress: Progress | None

    def run(self, output: Path, pairs: list[TensorPair], notes: list[str]) -> Extracted:
        if self.settings.energy is not None:
            self.spill.mkdir(parents=True, exist_ok=True)
        self.done, self.in_all = 0, 2 * sum(pair.nbytes for pair in pairs)
        planned = dict(self._each(pairs, lambda reader, pair: self._plan(TensorDifference(pair, reader))))
        changed = {name: tensor for name in (pair.name for pair in pairs) if (tensor := planned[name]) is not None}
        changed_pairs = [tensor.pair for tensor in changed.values()]
        storage = {name: tensor.storage for name, tensor in changed.items()}
        if self.settings.format == "lora":
            peft_folder.check_changed(changed_pairs, self.before)
        layout, named = self._layout(output, changed, storage)
        sources = [(str(f.path), f.size, f.mtime_ns) for model in (self.before, self.after) for f in model.files]
        this_run = f"{__version__} {self.settings} {self.before.reference} {self.after.reference}"
        workspace = OutputWorkspace(output, layout, this_run, sources, fresh=not self.resume)
        numbers = {name: number for number, name in enumerate(changed)}

        def write(reader: Reader, pair: TensorPair) -> Record:
            return _write(changed[pair.name], numbers[pair.name], reader, workspace, named)

        try:
            lost: dict[str, float] = {}
            for name, record in self._each(changed_pairs, write):
                workspace.done(record)
                [lost[name]] = record.sums
            for model in (self.before, self.after):
                model.check_unchanged()
            stored = [
                StoredTensor(name, tensor.encoder.name, tensor.nbytes, tensor.square, lost[name])
                for name, tensor in changed.items()
            ]
            extracted = Extracted(output, layout.nbytes, tuple(stored), len(pairs) - len(changed), tuple(notes))
            self._write_small_files(workspace.result, extracted, storage)
            workspace.publish(force=self.force)
        finally:
            workspace.close()
        return extracted

    def _each(self, pairs: list[TensorPair], do: Callable[[Reader, TensorPair], T]) -> Iterator[tuple[str, T]]:
        """Call ``do`` for each pair, on all threads; yield each tensor's name and what it returned."""
        pool = Pool(self.threads, [CPU], 0, 0)
        for pair, result in pool.run(pairs, lambda _, reader, pair: (pair, do(reader, pair))):
            self.done += pair.nbytes
            if self.progress is not None:
                self.progress(self.done, self.in_all)
            yield pair.name, result

    def _plan(self, difference: TensorDifference) -> _ChangedTensor | None:
        """Choose a tensor's encoder and compute its parts; None where nothing changed."""
        pair = difference.pair
        if pair.base is not None and difference.is_empty:
            return None
        if pair.base is None or not dtypes.is_float(pair.tuned.dtype):
            return _ChangedTensor(pair, encoders.WholeEncoder(), encoders.WholeEncoder().plan(difference), 0.0)
        encoder = self._encoder(pair)
        square = math.fsum(delta.square_().sum().item() for _, delta in difference.deltas())
        tensor = _ChangedTensor(pair, encoder, encoder.plan(difference), square)
        if self.settings.format == "lowrank" and tensor.nbytes >= pair.tuned.numel * dtypes.size(pair.stored):
            encoder = encoders.DenseEncoder()  # the factors would save nothing
            return _ChangedTensor(pair, encoder, encoder.plan(difference), square)
        return tensor

    def _encoder(self, pair: TensorPair) -> Encoder:
        """Return the encoder for a tensor that both models have."""
        settings, shape = self.settings, pair.tuned.shape
        match settings.format:
            case "sparse":
                return encoders.SparseEncoder(settings.density, settings.threshold)
            case "sign" if len(shape) > 1 and not tied_weights.is_vocabulary(pair.name):
                return encoders.SignEncoder()
            case "lowrank" if len(shape) == 2 and (settings.rank or 1) * sum(shape) < math.prod(shape):
                return self._low_rank_encoder()
            case "lora" if peft_folder.is_layer(pair):
                return self._low_rank_encoder(peft_folder.is_transposed(self.before))
            case "lora":
                return encoders.WholeEncoder()
        return encoders.DenseEncoder()

    def _low_rank_encoder(self, turned: bool = False) -> Encoder:
        settings = self.settings
        return LowRankEncoder(settings.rank, settings.energy, settings.seed, self.device, self.spill, turned)

    def _layout(
        self, output: Path, changed: Mapping[str, _ChangedTensor], storage: Mapping[str, StoragePlan]
    ) -> tuple[Layout, Callable[[str, str], str]]:
        """Lay out all parts, and return the function that names a tensor's part in the file."""
        lora = self.settings.format == "lora"
        named = peft_folder.naming(storage, self.before) if lora else part_name
        parts = [
            OutputTensor(named(name, part.suffix), part.dtype, part.shape)
            for name, stored in storage.items()
            for part in stored.parts
        ]
        if lora:
            return safetensors_layout([parts], peft_folder.WEIGHTS), named
        deltas = {name: (_written_dtype(tensor), tensor.pair.tuned.shape) for name, tensor in changed.items()}
        metadata = described(self.settings.format, self.before.identity(), deltas)
        return safetensors_layout([parts], output.name, metadata), named

    def _write_small_files(self, folder: Path, extracted: Extracted, storage: Mapping[str, StoragePlan]) -> None:
        """Write the manifest, and an adapter's config."""
        manifest = {
            "tool": "mergekit_lite",
            "version": __version__,
            "format": self.settings.format,
            "settings": {key: value for key, value in vars(self.settings).items() if value is not None},
            "base": self.before.identity()._asdict(),
            "tuned": self.after.identity()._asdict(),
            **{key: value for key, value in extracted.to_json().items() if key != "path"},
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (folder / manifest_path(extracted.output).name).write_text(text, encoding="utf-8")
        if self.settings.format == "lora":
            peft_folder.write_config(folder, self.before, storage, self.settings.rank)


def _write(
    tensor: _ChangedTensor, number: int, reader: Reader, workspace: OutputWorkspace, named: Callable[[str, str], str]
) -> Record:
    """Write the parts of a tensor, unless an earlier run did, and return the journal's record of them.

    ``number`` is the tensor's in the journal; ``named`` returns the name of a tensor's part in the file.
    """
    parts = {part.suffix: (named(tensor.pair.name, part.suffix), _part_bytes(part)) for part in tensor.storage.parts}
    earlier = workspace.record(number, 0)
    if earlier is not None and earlier.output == " ".join(_digest(workspace, *part) for part in parts.values()):
        return earlier
    digests = {suffix: xxhash.xxh3_128() for suffix in parts}

    def write_part(suffix: str, start: int, values: torch.Tensor) -> None:
        data = bytes_of(values.contiguous())
        if len(data):
            workspace.write(parts[suffix][0], start * values.element_size(), data)
            digests[suffix].update(data)

    lost = tensor.encoder.write(TensorDifference(tensor.pair, reader), tensor.storage, write_part)
    digest = " ".join(digest.hexdigest() for digest in digests.values())
    return Record(number, 0, (), digest, (lost,), ())


def _digest(workspace: OutputWorkspace, tensor: str, nbytes: int) -> str:
    """Return the digest of what an earlier run wrote of a tensor; empty where it is not complete."""
    digest = xxhash.xxh3_128()
    for start, count in cut(0, nbytes, CHUNK):
        buffer = memoryview(bytearray(count))
        if not workspace.read(tensor, start, buffer):
            return ""
        digest.update(buffer)
    return digest.hexdigest()


def part_name(tensor: str, part: str) -> str:
    """Return a part's name in a file of task vectors."""
    return f"{tensor}:{part}" if part else tensor


def _written_dtype(tensor: _ChangedTensor) -> str:
    """Return the dtype in which a tensor made with the vector is written."""
    return tensor.pair.tuned.dtype if tensor.storage.parts[0].suffix == "whole" else tensor.pair.written


def _part_bytes(part: StoredPart) -> int:
    return math.prod(part.shape) * dtypes.size(part.dtype)
