"""Rows as bytes: small, near, and never more probable than certain."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mergekit_lite.distillation.teaching.encoding import DecodingError, Layout, decode, encode
from mergekit_lite.distillation.teaching.rows import TaughtRow
from tests.distill.teaching.made import distributions, row_of, same


@pytest.fixture
def seed() -> int:
    seed = int(np.random.SeedSequence().entropy % (1 << 32))  # type: ignore[operator]
    print(f"seed {seed}")
    return seed


def by_id(row: TaughtRow) -> np.ndarray:
    """Return the log-probabilities in the order of the ids."""
    return np.take_along_axis(row.top_log_probs, np.argsort(row.top_ids, 1), 1).astype(np.float64)


def divergence(true: TaughtRow, near: TaughtRow) -> np.ndarray:
    """Return KL(true ‖ near) of each position, the tail as one more token."""
    log_p, log_q = by_id(true), by_id(near)
    tails = [np.maximum(1e-7, 1 - np.exp(each).sum(1)) for each in (log_p, log_q)]
    return np.asarray((np.exp(log_p) * (log_p - log_q)).sum(1) + tails[0] * np.log(tails[0] / tails[1]))


@pytest.mark.parametrize("top", [0, 1, 10, 16, 17, 50, 128])
@pytest.mark.parametrize("vocabulary", [128, 1_000, 49_152])
def test_a_row_comes_back(top: int, vocabulary: int, seed: int) -> None:
    rng = np.random.default_rng(seed)
    for spread in (0.01, 1.0, 4.0, 30.0):
        row = row_of(rng, distributions(rng, 23, vocabulary, spread), top)
        back = decode(encode(row, vocabulary), row.key)
        assert same(row, back)
        assert (np.diff(back.top_log_probs, axis=1) <= 0).all()
        sums = np.exp(back.top_log_probs.astype(np.float64)).sum(1)
        assert (sums <= 1).all()
        if top:
            assert np.abs(sums - np.exp(row.top_log_probs.astype(np.float64)).sum(1)).max() < 5e-4
            assert divergence(row, back).max() < 0.01


@pytest.mark.parametrize("spread", [0.7, 3.0])
def test_three_hundred_bytes_a_token(spread: float, seed: int) -> None:
    """128 of 152,000 tokens."""
    rng = np.random.default_rng(seed)
    row = row_of(rng, distributions(rng, 64, 151_936, spread), 128)
    content = encode(row, 151_936)
    assert len(content) / 64 <= 299
    back = decode(content, row.key)
    assert np.abs(np.exp(by_id(row)) - np.exp(by_id(back))).max() < 0.02
    assert divergence(row, back).mean() < 5e-4


def test_the_largest_are_exact_to_a_half(seed: int) -> None:
    rng = np.random.default_rng(seed)
    row = row_of(rng, distributions(rng, 50, 151_936, 4.0), 128)
    back = decode(encode(row, 151_936), row.key)
    exact = Layout.of(151_936, 128).exact
    assert exact >= 4
    assert (back.top_ids[:, :exact] == row.top_ids[:, :exact]).all()
    error = np.abs(back.top_log_probs - row.top_log_probs)[:, :exact]
    assert (error <= 0.001 * np.abs(row.top_log_probs[:, :exact]) + 1e-3).all()


def test_a_smaller_vocabulary_is_told_more_exactly_in_no_more_bytes() -> None:
    layouts = [Layout.of(vocabulary, 128) for vocabulary in (262_144, 151_936, 49_152, 1_000, 128)]
    assert all(each.size <= 18.125 * 128 for each in layouts)
    assert [each.bits for each in layouts] == sorted(each.bits for each in layouts)


def test_distributions_of_fewer_tokens(seed: int) -> None:
    """Where a server gives fewer, or the others are impossible."""
    rng = np.random.default_rng(seed)
    row = row_of(rng, distributions(rng, 9, 500, 2.0), 40)
    row.top_log_probs[2, 30:] = -np.inf
    row.top_log_probs[3, 1:] = -np.inf
    row.top_log_probs[4, :] = -np.inf
    back = decode(encode(row, 500), row.key)
    assert (np.isfinite(back.top_log_probs) == np.isfinite(row.top_log_probs)).all()
    assert set(back.top_ids[2, :30]) == set(row.top_ids[2, :30])
    assert back.top_ids[3, 0] == row.top_ids[3, 0]
    assert back.top_log_probs[3, 0] == pytest.approx(row.top_log_probs[3, 0], abs=2e-3)


def test_a_certain_token(seed: int) -> None:
    whole = np.full((3, 200), -np.inf)
    whole[:, 7] = 0.0
    rng = np.random.default_rng(seed)
    row = replace(row_of(rng, whole, 20), log_probs=np.zeros(3, np.float32))
    back = decode(encode(row, 200), row.key)
    assert (back.top_ids[:, 0] == 7).all()
    assert np.exp(back.top_log_probs[:, 0]) == pytest.approx(1, abs=1e-5)


def test_impossible_tokens_among_the_likeliest(seed: int) -> None:
    """A mask of −1e9 added to logits; a distribution that is all but certain."""
    rng = np.random.default_rng(seed)
    whole = distributions(rng, 4, 200, 1.0)
    whole[:, 20:] = -1e9
    row = row_of(rng, whole, 60)
    row = replace(row, log_probs=np.full(4, -1, np.float32))
    back = decode(encode(row, 200), row.key)
    assert np.isfinite(back.top_log_probs).all()
    assert np.abs(np.exp(by_id(back)) - np.exp(by_id(row))).max() < 0.05


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("tokens", np.array([1, 500, 2], np.int32)),
        ("ends", np.array([3, 2, 4], np.int32)),
        ("log_probs", np.array([-1, np.nan, -1], np.float32)),
        ("log_probs", np.array([-1, 0.1, -1], np.float32)),
        ("top_ids", np.array([[1, 1]] * 3, np.int32)),
        ("top_log_probs", np.array([[-2.0, -1.0]] * 3, np.float32)),
    ],
)
def test_what_is_no_row_is_refused(name: str, value: np.ndarray) -> None:
    rng = np.random.default_rng(0)
    row = row_of(rng, distributions(rng, 3, 500, 2.0), 2)
    top = 20 if name == "top_ids" else 2
    if top == 20:
        row, value = row_of(rng, distributions(rng, 3, 500, 2.0), 20), np.full((3, 20), 7, np.int32)
    with pytest.raises(ValueError):
        encode(replace(row, **{name: value}), 500)


def test_any_bytes_are_a_row_or_refused(seed: int) -> None:
    rng = np.random.default_rng(seed)
    content = bytearray(encode(row_of(rng, distributions(rng, 5, 300, 2.0), 30), 300))
    for _ in range(300):
        damaged = bytearray(content)
        for place in rng.integers(0, len(content), 3):
            damaged[place] = rng.integers(256)
        for each in (damaged, damaged[: rng.integers(len(damaged))]):
            try:
                row = decode(bytes(each), "0" * 32)
            except DecodingError:
                continue
            assert np.exp(row.top_log_probs.astype(np.float64)).sum(1).max(initial=0) <= 1
            assert row.top_ids.max(initial=0) < 1 << 31
