"""Differences: the tensors of two models in pairs, before and after tuning, and what tuning added to each."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass

from mergekit_lite import dtypes
from mergekit_lite.checkpoint import Checkpoint, TensorSpec, tied_weights
from mergekit_lite.checkpoint.naming.alignment import names_differ, shown_as
from mergekit_lite.checkpoint.optional_tensors import modules_alone, why_optional
from mergekit_lite.checkpoint.reader import Reader
from mergekit_lite.checkpoint.tokenizer_file import Tokenizer, read_tokenizers
from mergekit_lite.comparison.shared_tensors import tensors_by_name
from mergekit_lite.deferred import torch
from mergekit_lite.errors import NonFiniteError, PlanError, UnreadableError, counted, said_once
from mergekit_lite.planning import vocabularies
from mergekit_lite.planning.matching import REMEDY
from mergekit_lite.planning.tokenizers import foreign_vocabularies
from mergekit_lite.planning.vocabularies import VocabularyError, of_one_vocabulary

READ_ELEMENTS = 1 << 20  # elements read at once: whole chunks of a sparse tensor, whole bytes of signs


@dataclass(frozen=True, slots=True)
class TensorPair:
    """A tensor of the tuned model and the base's; ``base`` is None where the tensor is to be stored whole."""

    name: str
    tuned: TensorSpec
    base: TensorSpec | None

    @property
    def written(self) -> str:
        """Name of the dtype that the tensor has, or would be written in, in the tuned model."""
        return self.tuned.written_as or self.tuned.dtype

    @property
    def stored(self) -> str:
        """Name of the dtype that holds the difference: the models' own where they agree."""
        assert self.base is not None
        return dtypes.promoted((self.tuned.dtype, self.base.dtype))

    @property
    def nbytes(self) -> int:
        """Number of bytes that one reading takes."""
        return self.tuned.nbytes + (self.base.nbytes if self.base else 0)


@dataclass(frozen=True)
class TensorDifference:
    """What tuning added to a tensor, read block by block."""

    pair: TensorPair
    reader: Reader

    def blocks(self) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
        """Yield the index of each block's first element, the base's block and the tuned model's: 1-D, float64.

        Raises:
            RunError: a file can't be read.
            NonFiniteError: a value is NaN or infinite.
        """
        assert self.pair.base is not None
        for start in range(0, self.pair.tuned.numel, READ_ELEMENTS):
            count = min(READ_ELEMENTS, self.pair.tuned.numel - start)
            blocks = []
            for spec in (self.pair.base, self.pair.tuned):
                values = spec.elements(self.reader, start, count).double()
                if not bool(torch.isfinite(values).all()):
                    raise NonFiniteError(f"NaN or infinity in {spec.name} ({spec.file}): it has no difference.")
                blocks.append(values)
            yield start, blocks[0], blocks[1]

    def deltas(self) -> Iterator[tuple[int, torch.Tensor]]:
        """Yield the index of each block's first element, and tuned − base of the block: 1-D, float64."""
        for start, base, tuned in self.blocks():
            yield start, tuned.sub_(base)

    @property
    def is_empty(self) -> bool:
        """True where both tensors are the same bytes, so that nothing is to be stored."""
        assert self.pair.base is not None
        if self.pair.base.dtype != self.pair.tuned.dtype or self.pair.written != self.pair.tuned.dtype:
            return False
        numel = self.pair.tuned.numel
        for start in range(0, numel, READ_ELEMENTS):
            count = min(READ_ELEMENTS, numel - start)
            before, after = (spec.elements(self.reader, start, count) for spec in (self.pair.base, self.pair.tuned))
            if not torch.equal(bits(before), bits(after)):
                return False
        return True


def bits(values: torch.Tensor) -> torch.Tensor:
    """Return the bytes of a 1-D tensor as uint8."""
    return values.contiguous().view(torch.uint8)


def pair_tensors(base: Checkpoint, tuned: Checkpoint) -> tuple[list[TensorPair], list[str], list[str]]:
    """Pair the tensors of two models by their names, which are the base's.

    A head that one model ties to its embedding is paired with that embedding.

    Returns:
        The pairs in the order of the tuned model's files, notes for the user, and problems.

    Raises:
        CheckpointError: a model's name can't be put into a manifest.
    """
    for model in (base, tuned):
        model.check_names()
    tuned = shown_as(tuned, base)
    kept = modules_alone(base.tensors, base.config, tuned.tensors, tuned.config)
    left_out = modules_alone(tuned.tensors, tuned.config, base.tensors, base.config)
    pairs: list[TensorPair] = []
    notes = [*base.notes, *tuned.notes]
    of_tensors: list[tuple[str, str]] = []
    missing: list[tuple[str, str]] = []
    alone: Counter[str] = Counter()
    is_tuned = False  # whether any tensor has the shape of the base's
    for name, (after, before) in tensors_by_name((tuned, base)):
        why = before and why_optional(name, before, base.tensors, base.config_of(name)) if after is None else None
        if why:
            of_tensors.append((name, f"{why}; only {base.reference} has it, and models made with the vector keep it"))
        elif after is None and name in kept:
            alone[f"{kept[name]}: only {base.reference} has it, and models made with the vector keep it"] += 1
        elif before is None and name in left_out:
            alone[f"{left_out[name]}: only {tuned.reference} has it, so it is no part of the vector"] += 1
        elif after is None:
            missing.append((name, f"is in {base.reference}, but not in {tuned.reference}"))
        else:
            is_tuned |= before is not None and after.shape == before.shape
            whole, note = _is_whole(name, after, before, base, tuned)
            pairs.append(TensorPair(name, after, None if whole else before))
            of_tensors += [(name, note)] * bool(note)
    notes += said_once(of_tensors)
    notes += [f"{note} ({counted(number, 'tensor')})" for note, number in alone.items()]
    problem = names_differ(tuned, base) if missing else None
    if pairs and not missing and not is_tuned:
        problem = f"no tensor of {tuned.reference} has the shape that it has in {base.reference}: nothing to subtract"
    return pairs, notes, [problem] if problem else said_once(missing)


def by_token(
    base: Checkpoint, tuned: Checkpoint, order: str | None
) -> tuple[Checkpoint, Checkpoint, Tokenizer | None, list[str]]:
    """Return both models with the rows of one of them, ``base`` or ``tuned``; by default as they are.

    A row whose token only one of the two has is a difference from zeros.

    Returns:
        The models, whose tokens the rows of their difference are, where that is known, and notes for the user.

    Raises:
        PlanError: a model has no tokenizer to tell its tokens, or embedding and head with different rows.
        CheckpointError: a tokenizer can't be read.
    """
    models = (base, tuned) if order is None else (base, shown_as(tuned, base))
    try:
        read = read_tokenizers(models)
        if of_one_vocabulary(models, read, all_told=False):
            return base, tuned, read[0] or read[1], []
        if order is not None:
            number = ("base", "tuned").index(order)
            changed, notes = vocabularies.by_token(models, read, number)
            return changed[0], changed[1], read[number], notes
    except VocabularyError as error:
        raise PlanError([str(error)]) from error
    except UnreadableError as error:
        if order is not None:
            raise
        return base, tuned, None, [f"{error} Whether the vocabularies agree can't be told"]
    contrary, more = foreign_vocabularies([tuned], base)
    return base, tuned, None, [*(f"{text}; rows are subtracted as they stand: {REMEDY}" for text in contrary), *more]


def _is_whole(
    name: str, after: TensorSpec, before: TensorSpec | None, base: Checkpoint, tuned: Checkpoint
) -> tuple[bool, str]:
    """Decide whether a tensor is stored whole, not as a difference; and return a note for the user, or an empty one."""
    if before is None:
        return True, f"only {tuned.reference} has it; it is stored whole"
    if after.shape != before.shape:
        remedy = f": {REMEDY}" if tied_weights.is_vocabulary(name) and after.shape[1:] == before.shape[1:] else ""
        return True, f"is {list(after.shape)}, but {list(before.shape)} in {base.reference}; it is stored whole{remedy}"
    if not (dtypes.is_float(after.dtype) and dtypes.is_float(before.dtype)):
        return after.dtype != before.dtype, ""
    if before.name != name:
        return False, f"{base.reference} ties it to {before.name}; the difference from that is stored"
    if after.name != name and not tied_weights.is_head(name):
        return False, f"{tuned.reference} ties it to {after.name}; the difference of that is stored"
    if after.name != name:
        return False, f"{tuned.reference} ties it to {after.name}; models made with the vector are untied"
    return False, ""
