"""X-Token's projection (2605.21699): what each of a student's tokens is in a teacher's vocabulary.

The text of a student's token, cut by the teacher's tokenizer into pieces, has weights of .9·.1ⁱ on them (i = 0, 1, …).
The teacher's tokens, cut by the student's tokenizer, add theirs the other way. Rows are normalised. A token that both
have has weight 1 on it and no other. Each row keeps its largest entries.

Otherwise than there: the rest of a row that is cut is normalised again, so that the projection of probabilities keeps
their sum; special tokens go by their role and their text, not by the likeness of their names. The published code's
``scale trick``, one more column that is trained, is left out: its details aren't verified.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from mergekit_lite.checkpoint.tokenizer_file import BYTE_LEVEL, WORD, Alphabet
from mergekit_lite.distillation.alignment.spelling import Spelling, spelling_of
from mergekit_lite.distillation.alignment.vocabulary import NOBODY, Projection, exact_map

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

FIRST, NEXT = 0.9, 0.1
WRITTEN = {byte: character for character, byte in BYTE_LEVEL.items()}
AT_ONCE = 16_384


def projection(
    student: PreTrainedTokenizerBase,
    teacher: PreTrainedTokenizerBase,
    entries: int = 4,
    *,
    rows: int | None = None,
    width: int | None = None,
) -> Projection:
    """Return W, (V_student, entries).

    A row is empty where the student has no token or a special one that the teacher lacks, or where neither tokenizer
    can spell the other's.

    Args:
        student: its tokenizer, of the package tokenizers.
        teacher: likewise.
        entries: the most of a row, of the pieces of a token, too.
        rows: of the student's head, where it has more than its tokenizer has tokens.
        width: of the teacher's, likewise.

    Raises:
        ValueError: a tokenizer isn't of the package tokenizers.
    """
    own, other = spelling_of(student), spelling_of(teacher)
    height = max(own.rows, rows or 0)
    exact = exact_map(teacher, student, rows=height).student_ids
    forth = _weighted(_pieces(own, teacher), entries)
    back = _weighted(_pieces(other, student), entries)
    row, column, weight = (np.concatenate(pair) for pair in zip(forth, (back[1], back[0], back[2]), strict=True))
    usual = exact[row] == NOBODY
    usual &= ~np.isin(row, list(own.special)) & ~np.isin(column, list(other.special))
    row, column, weight = _summed(row[usual], column[usual], weight[usual], other.rows)
    pinned = np.flatnonzero(exact != NOBODY)
    row, column = np.concatenate([row, pinned]), np.concatenate([column, exact[pinned]])
    ids, weights = _largest(row, column, np.concatenate([weight, np.ones(len(pinned))]), height, entries)
    return Projection(ids, weights, max(other.rows, width or 0))


Triples = tuple["npt.NDArray[np.int64]", "npt.NDArray[np.int64]", "npt.NDArray[np.float64]"]


def _weighted(pieces: Iterable[tuple[int, Sequence[int]]], entries: int) -> Triples:
    """Return tokens, their pieces and the weights of these."""
    token: list[int] = []
    piece: list[int] = []
    weight: list[float] = []
    weights = [FIRST * NEXT**place for place in range(entries)]
    for number, cut in pieces:
        first = cut[:entries]
        token += [number] * len(first)
        piece += first
        weight += weights[: len(first)]
    return np.array(token, np.int64), np.array(piece, np.int64), np.array(weight, np.float64)


def _summed(
    row: npt.NDArray[np.int64], column: npt.NDArray[np.int64], weight: npt.NDArray[np.float64], width: int
) -> Triples:
    """Add up the weights of equal places."""
    places, which = np.unique(row * width + column, return_inverse=True)
    return places // width, places % width, np.bincount(which, weight, len(places)).astype(np.float64)


def _largest(
    row: npt.NDArray[np.int64],
    column: npt.NDArray[np.int64],
    weight: npt.NDArray[np.float64],
    height: int,
    entries: int,
) -> tuple[npt.NDArray[np.int32], npt.NDArray[np.float32]]:
    """Keep the largest entries of each row, of equal ones those of lower ids, and make their sum 1."""
    order = np.lexsort((column, -weight, row))
    row, column, weight = row[order], column[order], weight[order]
    rank = np.arange(len(row)) - np.searchsorted(row, row)
    kept = rank < entries
    row, column, weight, rank = row[kept], column[kept], weight[kept], rank[kept]
    ids = np.full((height, entries), NOBODY, np.int32)
    weights = np.zeros((height, entries), np.float32)
    ids[row, rank] = column
    weights[row, rank] = weight / np.bincount(row, weight, height)[row]
    return ids, weights


def _pieces(spelling: Spelling, by: PreTrainedTokenizerBase) -> Iterable[tuple[int, Sequence[int]]]:
    """Yield each token that spells a text with its pieces by another tokenizer, none of them its unknown token."""
    core: Any = getattr(by, "backend_tokenizer", None)
    if core is None:
        raise ValueError(f"{by.name_or_path or type(by).__name__} isn't a tokenizer of the package tokenizers")
    tokens = [(token, readings[0]) for token in range(spelling.rows) if (readings := spelling.readings(token))]
    other = spelling_of(by)
    for start in range(0, len(tokens), AT_ONCE):
        block = tokens[start : start + AT_ONCE]
        for (token, _), cut in zip(block, _cut([data for _, data in block], other, core), strict=True):
            if cut and other.unknown not in cut:
                yield token, cut


def _cut(block: Sequence[bytes], spelling: Spelling, core: Any) -> list[list[int]]:
    """Cut bytes into the tokens of a tokenizer.

    SentencePiece's model alone does it: as a whole the tokenizer would write a blank before each. A byte-level one does
    as it does with texts, and with bytes that are no text by its model alone.
    """
    model, texts = core.model, [_text(data) for data in block]
    if spelling.alphabet is Alphabet.WORDS:
        written = [None if text is None else text.replace(" ", WORD) for text in texts]
        cut = [[] if text is None else [piece.id for piece in model.tokenize(text)] for text in written]
    else:
        cut = [each.ids for each in core.encode_batch_fast([text or "" for text in texts], add_special_tokens=False)]
    for place in (place for place, text in enumerate(texts) if text is None):
        if spelling.alphabet is Alphabet.BYTES:
            cut[place] = [piece.id for piece in model.tokenize(block[place].decode("latin-1").translate(WRITTEN))]
        else:
            numbers = [spelling.numbers.get(bytes([byte])) for byte in block[place]]
            cut[place] = [number for number in numbers if number is not None] if None not in numbers else []
    return cut


def _text(data: bytes) -> str | None:
    try:
        return data.decode()
    except UnicodeDecodeError:
        return None
