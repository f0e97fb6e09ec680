"""Embeddings of prompts, which a column of the data has or a model makes.

Those that a model makes lie in ``embeddings/``, block by block, under a digest of model and texts: what is there isn't
made again.
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
from mergekit_lite.distillation.recipe.choosing import ChosenPrompts, Embedded
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.training.workspace import WEIGHTS, identity
from mergekit_lite.errors import UnreadableError, UsageError, counted, listing
from mergekit_lite.input_files import opened

TEXTS = 256  # of a file of embeddings
MOST = 1e100  # of an embedding's numbers, whose squares are added; NaN is no less
MODEL_FILES = (*WEIGHTS, "config.json", "tokenizer*", "vocab*", "spiece.model")


def with_embeddings(sources: Sequence[Prompts], columns: Sequence[str]) -> LoadedPrompts:
    """Return the prompts of sources. Those without an embedding in each of the columns become problems.

    Raises:
        UsageError: the data can't be read, or have no such column.
    """
    loaded = load(_keeping(source, columns) for source in sources)
    for column in columns:
        lacking = [prompt for prompt in loaded.prompts if not _is_vector(prompt.columns.get(column))]
        loaded.problems += [
            f"{loaded.places[each.id]}: the column {column!r} is no list of numbers" for each in lacking
        ]
        left_out = {prompt.id for prompt in lacking}
        loaded.prompts = [prompt for prompt in loaded.prompts if prompt.id not in left_out]
    return loaded


def without_embeddings(prompt: Prompt, entry: ChosenPrompts) -> Prompt:
    """Return a prompt without its embeddings, which no later stage reads; unless ``keep`` names them."""
    gone = {column for column in entry.embedding_columns if entry.keep == "all" or column not in entry.keep}
    if not gone & prompt.columns.keys():
        return prompt
    columns: Mapping[str, Any] = {name: value for name, value in prompt.columns.items() if name not in gone}
    return replace(prompt, columns=columns)


def embeddings(
    keys: Embedded, named: Sequence[tuple[Sequence[Prompt], str]], folder: Path, reporter: Reporter, *, plan: bool
) -> list[np.ndarray] | None:
    """Return an embedding a row for each of several sequences of prompts, which all have the same length.

    Args:
        keys: the column or the model.
        named: prompts, and what they are called in messages.
        folder: of the embeddings that a model makes.
        reporter: is told of the progress, and of texts that were cut.
        plan: make none, and return None where one is missing.

    Raises:
        UsageError: embeddings of a column have different lengths.
        CheckpointError: the model can't be loaded.
        RunError: the embeddings can't be made or written.
    """
    if keys.column is not None:
        vectors = [_of_column(prompts, keys.column) for prompts, _ in named]
        if len({each.shape[1] for each in vectors}) > 1:
            lengths = " and ".join(f"{each.shape[1]:,}" for each in vectors)
            whose = " and of its ".join(what for _, what in named)
            raise UsageError(f"Embeddings of {whose} have different lengths: {lengths}.")
        return vectors
    made = _Embeddings(keys, folder)
    found = [made.of(prompts, what, reporter, plan) for prompts, what in named]
    made.embedder.close()
    there = [each for each in found if each is not None]
    if len(there) < len(named):
        return None
    if cut := made.embedder.cut:
        limit = made.embedder.most
        reporter.line(f"{named[0][1]}: {counted(cut, 'text')} cut to {limit:,} tokens for the embedding")
    return there


def scaled(vectors: np.ndarray, distance: str) -> np.ndarray:
    """Return embeddings in float64, of length 1 where the distance is ``cosine``; zeros stay zeros."""
    vectors = vectors.astype(np.float64)
    if distance == "euclidean":
        return vectors
    lengths = np.linalg.norm(vectors, axis=1, keepdims=True)
    return vectors / np.where(lengths == 0, 1, lengths)


def _keeping(source: Prompts, columns: Sequence[str]) -> Prompts:
    if source.keep == "all":
        return source
    return source.model_copy(update={"keep": tuple(dict.fromkeys((*source.keep, *columns)))})


def _is_vector(value: object) -> bool:
    return isinstance(value, list) and bool(value) and all(map(_is_number, value))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < MOST


class _Embeddings:
    """Embeddings that a model makes of prompts, in files of ``TEXTS`` prompts each."""

    def __init__(self, keys: Embedded, folder: Path):
        assert keys.model is not None  # the recipe was checked
        self.folder = folder
        self.embedder = Embedder(keys.model, keys.max_length, keys.batch_size, keys.device, keys.dtype)
        self._said = [identity(keys.model, MODEL_FILES), keys.max_length, keys.dtype]

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
