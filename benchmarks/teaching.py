"""How large and how exact what teachers say is kept: ``python -m benchmarks.teaching MODEL TEXT [TOP]``.

A text is read by a model; its distributions are encoded and decoded, beside those of as many random logits over
151,936 tokens, and beside another way to keep them: 16 log-probabilities in bfloat16, a polynomial with a square root
fitted to the others, and ids of whole bits (344 bytes a token for 128 of 152,000).
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TypeVar

import numpy as np

from mergekit_lite.answers.loading import causal_model, placed, tokenizer_of
from mergekit_lite.answers.logprobs import padded
from mergekit_lite.answers.template import Tokens
from mergekit_lite.distillation.teaching.encoding import Layout, decode, encode
from mergekit_lite.distillation.teaching.rows import TaughtRow
from mergekit_lite.distillation.teaching.scoring import Said, said_of

T = TypeVar("T")

TOKENS = 1024
EXACT = 16


def main() -> None:
    """Print a line for each kind of distributions and each way."""
    model, path, top = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]) if len(sys.argv) > 3 else 128
    loaded = causal_model(model, placed("cpu", None))
    ids = tuple(tokenizer_of(model)(path.read_text())["input_ids"][: TOKENS + 1])
    (said,) = said_of(loaded, padded([Tokens(ids[:1], ids[1:])]), top)
    vocabulary = loaded.config.get_text_config().vocab_size
    print(
        "distributions           way     bytes  max |Δp|  mean ½Σ|Δp|  max |Δ log p|  KL: mean      max   µs: to   from"
    )
    show("the model's", row_of(ids[1:], said), vocabulary)
    show("the model's, of 151,936", row_of(ids[1:], said), 151_936)
    for spread in (1.0, 3.0):
        logits = spread * np.random.default_rng(0).standard_normal((256, 151_936))
        values = logits - np.log(np.exp(logits).sum(1, keepdims=True))
        best = np.argsort(-values, 1)[:, :top].astype(np.int32)
        tops = np.take_along_axis(values, best, 1).astype(np.float32)
        show(f"random, s.d. {spread:g}", row_of([0] * 256, Said(values[:, 0].astype(np.float32), best, tops)), 151_936)


def show(name: str, row: TaughtRow, vocabulary: int) -> None:
    """Print how a row comes back in both ways."""
    times: list[float] = []
    content = timed(times, lambda: encode(row, vocabulary))
    back = timed(times, lambda: decode(content, row.key))
    assert np.array_equal(back.log_probs, row.log_probs)
    number = len(row.tokens)
    cost = "".join(f"{1e6 * each / number:7.1f}" for each in times)
    print(f"{name:24}{'ours':6}{len(content) / number:7.1f}{errors(row, back)}  {cost}")
    size = (row.top_ids.shape[1] * Layout.of(vocabulary, 128).id_bits + EXACT * 16 + 6 * 32) / 8
    print(f"{'':24}{'curve':6}{size:7.1f}{errors(row, fitted(row))}")


def errors(true: TaughtRow, near: TaughtRow) -> str:
    """Return the errors in words; KL takes the tail as one more token."""
    log_p, log_q = (np.take_along_axis(each.top_log_probs, np.argsort(each.top_ids, 1), 1).astype(float)
                    for each in (true, near))  # fmt: skip
    p, q = np.exp(log_p), np.exp(log_q)
    tail_p, tail_q = (np.maximum(1e-9, 1 - each.sum(1)) for each in (p, q))
    kl = (p * (log_p - log_q)).sum(1) + tail_p * np.log(tail_p / tail_q)
    off = np.abs(p - q)
    spread = np.abs(log_p - log_q).max()
    return f"{off.max():10.1e}{off.sum(1).mean() / 2:13.1e}{spread:15.2f}{kl.mean():10.1e}{kl.max():9.1e}"


def fitted(row: TaughtRow) -> TaughtRow:
    """Return the row as a fitted curve brings it back."""
    values = row.top_log_probs.astype(np.float64)
    bits = row.top_log_probs[:, :EXACT].copy().view(np.uint32)
    bits = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16) << 16
    values[:, :EXACT] = bits.astype(np.uint32).view(np.float32)
    x = np.linspace(0, 1, values.shape[1] - EXACT)
    terms = np.stack([x**0, x, x**2, x**3, x**4, np.sqrt(x)], 1)
    values[:, EXACT:] = (terms @ np.linalg.lstsq(terms, values[:, EXACT:].T, rcond=None)[0]).T
    return replace(row, top_log_probs=values.astype(np.float32))


def row_of(tokens: object, said: Said) -> TaughtRow:
    """Return a row whose tokens have four bytes each."""
    ids = np.array(tokens, np.int32)
    return TaughtRow("0" * 32, ids, 4 * np.arange(1, len(ids) + 1, dtype=np.int32), *said)


def timed(times: list[float], work: Callable[[], T]) -> T:
    """Return what the work gives, and note its processor time."""
    start = time.process_time()
    result = work()
    times.append(time.process_time() - start)
    return result


if __name__ == "__main__":
    main()
