"""Extraction of a task vector from two models: tuned − base, tensor by tensor, into one file or a PEFT adapter.

Each tensor is read twice: once to compute how long its parts will be, so that the file's header can be written first,
and once to write them. The output appears under its name when it is complete.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, TypeVar

import torch
import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, open_checkpoint
from mergekit_lite.checkpoint.folder import ADAPTER_CONFIG
from mergekit_lite.checkpoint.identity import Identity
from mergekit_lite.checkpoint.reader import Reader, bytes_of
from mergekit_lite.checkpoint.tied_weights import is_vocabulary
from mergekit_lite.checkpoint.tokenizer_file import Tokenizer
from mergekit_lite.checkpoint.vector_file import check_output, described
from mergekit_lite.checkpoint.vector_tokens import metadata_of
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.devices import chosen_device, explained
from mergekit_lite.engine.pool import Pool, available_cores, tuned_process
from mergekit_lite.engine.ray_cluster import devices_of, files_of, workers_of
from mergekit_lite.engine.ray_workers import Cluster
from mergekit_lite.engine.schedule import Progress, expect_elements
from mergekit_lite.engine.tiling import CHUNK, cut
from mergekit_lite.errors import PlanError, RunError, UsageError, listing
from mergekit_lite.layout import Layout, OutputPath, OutputTensor, is_single_file, output_path, safetensors_layout
from mergekit_lite.object_stores import Place
from mergekit_lite.options import named_options
from mergekit_lite.output.by_workers import Parcel, Written
from mergekit_lite.output.journal import Record
from mergekit_lite.output.publishing import check_target
from mergekit_lite.output.remote_target import check_remote_target
from mergekit_lite.output.remote_workspace import Part, RemoteWorkspace, spool_folder
from mergekit_lite.output.working_folder import WorkingFolder, as_run_errors
from mergekit_lite.output.workspace import OutputWorkspace, manifest_path
from mergekit_lite.vectors import encoders, peft_folder
from mergekit_lite.vectors.differences import TensorDifference, TensorPair, by_token, pair_tensors
from mergekit_lite.vectors.encoders import Encoder, StoragePlan, StoredPart
from mergekit_lite.vectors.extract_settings import ExtractSettings, VectorFormat, VectorTokens
from mergekit_lite.vectors.extracted import Extracted, StoredTensor, identified, made_of, manifest_text
from mergekit_lite.vectors.finished import published
from mergekit_lite.vectors.low_rank_encoder import LowRankEncoder

T = TypeVar("T")


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
    tokenizer_source: VectorTokens | None = None,
    threads: int | None = None,
    device: str = "cpu",
    resume: bool = False,
    force: bool = False,
    sync: bool = False,
    progress: Progress | None = None,
    ray: str | Cluster | None = None,
) -> Extracted:
    """Make the task vector ``tuned − base``.

    Args:
        base: the model before tuning: any reference.
        tuned: the model after.
        output: a ``.safetensors`` file; for the format ``lora`` a folder; or the URL of one in an object store.
        format: ``dense`` is exact; ``sparse``, ``lowrank``, ``sign`` and ``lora`` throw some of the difference away.
        density: sparse: the share of each tensor that is kept, its largest differences, in (0, 1].
        threshold: sparse, instead of ``density``: the least size of a difference that is kept.
        rank: lowrank, lora: of the factors.
        energy: lowrank, lora, instead of ``rank``: the least rank that keeps this share of ‖difference‖², in (0, 1].
        seed: lowrank, lora: of the random projections.
        tokenizer_source: ``base`` or ``tuned``: rows of embedding and head are those of its tokens, in its order; by
            default they are subtracted as they stand, or stored whole where their numbers differ.
        threads: workers; one for each core by default.
        device: where low-rank factors are computed.
        resume: go on with what an earlier run of the same extraction left.
        force: replace an existing output, and drop what an earlier run left unless ``resume`` is set too.
        sync: bring the output to the disk before it gets its name, and its name after, so that a power cut can't undo
            or damage what was published; takes as long as the disk takes to write the output.
        progress: called with (bytes read, bytes in all) after each tensor.
        ray: work on the machines of a Ray cluster, as for ``run``.

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
    settings = ExtractSettings(format, density, threshold, rank, energy, seed, tokenizer_source)
    path = output_path(output)
    _check_name(path, settings.format)
    place = chosen_device(device) if ray is None else devices_of(ray, device)[0]
    before, after = open_checkpoint(base), open_checkpoint(tuned)
    recorded, identity = made_of(before, after, settings), before.identity()
    before, after, tokens, notes_on_rows = by_token(before, after, tokenizer_source)
    run = identified(before, after, recorded, tokens)
    pairs, notes, problems = pair_tensors(before, after)
    notes += notes_on_rows
    if settings.format == "lora":
        problems += [each.of_several for each in (before, after) if each.of_several]
        problems += peft_folder.header_problems(pairs)
    if problems:
        raise PlanError(problems)
    sources = [(str(file.path), file.size, file.mtime_ns) for model in (before, after) for file in model.files]
    if resume and (extracted := published(path, run, sources, force=force, sync=sync)) is not None:
        return extracted
    with ExitStack() as stack:
        target: WorkingFolder | Place
        if isinstance(path, Place):
            references = [before.base_reference, after.base_reference]
            check_remote_target(path, [*before.paths, *after.paths, *references], resume=resume, force=force)
            target, spill = path, Path(stack.enter_context(TemporaryDirectory(dir=spool_folder())), "factors")
        else:
            check_target(path, [*before.paths, *after.paths], resume=resume, force=force)
            target = stack.enter_context(WorkingFolder(path, fresh=force and not resume))
            stack.enter_context(as_run_errors(target.path))
            spill = target.factors
        crew = stack.enter_context(workers_of(ray, device, threads))
        if crew is not None and not crew.local and isinstance(path, Place) and settings.energy is not None:
            factors = "--energy keeps factors in a folder that all machines have to see"
            raise UsageError(f"{path}: {factors}. Give --rank, or an output on a shared file system.")
        extraction = _Extraction(
            before, after, identity, tokens, settings, threads or available_cores(), place, spill, progress, crew
        )
        try:
            with explained(place), tuned_process():
                return extraction.run(target, pairs, notes, run, sources, resume=resume, force=force, sync=sync)
        finally:
            shutil.rmtree(spill, ignore_errors=True)


def _check_name(path: OutputPath, form: str) -> None:
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
    identity: Identity  # of the model before, as it lies there
    tokens: Tokenizer | None  # whose the rows of embedding and head are
    settings: ExtractSettings
    threads: int
    device: str
    spill: Path
    progress: Progress | None
    crew: Cluster | None

    def __getstate__(self) -> dict[str, Any]:
        """Return what a worker elsewhere needs."""
        return vars(self) | {"progress": None, "crew": None, "tokens": None}

    def run(
        self,
        target: WorkingFolder | Place,
        pairs: list[TensorPair],
        notes: list[str],
        run: Mapping[str, Any],
        sources: Sequence[tuple[str, int, int]],
        *,
        resume: bool,
        force: bool,
        sync: bool,
    ) -> Extracted:
        output = target if isinstance(target, Place) else target.output
        if self.settings.energy is not None:
            self.spill.mkdir(exist_ok=True)
        if self.crew is not None and not self.crew.local:
            marks = (
                [] if isinstance(target, Place) else [target.marked(os.urandom(16).hex())]
            )  # workers send bytes back
            self.crew.must_see(files_of([self.before, self.after]), marks)
        self.done, self.in_all = 0, 2 * sum(pair.nbytes for pair in pairs)
        planned = dict(self._each(pairs, lambda reader, pair: self._plan(TensorDifference(pair, reader))))
        changed = {name: tensor for name in (pair.name for pair in pairs) if (tensor := planned[name]) is not None}
        changed_pairs = [tensor.pair for tensor in changed.values()]
        storage = {name: tensor.storage for name, tensor in changed.items()}
        if self.settings.format == "lora":
            peft_folder.check_changed(changed_pairs, self.before)
        layout, named = self._layout(output, changed, storage)
        names = [manifest_path(output).name, *[ADAPTER_CONFIG] * (self.settings.format == "lora")]
        numbers = {name: number for number, name in enumerate(changed)}

        def parts_of(record: Record) -> list[Part]:
            name = list(changed)[record.job]
            written = zip(storage[name].parts, record.output.split(), strict=True)
            return [(named(name, part.suffix), 0, _part_bytes(part), digest) for part, digest in written]

        workspace: OutputWorkspace
        if isinstance(target, Place):
            plan = run["plan"]
            crew = self.crew is not None
            workspace = RemoteWorkspace(
                target, layout, plan, sources, names, parts_of, resume=resume, force=force, crew=crew
            )
        else:
            workspace = OutputWorkspace(target, layout, run["plan"], sources, names)
            if self.crew is not None and not self.crew.local:
                workspace.share()

        def write(reader: Reader, pair: TensorPair) -> tuple[Record, list[Written]]:
            record = _write(changed[pair.name], numbers[pair.name], reader, workspace, named)
            return record, workspace.taken() if isinstance(workspace, Parcel) else []

        try:
            if isinstance(workspace, RemoteWorkspace) and workspace.changed_sources:
                title = f"{output}: inputs that changed since the run was stopped; --force starts over"
                raise RunError(listing(title, sorted(workspace.changed_sources)))
            records: dict[str, Record] = {}
            for name, (record, written) in self._each(changed_pairs, write):
                if isinstance(workspace, RemoteWorkspace):
                    workspace.write_all(written)
                workspace.done(record)
                records[name] = record
            for model in (self.before, self.after):
                model.check_unchanged()
            stored = [
                StoredTensor(name, tensor.encoder.name, tensor.nbytes, tensor.square, records[name].sums[0])
                for name, tensor in changed.items()
            ]
            parts = {
                named(name, part.suffix): digest
                for name, kept in storage.items()
                for part, digest in zip(kept.parts, records[name].output.split(), strict=True)
            }
            shown = str(output) if isinstance(output, Place) else output
            extracted = Extracted(shown, layout.nbytes, tuple(stored), len(pairs) - len(changed), tuple(notes))
            with workspace.adding_companions() as result:
                text = manifest_text(extracted, run, result / layout.files[0].name, parts)
                (result / manifest_path(output).name).write_bytes(text.encode())
                if self.settings.format == "lora":
                    peft_folder.write_config(result, self.before, storage, self.settings.rank)
            workspace.publish(force=force, sync=sync)
        finally:
            workspace.close()
        return extracted

    def _each(self, pairs: list[TensorPair], do: Callable[[Reader, TensorPair], T]) -> Iterator[tuple[str, T]]:
        """Call ``do`` for each pair, on all threads; yield each tensor's name and what it returned."""
        pool = Pool(self.threads, [CPU], 0, 0, crew=self.crew)

        def work(_: WorkerBuffers, reader: Reader, pair: TensorPair) -> tuple[TensorPair, T]:
            return pair, do(reader, pair)

        def expect(reader: Reader, pair: TensorPair) -> None:
            specs = [spec for spec in (pair.base, pair.tuned) if spec is not None]
            expect_elements(reader, [(specs, 0, pair.tuned.numel)], again=True)

        for pair, result in pool.run(pairs, work, expect, size=lambda pair: pair.nbytes):
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
            case "sign" if len(shape) > 1 and not is_vocabulary(pair.name):
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
        self, output: OutputPath, changed: Mapping[str, _ChangedTensor], storage: Mapping[str, StoragePlan]
    ) -> tuple[Layout, Callable[[str, str], str]]:
        """Lay out all parts, and return the function that names a tensor's part in the file."""
        lora = self.settings.format == "lora"
        named = peft_folder.naming(storage, self.before) if lora else encoders.part_name
        parts = [
            OutputTensor(named(name, part.suffix), part.dtype, part.shape)
            for name, stored in storage.items()
            for part in stored.parts
        ]
        if lora:
            return safetensors_layout([parts], [peft_folder.WEIGHTS]), named
        deltas = {name: (_written_dtype(tensor), tensor.pair.tuned.shape) for name, tensor in changed.items()}
        metadata = described(self.settings.format, self.identity, deltas)
        if self.tokens is not None and any(map(is_vocabulary, changed)):
            metadata |= metadata_of(self.tokens)
        return safetensors_layout([parts], [output.name], metadata), named


def _write(
    tensor: _ChangedTensor, number: int, reader: Reader, workspace: OutputWorkspace, named: Callable[[str, str], str]
) -> Record:
    """Write the parts of a tensor, unless an earlier run did, and return the journal's record of them.

    ``number`` is the tensor's in the journal; ``named`` returns the name of a tensor's part in the file.
    """
    parts = {part.suffix: (named(tensor.pair.name, part.suffix), _part_bytes(part)) for part in tensor.storage.parts}
    earlier = workspace.record(number, 0)
    if earlier is not None and earlier.output == " ".join(digest_of_part(workspace, *part) for part in parts.values()):
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


def digest_of_part(workspace: OutputWorkspace, tensor: str, nbytes: int) -> str:
    """Return the digest of what an earlier run wrote of a tensor; empty where it is not complete."""
    digest = xxhash.xxh3_128()
    for start, count in cut(0, nbytes, CHUNK):
        buffer = memoryview(bytearray(count))
        if not workspace.read(tensor, start, buffer):
            return ""
        digest.update(buffer)
    return digest.hexdigest()


def _written_dtype(tensor: _ChangedTensor) -> str:
    """Return the dtype in which a tensor made with the vector is written."""
    return tensor.pair.tuned.dtype if tensor.storage.parts[0].suffix == "whole" else tensor.pair.written


def _part_bytes(part: StoredPart) -> int:
    return math.prod(part.shape) * dtypes.size(part.dtype)
