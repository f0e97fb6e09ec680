"""Whose tokens the rows of a task vector are: kept in its file, so that it can be added to a model in another order.

The metadata's entry ``task_vector_tokens`` is JSON: the ``alphabet``, the ``tokens`` by their numbers (null where a
number has none), and the numbers of ``added`` ones.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import replace

from mergekit_lite.checkpoint import tied_weights
from mergekit_lite.checkpoint.encodings.dense import Dense
from mergekit_lite.checkpoint.encodings.gathered import Places, gathered
from mergekit_lite.checkpoint.tensor import TensorSpec
from mergekit_lite.checkpoint.tokenizer_file import Alphabet, Token, Tokenizer, numbers_of, own_rows
from mergekit_lite.checkpoint.vector_file import TOKENS, Delta, Vector, difference
from mergekit_lite.deferred import np
from mergekit_lite.errors import CheckpointError, counted
from mergekit_lite.input_files import parse_json


def metadata_of(tokenizer: Tokenizer) -> dict[str, str]:
    """Return the entry of a vector's metadata that says whose its rows are."""
    last = max(tokenizer.tokens, default=-1)
    about = {
        "alphabet": tokenizer.alphabet.value,
        "tokens": [tokenizer.tokens.get(number) for number in range(last + 1)],
        "added": sorted(tokenizer.added),
    }
    return {TOKENS: json.dumps(about, separators=(",", ":"), ensure_ascii=False)}


def has_rows_of_tokens(vector: Vector) -> bool:
    """Return whether it is known whose tokens the rows are, and there are differences of such."""
    named = [delta for name, delta in vector.deltas.items() if tied_weights.is_vocabulary(name)]
    return bool(vector.tokens) and any(delta.terms for delta in named)


def in_order_of(vector: Vector, base: Tokenizer, tensors: Mapping[str, TensorSpec]) -> tuple[Vector, str]:
    """Return a vector with its rows in the order of a base's tokens, and what moved; the same one where nothing does.

    Rows of tokens that the vector lacks are zeros, and what it has for tokens that the base lacks is left out.

    Args:
        vector: one with ``tokens``, under the base's names.
        base: the tokenizer of the base.
        tensors: the base's tensors.

    Raises:
        CheckpointError: what the vector says of its tokens is damaged.
    """
    of_vector = _tokenizer(vector)
    in_bytes = of_vector.alphabet is not base.alphabet
    deltas, told = dict(vector.deltas), ""
    for name, delta in vector.deltas.items():
        if not tied_weights.is_of_tokens(name, tensors):
            continue
        own = tied_weights.counterpart(name, tensors)
        if own is None or not delta.terms or own.shape[1:] != delta.shape[1:]:
            continue
        rows = own.shape[0]
        wanted = [base.as_compared(n, in_bytes=in_bytes) if n in base.tokens else None for n in range(rows)]
        tokens: dict[int, Token] = {
            number: of_vector.as_compared(number, in_bytes=in_bytes)
            for number in of_vector.tokens
            if number < delta.shape[0]
        }
        row = own_rows(wanted, tokens, numbers_of(tokens), delta.shape[0])
        if rows == delta.shape[0] and (row == np.arange(rows)).all():
            continue
        matrix = np.where(row < 0, -1, 0).astype(np.int32)
        values = replace(difference(delta, vector.path), dtype="float64")  # as exact as the terms are
        moved = gathered(values, [values], Places(matrix, row, ((),)))
        deltas[name] = Delta(name, delta.dtype, (rows, *delta.shape[1:]), (Dense(moved),))
        is_token = np.array([token is not None for token in wanted])
        same = int((is_token & (row == np.arange(rows))).sum())
        lacking = int((is_token & (row < 0)).sum())
        lost = len(set(tokens.values()) - set(wanted))
        told = (
            f"its rows follow their tokens: {counted(same, 'token')} at the same place, "
            f"{int(is_token.sum()) - same - lacking:,} at another, {lacking:,} that it lacks stay as they are"
        ) + (f", {lost:,} that only it has are left out" if lost else "")
    return replace(vector, deltas=deltas), told


def _tokenizer(vector: Vector) -> Tokenizer:
    """Return the tokens that a vector's metadata lists. Raises CheckpointError where it is damaged."""
    try:
        about = parse_json(vector.tokens)
        tokens, added, alphabet = about["tokens"], about["added"], Alphabet(about["alphabet"])
        if not all(token is None or isinstance(token, str) for token in tokens):
            raise ValueError("a token is no text")
        of_added: dict[int, dict[str, bool]] = {number: {} for number in added if isinstance(number, int)}
    except (LookupError, TypeError, ValueError) as error:
        raise CheckpointError(
            f"{vector.reference}: what it says of its tokens ({TOKENS}) is damaged: {error}. Extract it again."
        ) from error
    named = {number: token for number, token in enumerate(tokens) if token is not None}
    return Tokenizer(named, of_added, alphabet, {})
