"""Rows as teachers say them, drawn at random."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from mergekit_lite.distillation.teaching.rows import TaughtRow


def distributions(rng: np.random.Generator, positions: int, vocabulary: int, spread: float) -> npt.NDArray[np.float64]:
    """Return log-probabilities (P, V) of random logits; the larger the spread, the surer they are."""
    logits = spread * rng.standard_normal((positions, vocabulary)) * rng.exponential(1, (positions, 1))
    logits -= logits.max(1, keepdims=True)
    return np.asarray(logits - np.log(np.exp(logits).sum(1, keepdims=True)))


def row_of(rng: np.random.Generator, whole: npt.NDArray[np.float64], top: int, key: str = "0" * 32) -> TaughtRow:
    """Return a row whose distributions are the ``top`` likeliest of the whole ones (P, V)."""
    positions, vocabulary = whole.shape
    ids = np.argsort(-whole, 1, kind="stable")[:, :top]
    tokens = rng.integers(0, vocabulary, positions)
    return TaughtRow(
        key,
        tokens.astype(np.int32),
        np.cumsum(rng.integers(0, 12, positions)).astype(np.int32),
        whole[np.arange(positions), tokens].astype(np.float32),
        ids.astype(np.int32),
        np.take_along_axis(whole, ids, 1).astype(np.float32),
    )


def numbered(number: int, vocabulary: int = 300, top: int = 24) -> TaughtRow:
    """Return the row with a number: always the same."""
    rng = np.random.default_rng(number)
    whole = distributions(rng, int(rng.integers(1, 40)), vocabulary, 3)
    return row_of(rng, whole, top, f"{rng.integers(1 << 62):016x}{number:016x}")


def same(one: TaughtRow, other: TaughtRow) -> bool:
    """Return whether two rows are the same but for what the encoding of distributions changes."""
    return (
        one.key == other.key
        and all(np.array_equal(getattr(one, name), getattr(other, name)) for name in ("tokens", "ends", "log_probs"))
        and np.array_equal(np.sort(one.top_ids), np.sort(other.top_ids))
    )
