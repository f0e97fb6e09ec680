"""A taught row as bytes: at most 300 a token for the 128 likeliest of 152,000 tokens, the largest ones exact.

The 128 ids alone, 18 bits each, would take 288. But their order follows from their log-probabilities, so it need not be
told: as an ascending list they take 12 bits each by Elias and Fano's code, the low bits as they are and the high ones
as a row of ones among as many zeros as there are steps (Elias 1974). The few likeliest tokens are told apart, with
log-probabilities in float16: of numbers from −32 to 0 it keeps eight times as much as bfloat16. Those of the others are
levels between the largest and the least of them, evenly spaced in p^⅛, for an error of a log-probability costs as much
as the token is likely. So each is as near as its level is wide, whatever the distribution, which no fitted curve says.
The bits that a smaller vocabulary saves make more levels.

Beside each distribution lies its tail's mass. What is decoded is scaled to leave just that, so its sum is never more
than 1. The tokens of the text have their own log-probabilities in float32. ``docs/distill.md`` has the errors measured.
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mergekit_lite.distillation.teaching.rows import TaughtRow

HEADER = struct.Struct("<IIHBBBB")  # positions, vocabulary, K, exact, bits of a level, bits of a step of ends, ragged
MOST_POSITIONS = 1 << 24
MOST_TOP = (1 << 16) - 1
ALL_EXACT = 16  # K up to which every log-probability is told apart
LEAST_EXACT, MOST_EXACT = 4, 16
LEAST_BITS, MOST_BITS = 4, 8  # of a level
BUDGET = 18.125  # bits for each of K, which more exact ones and more levels may fill
SPACING = 0.125  # levels are evenly spaced in p to this power
AT_ONCE = 1 << 12  # positions in memory as single bits; a multiple of 8, so that each lot begins with a byte
LEAST = -60_000.0  # a float16 has no log-probability much below
MARGIN = 1e-6  # that a decoded sum stays below what it should be: more than rounding to float32 can add

Bits = npt.NDArray[np.uint8]  # each 0 or 1
Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]


class DecodingError(ValueError):
    """Bytes are no taught row."""


@dataclass(frozen=True)
class Layout:
    """How a distribution over ``vocabulary`` tokens is written by its ``top`` likeliest.

    Attributes:
        exact: of these are told apart.
        bits: of the level of each other one.
    """

    vocabulary: int
    top: int
    exact: int
    bits: int

    @classmethod
    def of(cls, vocabulary: int, top: int) -> Layout:
        """Return the most exact layout within ``BUDGET``, or the least one."""
        if top <= ALL_EXACT:
            return cls(vocabulary, top, top, 0)
        layout = cls(vocabulary, top, LEAST_EXACT, LEAST_BITS)
        finer = [cls(vocabulary, top, LEAST_EXACT, bits) for bits in range(LEAST_BITS, MOST_BITS + 1)]
        layout = max((each for each in finer if each.size <= BUDGET * top), key=lambda each: each.bits, default=layout)
        more = [cls(vocabulary, top, exact, layout.bits) for exact in range(LEAST_EXACT, MOST_EXACT + 1)]
        return max((each for each in more if each.size <= BUDGET * top), key=lambda each: each.exact, default=layout)

    @property
    def id_bits(self) -> int:
        """The bits of an id."""
        return max(1, (self.vocabulary - 1).bit_length())

    @property
    def others(self) -> int:
        """How many tokens have levels."""
        return self.top - self.exact

    @property
    def low_bits(self) -> int:
        """The bits of an id in the ascending list that are written as they are."""
        return max(0, (self.vocabulary // self.others).bit_length() - 1) if self.others else 0

    @property
    def high_bits(self) -> int:
        """The bits that hold the rest of all ids in the ascending list."""
        return self.others + ((self.vocabulary - 1) >> self.low_bits) + 1 if self.others else 0

    @property
    def widths(self) -> tuple[int, int, int, int, int]:
        """The bits of the exact ids, the floats, the low and high parts of the others' ids, and their levels."""
        floats = 0 if not self.top else self.exact + 1 + (2 if self.others else 0)
        lows = self.others * self.low_bits
        return self.exact * self.id_bits, 16 * floats, lows, self.high_bits, self.others * self.bits

    @property
    def size(self) -> int:
        """The bits of a distribution."""
        return sum(self.widths)


def encode(row: TaughtRow, vocabulary: int) -> bytes:
    """Return a row as bytes, without its key.

    Args:
        row: what the teacher says; log-probabilities of −inf end a distribution of fewer than K tokens.
        vocabulary: a number that all its ids are below.

    Raises:
        ValueError: an array's shape, an id or a log-probability is none of such a row.
    """
    _check(row, vocabulary)
    positions, top = row.top_ids.shape
    layout = Layout.of(vocabulary, top)
    counts = np.isfinite(row.top_log_probs).sum(1)
    ragged = bool((counts < top).any())
    steps = np.diff(row.ends, prepend=0)
    step_bits = int(steps.max(initial=0)).bit_length()
    parts = [
        HEADER.pack(positions, vocabulary, top, layout.exact, layout.bits, step_bits, ragged),
        _packed(_to_bits(row.tokens[:, None], layout.id_bits)),
        _packed(_to_bits(steps[:, None], step_bits)),
        row.log_probs.astype("<f4").tobytes(),
    ]
    if ragged:
        parts.append(counts.astype("<u2").tobytes())
    for start in range(0, positions if top else 0, AT_ONCE):
        lot = slice(start, start + AT_ONCE)
        ids = row.top_ids[lot].astype(np.int64)
        values = np.maximum(row.top_log_probs[lot].astype(np.float64), LEAST)
        if ragged:
            ids, values = _filled(ids, values, counts[lot], vocabulary)
        parts.append(_packed(_distributions(layout, ids, values, counts[lot])))
    return b"".join(parts)


def decode(content: bytes, key: str, *, likeliest: bool = True) -> TaughtRow:
    """Return the row that ``encode`` wrote; without ``likeliest`` its K is 0, and a hundred times as fast.

    Raises:
        DecodingError: these bytes are none.
    """
    reader = _Reader(content)
    positions, vocabulary, top, exact, bits, step_bits, ragged = HEADER.unpack(reader.take(HEADER.size))
    layout = Layout(vocabulary, top, exact, bits)
    if not 0 < positions <= MOST_POSITIONS or not top <= vocabulary <= 1 << 31 or exact > top or step_bits > 31:
        raise DecodingError("its header is none")
    if bits > MOST_BITS or (bits == 0 and layout.others):
        raise DecodingError("its header is none")
    tokens = _from_bits(reader.bits(positions, layout.id_bits), layout.id_bits)[:, 0]
    ends = np.cumsum(_from_bits(reader.bits(positions, step_bits), step_bits)[:, 0])
    log_probs = np.frombuffer(reader.take(4 * positions), "<f4")
    if tokens.max() >= vocabulary or not (log_probs <= 0).all() or ends[-1] > np.iinfo(np.int32).max:  # NaN is neither
        raise DecodingError("a token, its log-probability or its end is none")
    text = tokens.astype(np.int32), ends.astype(np.int32), log_probs.astype(np.float32)
    if not likeliest:
        return TaughtRow(key, *text, np.empty((positions, 0), np.int32), np.empty((positions, 0), np.float32))
    counts = np.frombuffer(reader.take(2 * positions), "<u2") if ragged else None
    ids = np.empty((positions, top), np.int32)
    values = np.empty((positions, top), np.float32)
    for start in range(0, positions if top else 0, AT_ONCE):
        lot = slice(start, start + AT_ONCE)
        rows = len(ids[lot])
        given = None if counts is None else counts[lot]
        ids[lot], values[lot] = _distributions_of(layout, reader.bits(rows, layout.size), given)
    if reader.rest or ids.max(initial=0) >= vocabulary:
        raise DecodingError("its length or an id is wrong")
    return TaughtRow(key, *text, ids, values)


def _check(row: TaughtRow, vocabulary: int) -> None:
    positions = len(row.tokens)
    if not 0 < positions <= MOST_POSITIONS:
        raise ValueError(f"a row of {positions} tokens")
    shapes = row.ends.shape, row.log_probs.shape, row.top_ids.shape[:1], row.top_log_probs.shape[:1]
    if any(shape != (positions,) for shape in shapes) or row.top_ids.shape != row.top_log_probs.shape:
        raise ValueError(f"arrays of a row of {positions} tokens have other lengths: {shapes}")
    if row.top_ids.shape[1] > min(vocabulary, MOST_TOP):
        raise ValueError(f"{row.top_ids.shape[1]} likeliest tokens of {vocabulary}")
    for ids in (row.tokens, row.top_ids):
        if ids.size and (ids.min() < 0 or ids.max() >= vocabulary):
            raise ValueError(f"an id is none of a vocabulary of {vocabulary}")
    if row.ends[0] < 0 or (np.diff(row.ends) < 0).any():
        raise ValueError("ends go back")
    if not (np.isfinite(row.log_probs).all() and (row.log_probs <= 0).all()):
        raise ValueError("a log-probability of the text is NaN, infinite or above 0")
    top = row.top_log_probs
    if np.isnan(top).any() or (top > 0).any() or (top[:, 1:] > top[:, :-1]).any():
        raise ValueError("a log-probability is NaN or above 0, or they don't descend")


def _filled(ids: Ints, values: Floats, counts: Ints, vocabulary: int) -> tuple[Ints, Floats]:
    """Give distributions of fewer tokens others in the places that are left, as the code needs K different ones."""
    ids, values = ids.copy(), values.copy()
    for place in (counts < ids.shape[1]).nonzero()[0]:
        count, missing = counts[place], ids.shape[1] - counts[place]
        unused = np.setdiff1d(np.arange(min(vocabulary, 2 * ids.shape[1])), ids[place, :count])
        ids[place, count:] = unused[:missing]
        values[place, count:] = values[place, count - 1] if count else 0.0
    return ids, values


def _distributions(layout: Layout, ids: Ints, values: Floats, counts: Ints) -> Bits:
    """Return the bits (P, size) of distributions: ids (P, K) and log-probabilities, the first ``counts`` (P,) of each.

    Each row has the exact ids; the exact log-probabilities, log of the tail's mass, and the bounds of the levels; the
    others' ids, ascending; their levels.
    """
    kept = np.arange(layout.top) < counts[:, None]
    probabilities = np.where(kept, np.exp(values), 0)
    with np.errstate(divide="ignore"):
        tail = np.log(np.maximum(0, 1 - probabilities.sum(1, keepdims=True)))
    floats = [values[:, : layout.exact], tail]
    parts = [_to_bits(ids[:, : layout.exact], layout.id_bits)]
    if not layout.others:
        return np.concatenate([*parts, _float_bits(np.concatenate(floats, 1))], 1)
    order = np.argsort(ids[:, layout.exact :], axis=1)
    others = np.take_along_axis(ids[:, layout.exact :], order, 1)
    if (others[:, 1:] == others[:, :-1]).any():
        raise ValueError("a distribution has a token twice")
    given = np.take_along_axis(values[:, layout.exact :], order, 1)
    bounds = _halves(values[:, [layout.top - 1, layout.exact]])
    levels = _levels(given, bounds, layout.bits)
    if not kept.all():  # the lowest level sorts those after all others that stand in for none
        levels = np.where(np.take_along_axis(kept[:, layout.exact :], order, 1), np.maximum(levels, 1), 0)
    # Both bounds are moved so that the levels have the mass that they stand for.
    true = np.exp(given).sum(1, keepdims=True)
    floats.append(bounds + np.log(true / np.exp(_of_levels(levels, bounds, layout.bits)).sum(1, keepdims=True)))
    highs = np.zeros((len(ids), layout.high_bits), np.uint8)
    np.put_along_axis(highs, (others >> layout.low_bits) + np.arange(layout.others), 1, 1)
    lows = _to_bits(others & ((1 << layout.low_bits) - 1), layout.low_bits)
    return np.concatenate(
        [*parts, _float_bits(np.concatenate(floats, 1)), lows, highs, _to_bits(levels, layout.bits)], 1
    )


def _distributions_of(layout: Layout, bits: Bits, counts: npt.NDArray[Any] | None) -> tuple[Ints, Floats]:
    """Return ids (P, K) and log-probabilities of the bits that ``_distributions`` made, the likeliest first."""
    rows = len(bits)
    borders = np.cumsum(layout.widths)[:-1]
    exact, floats, lows, highs, levels = np.split(bits, borders, axis=1)
    ids = _from_bits(exact, layout.id_bits)
    numbers = _of_float_bits(floats)
    values, tail = numbers[:, : layout.exact], numbers[:, layout.exact : layout.exact + 1]
    if np.isnan(numbers).any() or (numbers > 0.01).any():
        raise DecodingError("a log-probability is none")
    if layout.others:
        where, places = highs.nonzero()
        if len(where) != rows * layout.others or (where.reshape(rows, -1) != np.arange(rows)[:, None]).any():
            raise DecodingError("its ids are none")
        tops = places.reshape(rows, layout.others) - np.arange(layout.others)
        others = (tops << layout.low_bits) + _from_bits(lows, layout.low_bits)
        codes = _from_bits(levels, layout.bits)
        order = np.argsort(-codes, axis=1, kind="stable")
        near = _of_levels(np.take_along_axis(codes, order, 1), numbers[:, -2:], layout.bits)
        ids = np.concatenate([ids, np.take_along_axis(others, order, 1)], 1)
        values = np.concatenate([values, np.minimum(near, values[:, -1:])], 1)
    probabilities = np.exp(values)
    if counts is not None:
        probabilities[np.arange(layout.top) >= counts[:, None]] = 0
    total = probabilities.sum(1, keepdims=True)
    with np.errstate(all="ignore"):
        values = values + (np.log1p(-np.exp(np.minimum(tail, 0))) - np.log(total) - MARGIN)
    if counts is not None:
        values[np.arange(layout.top) >= counts[:, None]] = -np.inf
    if np.isnan(values).any():
        raise DecodingError("a distribution has no mass")
    return ids, values


def _levels(values: Floats, bounds: Floats, bits: int) -> Ints:
    """Return the levels (P, N) of log-probabilities between the bounds (P, 2)."""
    least, most = bounds[:, :1], bounds[:, 1:]
    width = np.maximum(-np.expm1(SPACING * (least - most)), 1e-9)
    share = 1 + np.expm1(np.minimum(0, SPACING * (values - most))) / width
    return np.rint(np.clip(share, 0, 1) * ((1 << bits) - 1)).astype(np.int64)


def _of_levels(levels: Ints, bounds: Floats, bits: int) -> Floats:
    """Return the log-probabilities (P, N) that levels stand for."""
    least, most = bounds[:, :1], bounds[:, 1:]
    width = -np.expm1(np.minimum(0, SPACING * (least - most)))
    with np.errstate(divide="ignore"):  # where the least is next to nothing beside the most
        steps = np.log1p(-(1 - np.arange(1 << bits) / ((1 << bits) - 1)) * width) / SPACING + most
    return np.take_along_axis(np.maximum(steps, least), levels, 1)


def _halves(values: Floats) -> Floats:
    return np.maximum(values, LEAST).astype(np.float16).astype(np.float64)


def _float_bits(values: Floats) -> Bits:
    halves = np.ascontiguousarray(values.astype(">f2"))
    return np.unpackbits(halves.view(np.uint8).reshape(len(values), -1), axis=1)


def _of_float_bits(bits: Bits) -> Floats:
    return np.packbits(bits, axis=1).view(">f2").astype(np.float64)


def _to_bits(values: npt.NDArray[Any], width: int) -> Bits:
    """Return whole numbers (P, N) as bits (P, N · width), the highest first."""
    shifts = np.arange(width - 1, -1, -1)
    return ((values[..., None] >> shifts) & 1).astype(np.uint8).reshape(len(values), -1)


def _from_bits(bits: Bits, width: int) -> Ints:
    """Return the numbers (P, N) of bits (P, N · width); one 0 for each row where they have none."""
    if not width:
        return np.zeros((len(bits), 1), np.int64)
    groups = bits.reshape(len(bits), -1, width)
    numbers = np.zeros(groups.shape[:2], np.int64)
    for place in range(width):
        numbers <<= 1
        numbers |= groups[..., place]
    return numbers


def _packed(bits: Bits) -> bytes:
    return np.packbits(bits.ravel()).tobytes()


class _Reader:
    """Takes bytes one after the other."""

    def __init__(self, content: bytes):
        self.content = memoryview(content)
        self.place = 0

    @property
    def rest(self) -> int:
        """The bytes that are left."""
        return len(self.content) - self.place

    def take(self, size: int) -> memoryview:
        """Return the next bytes. Raises DecodingError where there are fewer."""
        if size > self.rest:
            raise DecodingError("it is too short")
        self.place += size
        return self.content[self.place - size : self.place]

    def bits(self, rows: int, width: int) -> Bits:
        """Return the next rows of ``width`` bits each."""
        count = rows * width
        taken = np.frombuffer(self.take((count + 7) // 8), np.uint8)
        return np.unpackbits(taken, count=count).reshape(rows, width)
