"""Make a task vector from two models: tuned − base, tensor by tensor, into one file or a PEFT adapter.

Each tensor is read twice: once to tell how long its parts will be, so that the file's header can be written first, and
once to write them. What is made appears under its name when it is complete.
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
from mergekit_lite.checkpoint.adapter_config import MAX_RANK
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.checkpoint.vector_file import described
from mergekit_lite.engine.buffers import CPU
from mergekit_lite.engine.pool import Pool, available_cores, tuned_process
from mergekit_lite.engine.run import chosen_device
from mergekit_lite.engine.tiling import CHUNK, cut
from mergekit_lite.errors import PlanError, UsageError
from mergekit_lite.layout import Layout, OutputTensor, safetensors_layout
from mergekit_lite.options import named_options
from mergekit_lite.output.journal import Record
from mergekit_lite.output.workspace import Workspace, check_target, manifest_path, working_folder
from mergekit_lite.vectors import peft_folder
from mergekit_lite.vectors.encoders import Dense, Encoder, Part, Signs, Sketch, Sparse, Whole
from mergekit_lite.vectors.lowrank import LowRank
from mergekit_lite.vectors.pairs import Difference, Pair, paired

Format = Literal["dense", "sparse", "lowrank", "sign", "lora"]
FORMATS = get_args(Format)
Progress = Callable[[int, int], None]
T = TypeVar("T")


@dataclass(frozen=True)
class Settings:
    """How differences are stored; what a format doesn't take is None. ``seed`` is of the random projections."""

    format: Format = "dense"
    density: float | None = None
    threshold: float | None = None
    rank: int | None = None
    energy: float | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Check what can be checked without the models. Raises UsageError."""
        if self.format not in FORMATS:
            raise UsageError(f"Unknown format {self.format!r}: expected one of {', '.join(FORMATS)}.")
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
class Kept:
    """One tensor of a vector: how it is stored, in how many bytes, ‖difference‖² and ‖what is thrown away‖²."""

    name: str
    how: str
    nbytes: int
    square: float
    lost: float

    @property
    def error(self) -> float:
        """‖what is thrown away‖ / ‖difference‖."""
        return math.sqrt(self.lost / self.square) if self.square else 0.0


@dataclass(frozen=True)
class Extracted:
    """What was made: its path and size, its tensors, how many tensors don't differ, and notes for the user."""

    output: Path
    nbytes: int
    tensors: tuple[Kept, ...]
    unchanged: int
    notes: tuple[str, ...]

    @property
    def error(self) -> float:
        """‖what is thrown away‖ / ‖difference‖ over all tensors."""
        square = math.fsum(tensor.square for tensor in self.tensors)
        return math.sqrt(math.fsum(tensor.lost for tensor in self.tensors) / square) if square else 0.0

    def to_json(self) -> dict[str, Any]:
        """Plain data."""
        tensors = {
            kept.name: {"stored": kept.how, "bytes": kept.nbytes, "norm": math.sqrt(kept.square), "error": kept.error}
            for kept in self.tensors
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
    format: Format = "dense",
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
    settings = Settings(format, density, threshold, rank, energy, seed)
    path = Path(output).expanduser()
    _check_name(path, settings.format)
    place = chosen_device(device)
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    pairs, notes, problems = paired(before, after)
    if settings.format == "lora":
        problems += peft_folder.problems(pairs)
    if problems:
        raise PlanError(problems)
    check_target(path, [*before.paths, *after.paths], resume=resume, force=force)
    spill = working_folder(path) / "factors"
    making = _Making(before, after, settings, threads or available_cores(), place, spill, resume, progress)
    try:
        with tuned_process():
            return making.run(path, pairs, notes)
    finally:
        shutil.rmtree(spill, ignore_errors=True)
        with suppress(OSError):
            spill.parent.rmdir()  # unless there is something to go on with


def _check_name(path: Path, form: str) -> None:
    if form == "lora" and path.suffix in (".safetensors", ".bin", ".pt", ".pth"):
        raise UsageError(f"{path}: an adapter is a folder. Name one: -o ./adapter.")
    if form != "lora" and path.suffix != ".safetensors":
        raise UsageError(f"{path}: a task vector is a .safetensors file. Name one: -o {path.name}.safetensors.")


@dataclass
class _Making:
    """One extraction under way."""

    before: Checkpoint
    after: Checkpoint
    settings: Settings
    threads: int
    device: str
    spill: Path
    resume: bool
    progress: Progress | None

    def __post_init__(self) -> None:
        self.done = 0

    def run(self, output: Path, pairs: list[Pair], notes: list[str]) -> Extracted:
        if self.settings.energy is not None:
            self.spill.mkdir(parents=True, exist_ok=True)
        self.in_all = 2 * sum(pair.nbytes for pair in pairs)
        measured = dict(self._each(pairs, lambda reader, pair: (pair.name, self._measure(Difference(pair, reader)))))
        found = {name: one for name, one in measured.items() if one is not None}
        changed = [pair for pair in pairs if pair.name in found]
        if self.settings.format == "lora":
            peft_folder.check_changed(changed, self.before)
        sketches = {pair.name: found[pair.name][1] for pair in changed}
        layout, named = self._laid_out(output, changed, sketches)
        sources = [(str(f.path), f.size, f.mtime_ns) for model in (self.before, self.after) for f in model.files]
        this_run = f"{__version__} {self.settings} {self.before.reference} {self.after.reference}"
        workspace = Workspace(output, layout, this_run, sources, fresh=not self.resume)
        numbers = {pair.name: number for number, pair in enumerate(changed)}

        def write(reader: Reader, pair: Pair) -> tuple[str, Record]:
            encoder, sketch, _ = found[pair.name]
            places = {part.suffix: (named(pair.name, part.suffix), _part_bytes(part)) for part in sketch.parts}
            known = workspace.record(numbers[pair.name], 0)
            if known is not None and known.output == " ".join(_digest(workspace, *at) for at in places.values()):
                return pair.name, known
            digests = {part: xxhash.xxh3_128() for part in places}

            def put(part: str, start: int, values: torch.Tensor) -> None:
                data = bytes_of(values.contiguous())
                if len(data):
                    workspace.write(places[part][0], start * values.element_size(), data)
                    digests[part].update(data)

            lost = encoder.write(Difference(pair, reader), sketch, put)
            output = " ".join(digest.hexdigest() for digest in digests.values())
            return pair.name, Record(numbers[pair.name], 0, (), output, (lost,), ())

        try:
            lost: dict[str, float] = {}
            for name, record in self._each(changed, write):
                workspace.done(record)
                [lost[name]] = record.sums
            for model in (self.before, self.after):
                model.check_unchanged()
            kept = [
                Kept(name, type(encoder).__name__.lower(), _nbytes(sketch), square, lost[name])
                for name, (encoder, sketch, square) in ((pair.name, found[pair.name]) for pair in changed)
            ]
            made = Extracted(output, layout.nbytes, tuple(kept), len(pairs) - len(changed), tuple(notes))
            self._beside(workspace.result, made, changed, sketches)
            workspace.publish()
        finally:
            workspace.close()
        return made

    def _each(self, pairs: list[Pair], do: Callable[[Reader, Pair], tuple[str, T]]) -> Iterator[tuple[str, T]]:
        """Do something for each pair, on all threads; what it made, by the tensor's name."""
        nbytes = {pair.name: pair.nbytes for pair in pairs}
        pool = Pool(self.threads, CPU, 0, 0)
        for name, made in pool.run(pairs, lambda _, reader, pair: do(reader, pair)):
            self.done += nbytes[name]
            if self.progress is not None:
                self.progress(self.done, self.in_all)
            yield name, made

    def _measure(self, difference: Difference) -> tuple[Encoder, Sketch, float] | None:
        """How a tensor is stored, and ‖difference‖²; None where there is none."""
        pair = difference.pair
        if pair.base is not None and difference.is_nothing:
            return None
        if pair.base is None or not dtypes.is_float(pair.tuned.dtype):
            return Whole(), Whole().measure(difference), 0.0
        encoder = self._encoder(pair)
        square = math.fsum(delta.square_().sum().item() for _, delta in difference.deltas())
        sketch = encoder.measure(difference)
        if self.settings.format == "lowrank" and _nbytes(sketch) >= pair.tuned.numel * dtypes.size(pair.stored):
            encoder, sketch = Dense(), Dense().measure(difference)  # factors that save nothing
        return encoder, sketch, square

    def _encoder(self, pair: Pair) -> Encoder:
        """How a tensor is stored that both models have."""
        settings, shape = self.settings, pair.tuned.shape
        match settings.format:
            case "sparse":
                return Sparse(settings.density, settings.threshold)
            case "sign" if len(shape) > 1 and not tied_weights.is_vocabulary(pair.name):
                return Signs()
            case "lowrank" if len(shape) == 2 and (settings.rank or 1) * sum(shape) < math.prod(shape):
                return LowRank(settings.rank, settings.energy, settings.seed, self.device, self.spill)
            case "lora":
                if peft_folder.is_layer(pair):
                    turned = peft_folder.is_transposed(self.before)
                    return LowRank(settings.rank, settings.energy, settings.seed, self.device, self.spill, turned)
                return Whole()
        return Dense()

    def _laid_out(
        self, output: Path, changed: list[Pair], sketches: Mapping[str, Sketch]
    ) -> tuple[Layout, Callable[[str, str], str]]:
        """Where every part will lie, and a part's name in the file."""
        lora = self.settings.format == "lora"
        named = peft_folder.naming(sketches, self.before) if lora else part_name
        tensors = [
            OutputTensor(named(pair.name, part.suffix), part.dtype, part.shape)
            for pair in changed
            for part in sketches[pair.name].parts
        ]
        if lora:
            return safetensors_layout([tensors], peft_folder.WEIGHTS), named
        about = {pair.name: (_described_dtype(pair, sketches[pair.name]), pair.tuned.shape) for pair in changed}
        metadata = described(self.settings.format, self.before.identity(), about)
        return safetensors_layout([tensors], output.name, metadata), named

    def _beside(self, result: Path, made: Extracted, changed: list[Pair], sketches: Mapping[str, Sketch]) -> None:
        """Write the manifest, and what else an adapter's folder has."""
        manifest = {
            "tool": "mergekit_lite",
            "version": __version__,
            "format": self.settings.format,
            "settings": {key: value for key, value in vars(self.settings).items() if value is not None},
            "base": self.before.identity()._asdict(),
            "tuned": self.after.identity()._asdict(),
            **{key: value for key, value in made.to_json().items() if key != "path"},
        }
        text = json.dumps(manifest, indent=1, ensure_ascii=False) + "\n"
        (result / manifest_path(made.output).name).write_text(text, encoding="utf-8")
        if self.settings.format == "lora":
            peft_folder.write_config(result, self.before, changed, sketches, self.settings.rank)


def _digest(workspace: Workspace, tensor: str, nbytes: int) -> str:
    """The digest of what an earlier run wrote of a tensor; empty where it is not all there."""
    digest = xxhash.xxh3_128()
    for start, count in cut(0, nbytes, CHUNK):
        buffer = memoryview(bytearray(count))
        if not workspace.read(tensor, start, buffer):
            return ""
        digest.update(buffer)
    return digest.hexdigest()


def part_name(tensor: str, part: str) -> str:
    """A part's name in a file of task vectors."""
    return f"{tensor}:{part}" if part else tensor


def _described_dtype(pair: Pair, sketch: Sketch) -> str:
    """The dtype in which a tensor made with the vector is written."""
    return pair.tuned.dtype if sketch.parts[0].suffix == "whole" else pair.written


def _nbytes(sketch: Sketch) -> int:
    return sum(_part_bytes(part) for part in sketch.parts)


def _part_bytes(part: Part) -> int:
    return math.prod(part.shape) * dtypes.size(part.dtype)
