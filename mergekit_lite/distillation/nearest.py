"""The prompts of a pool that are nearest to target prompts: data-efficient finetuning by cross-task neighbours.

Each of the target prompts has its k nearest prompts of the pool, and all of these together are kept (Ivison et al.
2023, arXiv 2212.00196, who search an approximate index; here distances are exact). Embeddings that a model makes lie
in ``embeddings/``, block by block, under a digest of model and texts: what is there isn't made again.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from io import BytesIO
from pathlib import Path
from typing import Any

import numpy as np
from xxhash import xxh3_128_hexdigest

from mergekit_lite.answers.embedding import Embedder
from mergekit_lite.answers.prompts import LoadedPrompts, Prompts, load
from mergekit_lite.answers.rows import Prompt, write_lines
from mergekit_lite.distillation.recipe.choosing import ChosenPrompts, Nearest
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.training.workspace import WEIGHTS, identity
from mergekit_lite.errors import UnreadableError, UsageError, counted, listing
from mergekit_lite.input_files import opened

TEXTS = 256  # of a file of embeddings
BLOCK = 4096  # prompts of the pool that a product of matrices takes at once
CELLS = 1 << 25  # distances that are in memory at once
SLACK = 1e-10  # bound of the error of such products, relative to the squared lengths: d · ε of d dimensions, and more
SHOWN = 5
MOST = 1e100  # of an embedding's numbers, whose squares are added; NaN is no less
MODEL_FILES = (*WEIGHTS, "config.json", "tokenizer*", "vocab*", "spiece.model")


def pool_of(entry: ChosenPrompts) -> LoadedPrompts:
    """Return the prompts of a source, of which some may be chosen.

    Those that lack an embedding in the column of ``nearest`` become problems.

    Raises:
        UsageError: the data can't be read, or have no such column.
    """
    return _read([entry], None if entry.nearest is None else entry.nearest.column)


def nearest_prompts(
    entry: ChosenPrompts, pool: LoadedPrompts, folder: Path, reporter: Reporter, *, plan: bool
) -> list[Prompt]:
    """Return the prompts of a pool that are among the nearest of the source's targets, in the order of the data.

    Args:
        entry: the source, with ``nearest``.
        pool: its prompts.
        folder: of the embeddings that a model makes.
        reporter: is told of the progress and the number of prompts that are kept.
        plan: embed nothing; where embeddings are missing, as many prompts as there can be stand for the nearest ones.

    Raises:
        UsageError: the target prompts can't be read, there is none, or embeddings have different lengths.
        CheckpointError: the model can't be loaded.
        RunError: the embeddings can't be made or written.
    """
    nearest = entry.nearest
    assert nearest is not None
    where = entry.path.name if entry.path else str(entry.dataset)
    targets = _read(nearest.to, nearest.column)
    if not targets.prompts:
        reasons = targets.problems[:SHOWN] or ["the data have no rows"]
        raise UsageError(listing(f"There is no target prompt whose neighbours in {where} are wanted", reasons))
    if targets.problems:
        left_out = f"{counted(len(targets.problems), 'row')} of the target prompts left out"
        reporter.warn(listing(left_out, targets.problems, SHOWN))
    if not pool.prompts:
        return []
    kept = _places(nearest, pool.prompts, targets.prompts, where, folder, reporter, plan)
    return [_without(pool.prompts[place], entry, nearest.column) for place in kept]


def _places(
    nearest: Nearest,
    pool: Sequence[Prompt],
    targets: Sequence[Prompt],
    where: str,
    folder: Path,
    reporter: Reporter,
    plan: bool,
) -> Sequence[int]:
    """Return the places of the prompts that are kept, and tell their number."""
    of_pool, of_targets = counted(len(pool), "prompt"), counted(len(targets), "target prompt")
    if nearest.column is not None:
        vectors = [_of_column(prompts, nearest.column) for prompts in (pool, targets)]
        if vectors[0].shape[1] != vectors[1].shape[1]:
            lengths = " and ".join(f"{each.shape[1]:,}" for each in vectors)
            raise UsageError(f"Embeddings of {where} and of its target prompts have different lengths: {lengths}.")
    else:
        embeddings = _Embeddings(nearest, folder)
        named = ((pool, where), (targets, "target prompts"))
        vectors = [each for some, what in named if (each := embeddings.of(some, what, reporter, plan)) is not None]
        embeddings.embedder.close()
        if len(vectors) < len(named):
            most = min(len(pool), nearest.k * len(targets))
            reporter.line(
                f"{where}: at most {most:,} of {of_pool} will be kept, the {nearest.k:,} nearest of {of_targets}; "
                "the first ones stand for them here, as the stage `sample` embeds them"
            )
            return range(most)
        if cut := embeddings.embedder.cut:
            limit = embeddings.embedder.most
            reporter.line(f"{where}: {counted(cut, 'text')} cut to {limit:,} tokens for the embedding")
    kept = places_of_nearest(vectors[0], vectors[1], nearest.k, nearest.distance)
    reporter.line(f"{where}: {len(kept):,} of {of_pool} kept: the {nearest.k:,} nearest of {of_targets}, each once")
    return kept


def places_of_nearest(pool: np.ndarray, targets: np.ndarray, k: int, distance: str) -> list[int]:
    """Return the places of all that is among the ``k`` nearest of any target, rising.

    Args:
        pool: an embedding a row (prompts × dimensions), of any float type; so are the targets.
        targets: the targets' embeddings (targets × dimensions).
        k: how many each target has, of equally near ones the earlier.
        distance: ``euclidean``, or ``cosine``, which is the Euclidean one of embeddings of length 1.
    """
    kept: set[int] = set()
    at_once = max(1, CELLS // len(pool))
    for start in range(0, len(targets), at_once):
        some = _scaled(targets[start : start + at_once], distance)
        away, slack = np.empty((len(some), len(pool))), np.empty(len(pool))
        for first in range(0, len(pool), BLOCK):
            block = _scaled(pool[first : first + BLOCK], distance)
            squares = (block**2).sum(1)
            # |x − t|² without |t|², which is the same for all of a target's neighbours.
            away[:, first : first + BLOCK] = squares - 2 * some @ block.T
            slack[first : first + BLOCK] = SLACK * squares
        for target, near in zip(some, away, strict=True):
            error = slack + SLACK * float(target @ target)
            bound = np.partition(near + error, k - 1)[k - 1] if k < len(pool) else np.inf
            candidates = np.flatnonzero(near - error <= bound)
            # By differences equal embeddings are equally far, and the earlier one comes first.
            exact = ((_scaled(pool[candidates], distance) - target) ** 2).sum(1)
            kept.update(candidates[np.argsort(exact, kind="stable")[:k]].tolist())
    return sorted(kept)


def _scaled(vectors: np.ndarray, distance: str) -> np.ndarray:
    vectors = vectors.astype(np.float64)
    if distance == "euclidean":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)


def _read(sources: Sequence[Prompts], column: str | None) -> LoadedPrompts:
    """Return the prompts of sources. Those without an embedding, where a column has it, become problems."""
    if column is None:
        return load(sources)
    loaded = load(_keeping(source, column) for source in sources)
    lacking = [prompt for prompt in loaded.prompts if not _is_vector(prompt.columns.get(column))]
    loaded.problems += [f"{loaded.places[each.id]}: the column {column!r} is no list of numbers" for each in lacking]
    left_out = {prompt.id for prompt in lacking}
    loaded.prompts = [prompt for prompt in loaded.prompts if prompt.id not in left_out]
    return loaded


def _keeping(source: Prompts, column: str) -> Prompts:
    if source.keep == "all" or column in source.keep:
        return source
    return source.model_copy(update={"keep": (*source.keep, column)})


def _is_vector(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST


def _without(prompt: Prompt, entry: ChosenPrompts, column: str | None) -> Prompt:
    """Return a prompt without its embedding, which no later stage reads; unless ``keep`` names it."""
    if column is None or (entry.keep != "all" and column in entry.keep):
        return prompt
    columns: Mapping[str, Any] = {name: value for name, value in prompt.columns.items() if name != column}
    return replace(prompt, columns=columns)


class _Embeddings:
    """Embeddings that a model makes of prompts, in files of ``TEXTS`` prompts each."""

    def __init__(self, nearest: Nearest, folder: Path):
        assert nearest.model is not None  # the recipe was checked
        self.folder = folder
        self.embedder = Embedder(nearest.model, nearest.max_length, nearest.batch_size, nearest.device, nearest.dtype)
        self._said = [identity(nearest.model, MODEL_FILES), nearest.max_length, nearest.dtype]

    def of(self, prompts: Sequence[Prompt], what: str, reporter: Reporter, plan: bool) -> np.ndarray | None:
        """Return an embedding a row (prompts × dimensions, float32). Those that are not there yet are made.

        With ``plan`` none is made: it returns None where one is missing. Raises as ``Embedder.embed``; and RunError
        where they can't be written.
        """
        files = list(self._files(prompts))
        vectors = {path: stored for texts, path in files if (stored := _stored(path, len(texts))) is not None}
        absent = [(texts, path) for texts, path in files if path not in vectors]
        if absent and plan:
            return None
        if absent:
            number = sum(len(texts) for texts, _ in absent)
            with reporter.progress(f"embedding {what}", len(prompts), len(prompts) - number) as advance:
                for texts, path in absent:
                    vectors[path] = self._made(texts, path)
                    advance(len(texts))
        return np.concatenate([vectors[path] for _, path in files])

    def _made(self, texts: Sequence[str], path: Path) -> np.ndarray:
        vectors, file = self.embedder.embed(texts), BytesIO()
        np.save(file, vectors, allow_pickle=False)
        write_lines(path, [file.getvalue()])
        return vectors

    def _files(self, prompts: Sequence[Prompt]) -> Iterator[tuple[list[str], Path]]:
        """Yield texts that are embedded together, and the file of their embeddings."""
        texts = ["\n\n".join(message["content"] for message in prompt.messages) for prompt in prompts]
        for start in range(0, len(texts), TEXTS):
            some = texts[start : start + TEXTS]
            yield some, self.folder / f"{xxh3_128_hexdigest(json.dumps([*self._said, some]).encode())}.npy"


def _stored(path: Path, number: int) -> np.ndarray | None:
    """Return the embeddings in a file; None where it isn't there, or was damaged."""
    try:
        with opened(path) as file:
            vectors: np.ndarray = np.load(file, allow_pickle=False)
    except (UnreadableError, OSError, ValueError, EOFError):
        return None
    sound = vectors.ndim == 2 and len(vectors) == number and vectors.dtype == np.float32 and np.isfinite(vectors).all()
    return vectors if sound else None


def _of_column(prompts: Sequence[Prompt], column: str) -> np.ndarray:
    """Return the embeddings that a column of the data has (prompts × dimensions, float64).

    Raises:
        UsageError: their lengths differ.
    """
    lengths = Counter(len(prompt.columns[column]) for prompt in prompts)
    if len(lengths) > 1:
        listed = [f"{counted(number, 'prompt')} with {length:,} numbers" for length, number in lengths.items()]
        raise UsageError(listing(f"Embeddings in the column {column!r} have different lengths", listed))
    return np.array([prompt.columns[column] for prompt in prompts], np.float64)
