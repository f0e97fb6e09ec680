"""A changed tensor for any run of its elements: ``base + Σ term``, in float64, rounded once to the tensor's dtype.

Every element is computed from its own numbers alone and in the order of the terms, so no cut shows in the bytes.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mergekit_lite import dtypes
from mergekit_lite.checkpoint.change import CHUNK, Change, Dense, LowRank, Replace, Signs, Sparse
from mergekit_lite.checkpoint.folding import add_product
from mergekit_lite.checkpoint.pieces import by_rows, pieces
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.deferred import np, torch
from mergekit_lite.errors import RunError

if TYPE_CHECKING:
    from mergekit_lite.checkpoint.reader import Reader


def add_up(reader: Reader, spec: TensorSpec, start: int, out: torch.Tensor) -> None:
    """Fill ``out`` (``spec.dtype``) with the elements ``start …`` of a changed tensor.

    Raises:
        RunError: a file can't be read, or the index of a sparse term is damaged.
    """
    assert spec.change is not None
    for begin, piece in pieces(start, out):
        piece.copy_(_sum(reader, spec.change, spec.shape, begin, piece.numel()))


def _sum(reader: Reader, change: Change, shape: tuple[int, ...], begin: int, count: int) -> torch.Tensor:
    if change.base is None:
        total = torch.zeros(count, dtype=torch.float64)
    else:
        total = _values(reader, change.base, begin, count)
    for term in change.terms:
        match term:
            case LowRank():
                add_product(reader, term, begin, total)
            case Dense():
                total += _values(reader, term.values, begin, count).mul_(term.scale)
            case Sparse():
                _add_sparse(reader, term, begin, total)
            case Signs():
                _add_signs(reader, term, shape, begin, total)
            case Replace():
                target = _values(reader, term.target, begin, count)
                total += target.sub_(_values(reader, term.origin, begin, count)).mul_(term.scale)
    return total


def _values(reader: Reader, spec: TensorSpec, begin: int, count: int) -> torch.Tensor:
    return _stored(reader, spec, begin, count).double()


def _stored(reader: Reader, spec: TensorSpec, begin: int, count: int) -> torch.Tensor:
    stored = torch.empty(count, dtype=dtypes.torch_dtype(spec.dtype))
    reader.read(spec, begin, stored)
    return stored


def _add_sparse(reader: Reader, term: Sparse, begin: int, total: torch.Tensor) -> None:
    """Add the kept values. To a zero they are not added but put in its place, so that −0 is told from 0."""
    first, last = begin // CHUNK, -(-(begin + len(total)) // CHUNK)
    starts = _stored(reader, term.starts, first, last - first + 1)
    counts = starts.diff()
    inside = int(starts[0]) >= 0 and int(starts[-1]) <= term.values.numel
    if not inside or int(counts.min()) < 0 or int(counts.max()) > CHUNK:
        raise _damaged(term)
    low, kept = int(starts[0]), int(starts[-1] - starts[0])
    chunks = torch.repeat_interleave(torch.arange(first, last), counts)
    index = _stored(reader, term.places, low, kept).to(torch.int64) + chunks * CHUNK
    if kept and int(index.diff().min() if kept > 1 else 1) <= 0:
        raise _damaged(term)
    wanted = (index >= begin) & (index < begin + len(total))
    index, values = index[wanted] - begin, _values(reader, term.values, low, kept).mul_(term.scale)[wanted]
    before = total[index]
    total[index] = torch.where(before == 0, values, before + values)


def _damaged(term: Sparse) -> RunError:
    return RunError(
        f"{term.starts.file}: tensor {term.starts.name!r} doesn't count what is there. The file is damaged."
    )


def _add_signs(reader: Reader, term: Signs, shape: tuple[int, ...], begin: int, total: torch.Tensor) -> None:
    skipped = begin % 8
    stored = _stored(reader, term.bits, begin // 8, -(-(skipped + len(total)) // 8))
    positive = np.unpackbits(stored.numpy(), bitorder="little")[skipped : skipped + len(total)]
    signs = torch.from_numpy(positive).double().mul_(2).sub_(1)
    for row, column, part in by_rows(begin, total, columns := shape[-1] if shape else 1):
        sizes = _values(reader, term.sizes, row, len(part)).mul_(term.scale)
        at = row * columns + column - begin
        part += signs[at : at + part.numel()].view(part.shape).mul_(sizes[:, None])
