"""Vocabularies brought into one order: every model's embedding and head with the rows of the output's tokens.

Tokens are matched by their text, never by their numbers. A row that a model lacks is the default of its token: the only
row there is, else the base's, else the mean of all; with that a token that one model alone has keeps its row, and one
that the base lacks changes nothing of it (mergekit 0.1.5's rule).
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from mergekit_lite.checkpoint import Checkpoint, TensorSpec, tied_weights
from mergekit_lite.checkpoint.encodings.gathered import Place, gathered
from mergekit_lite.errors import counted, shortened
from mergekit_lite.planning.tokenizer_file import Token, Tokenizer, read_tokenizer
from mergekit_lite.planning.tokenizers import tokens_of, vocabulary_of
from mergekit_lite.recipe.recipe import TokenRow, Vocabulary

Row = Place | tuple[Place, ...]  # where a row is from: one place, or the mean of several, of none zeros
SHOWN = 3
SPECIAL_NUMBERS = ("bos_token_id", "eos_token_id", "pad_token_id")  # of a config


class VocabularyError(Exception):
    """Why vocabularies can't be brought into one order; the message is one problem of the plan."""


@dataclass(frozen=True)
class _Model:
    """One model's tokens: by number, and numbers by token; only those that have a row."""

    at: int  # which of the models it is
    source: Checkpoint
    tokenizer: Tokenizer
    tokens: Mapping[int, Token]
    numbers: Mapping[Token, int]
    rows: int


def aligned(
    inputs: Sequence[Checkpoint], tokenizer: int, base: int | None, vocabulary: Vocabulary
) -> tuple[tuple[Checkpoint, ...], int, list[str]]:
    """Return the inputs with the rows of one vocabulary, the number of rows, and what the user should know.

    Args:
        inputs: the models.
        tokenizer: which of them has the output's tokenizer.
        base: which of them is the base, whose rows go before means.
        vocabulary: what the recipe says of single tokens and of the width.

    Raises:
        VocabularyError: a model has no ``tokenizer.json``, or its embedding and head differ in their rows.
    """
    read = [_tokenizer_of(source) for source in inputs]
    in_bytes = len({each.alphabet for each in read}) > 1
    models = [_model(at, source, each, in_bytes) for at, (source, each) in enumerate(zip(inputs, read, strict=True))]
    wanted = models[tokenizer]
    width = _width(models, wanted, vocabulary)
    rows = [wanted.tokens.get(number) for number in range(width)]
    defaults = _defaults(models, rows, base, vocabulary, wanted)
    forced = {_token(wanted, row.token) for row in vocabulary.tokens if row.force}
    changed = []
    for model in models:
        places = [_place(model, number, rows[number], defaults[number], forced) for number in range(width)]
        changed.append(_with_rows(model, models, places))
    notes = [line for model in models if (line := _told(model, rows))]
    if rowless := sum(number >= width for number in wanted.tokenizer.tokens):
        notes.append(f"{wanted.source.reference}: {counted(rowless, 'token')} of its tokenizer have no row")
    return tuple(changed), width, [*notes, *_roles(models, wanted)]


def of_one_vocabulary(inputs: Sequence[Checkpoint], *, all_told: bool) -> bool:
    """Return whether all models have rows for the same tokens in the same order, as far as their files tell.

    One whose tokens can't be told is taken to have the others', unless all must be told.
    """
    rows: dict[str, set[int]] = {}
    for source in inputs:
        for name, spec in source.tensors.items():
            if tied_weights.is_vocabulary(name) and spec.shape:
                rows.setdefault(name, set()).add(spec.shape[0])
    told = map(tokens_of if all_told else vocabulary_of, inputs)
    read = [tokens for tokens in told if tokens or all_told]
    return all(len(each) == 1 for each in rows.values()) and all(tokens == read[0] for tokens in read)


def having_all_tokens(inputs: Sequence[Checkpoint], base: int) -> int:
    """Return which model has a token for each token of the others: the base if it does, else the first; else the base.

    Raises CheckpointError where a tokenizer can't be read.
    """
    read = [read_tokenizer(source) for source in inputs]
    texts = [set(tokenizer.tokens.values()) if tokenizer is not None else set() for tokenizer in read]
    every = set().union(*texts)
    order = [base, *(number for number in range(len(inputs)) if number != base)]
    return next((number for number in order if texts[number] == every), base)


def beyond(inputs: Sequence[Checkpoint], tokenizer: int) -> list[str]:
    """Return a message for each model with tokens that the one that gives a union's tokenizer lacks."""
    read = [read_tokenizer(source) for source in inputs]
    own = read[tokenizer]
    known = set(own.tokens.values()) if own is not None else set()
    messages = []
    for source, other in zip(inputs, read, strict=True):
        more = [token for token in (other.tokens.values() if other is not None else ()) if token not in known]
        if more:
            examples = ", ".join(repr(shortened(token, 30)) for token in more[:SHOWN]) + (
                " …" if len(more) > SHOWN else ""
            )
            messages.append(
                f"tokenizer: union: {source.reference} has {counted(len(more), 'token')} that "
                f"{inputs[tokenizer].reference} lacks ({examples}), and no model has the tokens of all. Tokens put "
                "behind a tokenizer's own are reached by no text: name one of the models as the source"
            )
    return messages


def _tokenizer_of(source: Checkpoint) -> Tokenizer:
    tokenizer = read_tokenizer(source)
    if tokenizer is None or not tokenizer.tokens:
        raise VocabularyError(
            f"{source.reference}: has no tokenizer.json to tell which row is which token's. Save its tokenizer by "
            "transformers (AutoTokenizer.from_pretrained(…).save_pretrained(…)), or leave 'tokenizer' out"
        )
    return tokenizer


def _model(at: int, source: Checkpoint, tokenizer: Tokenizer, in_bytes: bool) -> _Model:
    """Return a model's tokens that have a row. Raises VocabularyError."""
    matrices = [spec for name, spec in source.tensors.items() if tied_weights.is_vocabulary(name)]
    counts = {spec.shape[0] for spec in matrices if spec.shape}
    if len(counts) != 1:
        listed = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in matrices) or "it has none"
        raise VocabularyError(f"{source.reference}: its embedding and head differ in their rows ({listed})")
    [rows] = counts
    tokens: dict[int, Token] = {}
    numbers: dict[Token, int] = {}
    for number in sorted(tokenizer.tokens):
        if number < rows:
            tokens[number] = tokenizer.as_compared(number, in_bytes=in_bytes)
            numbers.setdefault(tokens[number], number)
    return _Model(at, source, tokenizer, tokens, numbers, rows)


def _width(models: Sequence[_Model], wanted: _Model, vocabulary: Vocabulary) -> int:
    """Return the number of rows: of the tokenizer's model, or as the recipe says; room for all tokens always."""
    needed = max(wanted.tokens, default=-1) + 1
    if vocabulary.pad_to_multiple_of:
        return -(-needed // vocabulary.pad_to_multiple_of) * vocabulary.pad_to_multiple_of
    if vocabulary.width == "base":
        return wanted.rows
    return max(needed, (max if vocabulary.width == "max" else min)(model.rows for model in models))


def _defaults(
    models: Sequence[_Model],
    rows: Sequence[Token | None],
    base: int | None,
    vocabulary: Vocabulary,
    wanted: _Model,
) -> list[Row]:
    """Return for each row of the output what models have there that lack its token."""
    given = {_token(wanted, row.token): _given(row, models) for row in vocabulary.tokens}
    defaults: list[Row] = []
    for number, token in enumerate(rows):
        if token is not None and (explicit := given.get(token)) is not None:
            defaults.append(explicit)
            continue
        if token is None:  # padding: the same row of whoever has one there that stands for nothing
            having = [(each.at, number) for each in models if number < each.rows and number not in each.tokens]
        else:
            having = [(each.at, each.numbers[token]) for each in models if token in each.numbers]
        of_base = [place for place in having if place[0] == base]
        if len(having) == 1 or of_base:
            defaults.append((of_base or having)[0])
        else:
            defaults.append(tuple(having))
    return defaults


def _token(wanted: _Model, text: str) -> Token:
    """Return the token of the output's vocabulary that a recipe means by a text."""
    for token in (text, text.encode()):
        if token in wanted.numbers:
            return token
    raise VocabularyError(f"tokens: {text!r} is no token of {wanted.source.reference}, which gives the tokenizer")


def _given(row: TokenRow, models: Sequence[_Model]) -> Row | None:
    """Return the place that a recipe gives for a token; None where it gives none. Raises VocabularyError."""
    if row.zero:
        return ()
    if row.model is None:
        return None
    at = next((number for number, each in enumerate(models) if each.source.reference == row.model), None)
    if at is None:
        raise VocabularyError(f"tokens: {row.model!r}, the source of {row.token!r}, is none of the recipe's models")
    if row.number is not None:
        if not 0 <= row.number < models[at].rows:
            raise VocabularyError(f"tokens: {row.model} has no row {row.number}: it has {models[at].rows}")
        return at, row.number
    text = row.other or row.token
    for token in (text, text.encode()):
        if token in models[at].numbers:
            return at, models[at].numbers[token]
    raise VocabularyError(f"tokens: {row.model}, the source of {row.token!r}, has no token {text!r}")


def _place(
    model: _Model,
    number: int,
    token: Token | None,
    default: Row,
    forced: Iterable[Token],
) -> Row:
    """Return where a model's row of the output is from: its own, or the default."""
    if token is None:
        return (model.at, number) if number < model.rows and number not in model.tokens else default
    return default if token in forced or token not in model.numbers else (model.at, model.numbers[token])


def _with_rows(model: _Model, models: Sequence[_Model], places: Sequence[Row]) -> Checkpoint:
    """Return a model with its vocabulary's tensors in the output's order; the same one where nothing moves."""
    if len(places) == model.rows and all(place == (model.at, number) for number, place in enumerate(places)):
        return model.source
    tensors: dict[str, TensorSpec] = dict(model.source.tensors)
    for name, own in model.source.tensors.items():
        if tied_weights.is_vocabulary(name):
            found = [tied_weights.counterpart(name, each.source.tensors) for each in models]
            sources = [spec if spec is not None and spec.shape[1:] == own.shape[1:] else own for spec in found]
            if len({spec.shape[1:] for spec in found if spec is not None}) > 1:
                raise VocabularyError(f"{name}: its rows are not of the same length in all models")
            tensors[name] = gathered(own, sources, places)
    return replace(model.source, tensors=tensors)


def _told(model: _Model, rows: Sequence[Token | None]) -> str:
    """Return in a line how a model's tokens are those of the output; empty where all are the same."""
    same = moved = lacking = 0
    for number, token in enumerate(rows):
        if token is None:
            continue
        own = model.numbers.get(token)
        same, moved, lacking = same + (own == number), moved + (own not in (None, number)), lacking + (own is None)
    kept = set(rows)
    lost = [token for token in model.numbers if token not in kept]
    if not moved and not lacking and not lost and model.rows == len(rows):
        return ""
    parts = [f"{counted(same, 'token')} at the same place", f"{moved:,} at another", f"{lacking:,} it lacks"]
    examples = ", ".join(repr(_shown(token)) for token in lost[:SHOWN]) + (" …" if len(lost) > SHOWN else "")
    parts += [f"{len(lost):,} that only it has are left out: {examples}"] if lost else []
    return f"{model.source.reference}: {', '.join(parts)}; {model.rows:,} rows become {len(rows):,}"


def _shown(token: Token) -> str:
    text = token.decode(errors="replace") if isinstance(token, bytes) else str(token)
    return shortened(text, 30)


def _roles(models: Sequence[_Model], wanted: _Model) -> list[str]:
    """Return where models use other tokens in special roles than the output's tokenizer."""
    own = wanted.tokenizer.special
    lines = []
    for model in models:
        other = model.tokenizer.special
        both = [role for role in own if role in other and other[role] != own[role]]
        differing = [f"{role} {other[role]!r}, here {own[role]!r}" for role in both]
        if differing:
            lines.append(f"{model.source.reference} uses other special tokens: {', '.join(differing)}")
    return lines


def with_vocabulary_size(config: Mapping[str, Any], size: int, tokenizers: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with another ``vocab_size``, in nested configs of text too.

    ``tokenizers`` is the config of the model whose tokenizer the output has: the numbers of special tokens are its.
    """
    changed = dict(config) | {key: tokenizers[key] for key in SPECIAL_NUMBERS if key in config and key in tokenizers}
    for key, value in config.items():
        if key == "vocab_size":
            changed[key] = size
        elif key in ("text_config", "language_config", "llm_config") and isinstance(value, dict):
            changed[key] = with_vocabulary_size(value, size, tokenizers.get(key) or {})
    return changed
