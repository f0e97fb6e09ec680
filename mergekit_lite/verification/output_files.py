"""Files of the output: all present, no others among them, and every byte the one that was written."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

import xxhash

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import TensorSpec, formats
from mergekit_lite.checkpoint.folder import inside, weight_map
from mergekit_lite.checkpoint.parts import in_folder
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.engine.buffers import CPU, WorkerBuffers
from mergekit_lite.engine.pool import Crew, Pool, tuned_process
from mergekit_lite.engine.report import of_spans
from mergekit_lite.engine.tiling import CHUNK, bounds, cut
from mergekit_lite.errors import CheckpointError, RunError
from mergekit_lite.layout import folder_of, indexed_files, is_single_file
from mergekit_lite.output.manifest import NOT_SEALED, file_digest, frame_digest
from mergekit_lite.verification.manifest_schema import DIGEST, Manifest, RecordedFile, RecordedTensor
from mergekit_lite.verification.result import Finding

STRANGER = "is not a part of this output: whoever loads the folder may take it for one"
HIDDEN = "is not a part of this output; nothing that loads models reads names that begin with a dot"
WIDEST = 8  # bytes of the widest element


@dataclass(frozen=True)
class OpenedOutput:
    """Tensors of an output, as far as its files can be read, what is wrong with the files, and what to know of them."""

    tensors: Mapping[str, TensorSpec]
    findings: tuple[Finding, ...]
    notes: tuple[str, ...]

    @property
    def nbytes(self) -> int:
        """Number of bytes of all tensors."""
        return sum(spec.nbytes for spec in self.tensors.values())


class _Span(NamedTuple):
    """Span of elements of one tensor; ``number`` counts the tensor's spans from 0."""

    spec: TensorSpec
    number: int
    begin: int
    end: int

    @property
    def nbytes(self) -> int:
        return (self.end - self.begin) * dtypes.size(self.spec.dtype)


def open_output(output: Path, manifest: Manifest) -> OpenedOutput:
    """Read the headers of an output's weight files, and check all its small files."""
    tensors: dict[str, TensorSpec] = {}
    findings: list[Finding] = []
    for file in manifest.files:
        try:
            specs = _open(output if is_single_file(output) else inside(output, file.name), file)
        except (CheckpointError, OSError) as error:
            findings.append(Finding(file.name, _reason(error, output / file.name)))
            continue
        findings += [Finding(file.name, "is in another file too", name) for name in specs.keys() & tensors.keys()]
        tensors |= specs
    if not findings:  # else it is known already why tensors are missing
        findings += [Finding(output.name, "is missing", name) for name in manifest.tensors.keys() - tensors.keys()]
    findings += [
        Finding(tensors[name].file.name, "is not in the manifest", name)
        for name in sorted(tensors.keys() - manifest.tensors.keys())
    ]
    notes: list[str] = []
    if not is_single_file(output):
        findings += _check_folder(output, manifest, tensors)
        try:
            strangers = list(_strangers(output, manifest))
        except OSError as error:
            strangers = []
            findings.append(Finding(output.name, f"a folder in it can't be read: {error.strerror}"))
        findings += [Finding(name, STRANGER) for name in strangers if not name.startswith(".")]
        notes += [f"{name} {HIDDEN}" for name in strangers if name.startswith(".")]
    own = {name: spec for name, spec in tensors.items() if name in manifest.tensors}
    return OpenedOutput(own, tuple(findings), tuple(notes))


def _open(path: Path, file: RecordedFile) -> Mapping[str, TensorSpec]:
    """Return the tensors of one file, by their names in the output.

    Raises CheckpointError where the file as a whole is not what was written.
    """
    size = path.stat().st_size
    if size != file.size:
        how = "was cut short" if size < file.size else "is longer than it was"
        raise CheckpointError(f"{how}: {size:,} bytes, {file.size:,} were written")
    specs = formats.read_header(path).tensors
    if not all(spec.is_plain for spec in specs.values()):
        raise CheckpointError("holds a tensor that is not laid out as it was written")
    extents = [(spec.offset, spec.offset + spec.nbytes) for spec in specs.values()]
    if frame_digest(path, extents) != file.frame_xxh3_128:
        raise CheckpointError("what lies around its tensors (the header) is not what was written")
    named = {in_folder(folder_of(file.name), name): spec for name, spec in specs.items()}
    return {name: replace(spec, name=name) for name, spec in named.items()}


def _reason(error: CheckpointError | OSError, path: Path) -> str:
    """Return an error's message without the path, which the finding names."""
    if isinstance(error, FileNotFoundError) or not path.exists():
        return "is missing"
    text = error.strerror or str(error) if isinstance(error, OSError) else str(error)
    return text.removeprefix(f"{path.resolve()}: ").removeprefix(f"{path}: ")


def _check_folder(folder: Path, manifest: Manifest, tensors: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """Yield what is wrong with the small files."""
    for name in NOT_SEALED:
        try:
            if os.path.lexists(folder / name):
                inside(folder, name)
        except CheckpointError as error:
            yield Finding(name, _reason(error, folder / name))
    for name, digest in manifest.beside.items():
        try:
            if file_digest(inside(folder, name)) != digest:
                yield Finding(name, "is not what was written")
        except (CheckpointError, OSError) as error:
            yield Finding(name, _reason(error, folder / name))
    for index in indexed_files(file.name for file in manifest.files):
        if index not in manifest.beside:
            yield Finding(index, "is not in the manifest, but there are several files of weights")
        elif (folder / index).exists():
            yield from _check_index(folder, index, tensors)


def _strangers(folder: Path, manifest: Manifest) -> Iterator[str]:
    """Yield the name of each file that doesn't belong to the output, and of each folder without one that does."""
    own = {*(file.name for file in manifest.files), *manifest.beside, *NOT_SEALED}
    folders = {parent.as_posix() for name in own for parent in Path(name).parents}
    unvisited = [folder]
    while unvisited:
        for path in sorted(unvisited.pop().iterdir()):
            name = path.relative_to(folder).as_posix()
            if path.is_dir() and not path.is_symlink():
                if name in folders:
                    unvisited.append(path)
                else:
                    yield f"{name}/"
            elif name not in own:
                yield name


def _check_index(folder: Path, index: str, tensors: Mapping[str, TensorSpec]) -> Iterator[Finding]:
    """Yield each tensor that an index places in another file than the one that holds it."""
    try:
        indexed = weight_map(folder, index)
    except CheckpointError as error:
        yield Finding(index, _reason(error, folder / index))
        return
    stem = index.rpartition("/")[2].partition(".")[0]
    for name, spec in tensors.items():
        if spec.file.parent == (folder / index).resolve().parent and spec.file.name.startswith(f"{stem}-"):
            stored = name.removeprefix(in_folder(folder_of(index), ""))
            if (place := indexed.get(stored)) != spec.file.name:
                yield Finding(index, f"is in {spec.file.name}, the index says {place or 'nothing of it'}", name)


def check_digests(
    output: OpenedOutput,
    manifest: Manifest,
    workers: int,
    advance: Callable[[int], None],
    crew: Crew | None = None,
) -> list[Finding]:
    """Read every tensor of the output and compare the digests of its spans with the manifest's.

    Args:
        output: the output.
        manifest: its manifest.
        workers: number of threads.
        advance: called with the number of bytes that were read.
        crew: workers elsewhere, who read instead.
    """
    span_digests: dict[tuple[str, int], str] = {}
    failed: dict[str, Finding] = {}
    spans: dict[str, list[_Span]] = {}
    for name, spec in output.tensors.items():
        merged = manifest.tensors[name].merged
        cuts = bounds(spec.numel, spec.numel if merged is None else min(merged, spec.numel), spec.dtype)
        spans[name] = [_Span(spec, number, *ends) for number, ends in enumerate(cuts)]
    pool = Pool(workers, [CPU], 1, CHUNK * WIDEST, crew=crew)

    def digest(buffers: WorkerBuffers, reader: Reader, span: _Span) -> tuple[_Span, str | Finding]:
        hashed = xxhash.xxh3_128()
        try:
            for start, count in cut(span.begin, span.end, CHUNK):
                if pool.stopped:
                    break
                hashed.update(buffers.read(reader, 0, span.spec, start, count))
        except RunError as error:
            return span, _finding(span, str(error))
        return span, hashed.hexdigest()

    with tuned_process(with_torch=False):
        tasks = [span for of_tensor in spans.values() for span in of_tensor]
        for span, result in pool.run(tasks, digest, size=lambda span: span.nbytes):
            if isinstance(result, Finding):
                failed[span.spec.name] = result
            else:
                span_digests[span.spec.name, span.number] = result
            advance(span.nbytes)
    findings = list(failed.values())
    for name, of_tensor in spans.items():
        if name not in failed:
            digests = [span_digests[name, span.number] for span in of_tensor]
            findings += _differing(of_tensor, digests, manifest.tensors[name], output.tensors[name])
    return findings


def _differing(spans: list[_Span], digests: list[str], recorded: RecordedTensor, spec: TensorSpec) -> Iterator[Finding]:
    """Yield a finding for each span whose digest is not the recorded one."""
    if (wrong := differing(digests, recorded.output, recorded.spans.output if recorded.spans else None)) is None:
        yield Finding(spec.file.name, "the manifest's digests of its spans don't fit it or each other", spec.name)
    elif spans:
        yield from (_finding(spans[number], "not the bytes that were written") for number in wrong)
    elif wrong:
        yield Finding(spec.file.name, "is empty, the manifest's digest is of something else", spec.name)


def differing(digests: list[str], recorded: str, spans: str | None) -> list[int] | None:
    """Return the numbers of the spans of a tensor whose digests differ; None where the records contradict each other.

    Args:
        digests: of the spans.
        recorded: the tensor's recorded digest.
        spans: the recorded digests of the spans, one after the other; None for a single span.
    """
    if spans is None:
        if len(digests) > 1:
            return None
        return [] if of_spans("".join(digests)) == recorded else [0]
    if of_spans(spans) != recorded or len(spans) != DIGEST * len(digests):
        return None
    return [number for number, digest in enumerate(digests) if spans[DIGEST * number :][:DIGEST] != digest]


def _finding(span: _Span, what: str) -> Finding:
    """Return a finding about a span, with its bytes in the file."""
    size = dtypes.size(span.spec.dtype)
    place = (span.spec.offset + span.begin * size, span.spec.offset + span.end * size)
    return Finding(span.spec.file.name, what, span.spec.name, place)
