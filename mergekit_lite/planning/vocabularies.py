"""Vocabularies brought into one order: every model's embedding and head with the rows of the output's tokens.

Tokens are matched by their text, never by their numbers. A row that a model lacks is the default of its token: the only
row there is, else the base's, else the mean of all; with that a token that one model alone has keeps its row, and one
that the base lacks changes nothing of it (mergekit 0.1.5's rule).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, NamedTuple

from mergekit_lite.checkpoint import Checkpoint, TensorSpec, tied_weights
from mergekit_lite.checkpoint.encodings.gathered import Place, Places, gathered
from mergekit_lite.checkpoint.tokenizer_file import Token, Tokenizer, numbers_of, own_rows, read_tokenizers
from mergekit_lite.deferred import np
from mergekit_lite.errors import UnreadableError, counted, shortened
from mergekit_lite.planning.tokenizers import vocabulary_files
from mergekit_lite.planning.unions import Union, appended
from mergekit_lite.recipe.recipe import TokenRow, Vocabulary

if TYPE_CHECKING:
    import numpy.typing as npt

Row = Place | tuple[Place, ...]  # where a row is from: one place, or the mean of several, of none zeros
SHOWN = 3
MOST_PADDING = 1 << 16  # rows without a token, beside as many as there are tokens


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

    @cached_property
    def texts(self) -> Mapping[str, int]:
        """The numbers of tokens by their texts in ``tokenizer.json``."""
        return {self.tokenizer.tokens[number]: number for number in sorted(self.tokens, reverse=True)}

    def number_of(self, text: str) -> int | None:
        """Return the number of the token that a recipe means by a text: as the tokenizer has it, or what it says."""
        return self.texts.get(text, self.numbers.get(text.encode()))


class Aligned(NamedTuple):
    """Models with the rows of one vocabulary.

    ``rows`` is their number, ``own`` says for each model and row which row of that model it was, −1 where it had none
    (models, rows; int32); ``more`` are new tokens, ``notes`` what should be known.
    """

    inputs: tuple[Checkpoint, ...]
    rows: int
    own: npt.NDArray[np.int32]
    more: Union
    notes: tuple[str, ...]

    def numbers(self, model: int) -> dict[int, int]:
        """Return where each row of a model is now, of those that are still there."""
        return {row: number for number, row in enumerate(self.own[model].tolist()) if row >= 0}


def aligned(
    inputs: Sequence[Checkpoint],
    read: Sequence[Tokenizer | None],
    tokenizer: int,
    base: int | None,
    vocabulary: Vocabulary,
    *,
    union: bool = False,
) -> Aligned:
    """Return the inputs with the rows of one vocabulary.

    Args:
        inputs: the models.
        read: their tokenizers.
        tokenizer: which of them has the output's tokenizer.
        base: which of them is the base, whose rows go before means.
        vocabulary: what the recipe says of single tokens and of the width.
        union: whether the output's tokenizer gets the tokens of all models.

    Raises:
        VocabularyError: a model has no ``tokenizer.json``, or its embedding and head differ in their rows.
    """
    models = _models(inputs, read)
    wanted = models[tokenizer]
    asked = [row.token for row in vocabulary.tokens if wanted.number_of(row.token) is None]
    more = Union()
    if union or asked:
        tokenizers = [model.tokenizer for model in models]
        more = appended(tokenizers, tokenizer, [model.rows for model in models], asked, union=union)
    tokens = {**wanted.tokens, **{each.number: each.token for each in more.new}}
    width = _width(models, wanted, max(tokens, default=-1) + 1, vocabulary)
    rows = list(map(tokens.get, range(width)))
    own = np.stack([_own_rows(model, rows) for model in models])
    new = {each.text: each.number for each in more.new}
    said = {_number(wanted, row.token, new): row for row in vocabulary.tokens}
    forced = np.zeros(width, bool)
    forced[[number for number, row in said.items() if row.force]] = True
    places = {number: _given(row, tokens[number], models) for number, row in said.items()}
    given = {number: place for number, place in places.items() if place is not None}
    default = _defaults(own, base, given, forced)
    changed = [_with_rows(model, models, _places(model, own[model.at], default, forced)) for model in models]
    notes = [line for model in models if (line := _told(model, own[model.at], rows))]
    if rowless := sum(number >= width for number in wanted.tokenizer.tokens):
        notes.append(f"{wanted.source.reference}: {counted(rowless, 'token')} of its tokenizer without a row")
    return Aligned(tuple(changed), width, own, more, (*notes, *_roles(models, wanted)))


def in_common(inputs: Sequence[Checkpoint]) -> tuple[tuple[Checkpoint, ...], list[str]]:
    """Return the inputs with the rows of the tokens that all have, in the first one's order, and what is to be told.

    They are the same ones where all have the same vocabulary, or it can't be told that they haven't.
    """
    rows = {spec.shape[:1] for source in inputs for spec in matrices(source)}
    files = [vocabulary_files(source) for source in inputs]
    if not all(files) or (len(rows) == 1 and all(each == files[0] for each in files)):
        return tuple(inputs), []
    try:
        read = read_tokenizers(inputs)
        if of_one_vocabulary(inputs, read, all_told=False):
            return tuple(inputs), []
        return by_token(inputs, read)
    except (VocabularyError, UnreadableError) as error:
        return tuple(inputs), [f"rows are compared by their numbers: {error}"]


def by_token(
    inputs: Sequence[Checkpoint], read: Sequence[Tokenizer | None], order: int | None = None
) -> tuple[tuple[Checkpoint, ...], list[str]]:
    """Return the inputs with the rows of the same tokens, and what is to be told.

    ``order`` is the input whose rows they are, where others lack a token with zeros; by default the first, without the
    rows that not all have. Raises VocabularyError.
    """
    models = _models(inputs, read)
    first = models[order or 0]
    tokens = [first.tokens.get(number) for number in range(first.rows)]
    own = np.stack([_own_rows(model, tokens) for model in models])
    kept = np.flatnonzero((own >= 0).all(axis=0)) if order is None else np.arange(first.rows)
    changed = []
    for model in models:
        row = own[model.at][kept]
        matrix = np.where(row < 0, -1, model.at).astype(np.int32)
        is_same = len(row) == model.rows and (row == np.arange(len(row))).all()
        changed.append(model.source if is_same else _with_rows(model, models, Places(matrix, row, ((),))))
    end = f"{len(kept):,} rows are compared, token by token" if order is None else ""
    notes = [line for model in models if (line := _told(model, own[model.at], tokens, end))]
    return tuple(changed), [*notes, *_roles(models, first)]


def of_one_vocabulary(inputs: Sequence[Checkpoint], read: Sequence[Tokenizer | None], *, all_told: bool) -> bool:
    """Return whether all models have rows for the same tokens in the same order, as far as their files tell.

    One whose tokens can't be told is taken to have the others', unless all must be told.
    """
    rows: dict[str, set[int]] = {}
    for source in inputs:
        for name, spec in source.tensors.items():
            if tied_weights.is_vocabulary(name) and spec.shape:
                rows.setdefault(name, set()).add(spec.shape[0])
    if any(len(each) > 1 for each in rows.values()):
        return False
    each = [
        tokenizer.tokens
        if tokenizer is not None and tokenizer.tokens
        else vocabulary_files(source)
        if all_told
        else None
        for source, tokenizer in zip(inputs, read, strict=True)
    ]
    told = [tokens for tokens in each if tokens or all_told]
    return all(tokens == told[0] for tokens in told)


def _known(source: Checkpoint, tokenizer: Tokenizer | None) -> Tokenizer:
    """Return a model's tokenizer. Raises VocabularyError where it has none."""
    if tokenizer is None or not tokenizer.tokens:
        raise VocabularyError(f"{without_tokenizer(source)}, or leave 'tokenizer' out")
    return tokenizer


def without_tokenizer(source: Checkpoint) -> str:
    """Return what to say of a model whose tokens can't be told."""
    remedy = "Save its tokenizer by transformers (AutoTokenizer.from_pretrained(…).save_pretrained(…))"
    if source.tokenizer_folder is None:
        remedy = "Put it into a folder with that of the model it was made from, and name the folder"
    return f"{source.reference}: has no tokenizer.json to tell which row is which token's. {remedy}"


def _models(inputs: Sequence[Checkpoint], read: Sequence[Tokenizer | None]) -> list[_Model]:
    """Return the tokens of all models in forms that can be compared. Raises VocabularyError."""
    known = [_known(source, each) for source, each in zip(inputs, read, strict=True)]
    in_bytes = len({each.alphabet for each in known}) > 1
    return [_model(at, source, each, in_bytes) for at, (source, each) in enumerate(zip(inputs, known, strict=True))]


def _model(at: int, source: Checkpoint, tokenizer: Tokenizer, in_bytes: bool) -> _Model:
    """Return a model's tokens that have a row. Raises VocabularyError."""
    own = matrices(source)
    counts = {spec.shape[0] for spec in own if spec.shape}
    if len(counts) != 1:
        listed = ", ".join(f"{spec.name} {list(spec.shape)}" for spec in own) or "it has none"
        raise VocabularyError(f"{source.reference}: its embedding and head differ in their rows ({listed})")
    [rows] = counts
    tokens: Mapping[int, Token] = tokenizer.tokens
    if max(tokens) >= rows:
        tokens = {number: text for number, text in tokens.items() if number < rows}
    if in_bytes:
        tokens = {number: tokenizer.as_compared(number, in_bytes=True) for number in tokens}
    return _Model(at, source, tokenizer, tokens, numbers_of(tokens), rows)


def matrices(source: Checkpoint) -> list[TensorSpec]:
    """Return a model's embedding and head, and what else has a row for each token.

    Within a layer (a head of multi-token prediction, or an ``output.weight`` of another kind) that is what has as many
    rows.
    """
    named = [spec for name, spec in source.tensors.items() if tied_weights.is_of_tokens(name, source.tensors)]
    rows = {spec.shape[:1] for spec in named if not tied_weights.NUMBER.search(spec.name)}
    return [spec for spec in named if not tied_weights.NUMBER.search(spec.name) or spec.shape[:1] in rows]


def _width(models: Sequence[_Model], wanted: _Model, needed: int, vocabulary: Vocabulary) -> int:
    """Return the number of rows: of the tokenizer's model, or as the recipe says; room for all ``needed`` always.

    Raises VocabularyError.
    """
    if vocabulary.pad_to_multiple_of or vocabulary.width == "base":
        wide = wanted.rows
    else:
        wide = (max if vocabulary.width == "max" else min)(model.rows for model in models)
    known = max(wanted.rows, sum(len(model.tokens) for model in models))
    return width_of(wanted.source.reference, needed, known, wide, vocabulary.pad_to_multiple_of)


def width_of(reference: str, needed: int, known: int, wide: int, multiple: int | None) -> int:
    """Return a vocabulary's number of rows: ``wide`` of them or ``needed``; with a ``multiple`` those needed, padded.

    ``known`` are as many rows or tokens as there are: far more is a mistake. Raises VocabularyError.
    """
    most = 2 * known + MOST_PADDING
    if needed > most:
        raise VocabularyError(f"{reference}: its tokenizer numbers a token {needed - 1:,}, far beyond others")
    width = max(needed, wide) if multiple is None else -(-needed // multiple) * multiple
    if width > max(most, wide):
        raise VocabularyError(f"pad_to_multiple_of: {multiple:,} makes {width:,} rows for {needed:,} tokens")
    return width


def _own_rows(model: _Model, rows: Sequence[Token | None]) -> npt.NDArray[np.int32]:
    """Return for each row of the output which row of a model is its token's; −1 where it has none."""
    return own_rows(rows, model.tokens, model.numbers, model.rows)


def _defaults(
    own: npt.NDArray[np.int32], base: int | None, given: Mapping[int, Row], forced: npt.NDArray[np.bool_]
) -> Places:
    """Return for each row of the output what models have there that lack its token, as far as any does."""
    has = own >= 0
    having = has.sum(axis=0)
    giver = has.argmax(axis=0)
    if base is not None:
        giver[has[base]] = base
    matrix, row = giver.astype(np.int32), np.take_along_axis(own, giver[None], axis=0)[0]
    is_mean = (having != 1) & ((having < len(own)) | forced) & (True if base is None else ~has[base])
    defaults: dict[int, Row] = {
        number: tuple((at, int(own[at, number])) for at in np.flatnonzero(has[:, number]).tolist())
        for number in np.flatnonzero(is_mean).tolist()
    }
    means: dict[Row, int] = {}
    for number, place in (defaults | dict(given)).items():
        if place and isinstance(place[0], int):
            matrix[number], row[number] = place
        else:
            matrix[number], row[number] = -1 - means.setdefault(place, len(means)), 0
    return Places(matrix, row, tuple(means))  # type: ignore[arg-type]


def _number(wanted: _Model, text: str, new: Mapping[str, int]) -> int:
    """Return the number of the output's token that a recipe means by a text: one of the tokenizer's, or a new one."""
    if (number := wanted.number_of(text)) is not None:
        return number
    if text not in new:  # it is there, under a number that has no row
        raise VocabularyError(f"tokens: {text!r} has no row in {wanted.source.reference}, which gives the tokenizer")
    return new[text]


def _given(row: TokenRow, token: Token, models: Sequence[_Model]) -> Row | None:
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
    own = None if row.other else models[at].numbers.get(token)
    if own is None and (own := models[at].number_of(row.other or row.token)) is None:
        raise VocabularyError(
            f"tokens: {row.model}, the source of {row.token!r}, has no token {row.other or row.token!r}"
        )
    return at, own


def _places(model: _Model, own: npt.NDArray[np.int32], default: Places, forced: npt.NDArray[np.bool_]) -> Places | None:
    """Return where a model's rows of the output are from: its own, or the default; None where nothing moves."""
    is_own = (own >= 0) & ~forced
    matrix, row = np.where(is_own, model.at, default.matrix), np.where(is_own, own, default.row)
    if len(row) == model.rows and (matrix == model.at).all() and (row == np.arange(len(row))).all():
        return None
    return Places(matrix.astype(np.int32), row.astype(np.int32), default.means).part(0, len(row))


def _with_rows(model: _Model, models: Sequence[_Model], places: Places | None) -> Checkpoint:
    """Return a model with its vocabulary's tensors in the output's order; the same one where nothing moves."""
    if places is None:
        return model.source
    tensors: dict[str, TensorSpec] = dict(model.source.tensors)
    for own in matrices(model.source):
        found = [tied_weights.counterpart(own.name, each.source.tensors) for each in models]
        if len({spec.shape[1:] for spec in found if spec is not None}) > 1:
            raise VocabularyError(f"{own.name}: its rows are not of the same length in all models")
        lacking = [number for number, spec in enumerate(found) if spec is None]
        sources = [spec or own for spec in found]
        tensors[own.name] = gathered(own, sources, places.without(lacking) if lacking else places)
    return replace(model.source, tensors=tensors)


def _told(model: _Model, own: npt.NDArray[np.int32], rows: Sequence[Token | None], end: str = "") -> str:
    """Return in a line how a model's tokens are those of the output; empty where all are the same."""
    is_token = np.array([token is not None for token in rows], bool)
    lacking = int((is_token & (own < 0)).sum())
    same = int((is_token & (own == np.arange(len(rows)))).sum())
    moved = int(is_token.sum()) - same - lacking
    lost = _lost(model, own, rows)
    if not moved and not lacking and not lost and model.rows == len(rows):
        return ""
    parts = [f"{counted(same, 'token')} at the same place", f"{moved:,} at another", f"{lacking:,} it lacks"]
    examples = ", ".join(repr(_shown(token)) for token in lost[:SHOWN]) + (" …" if len(lost) > SHOWN else "")
    parts += [f"{len(lost):,} that only it has are left out: {examples}"] if lost else []
    return f"{model.source.reference}: {', '.join(parts)}; {end or f'{model.rows:,} rows become {len(rows):,}'}"


def _lost(model: _Model, own: npt.NDArray[np.int32], rows: Sequence[Token | None]) -> list[Token]:
    """Return the tokens of a model that the output lacks, the highest number first."""
    is_used = np.zeros(model.rows, bool)
    is_used[own[own >= 0]] = True
    numbers = np.fromiter(model.numbers.values(), np.int64, len(model.numbers))
    unused = sorted(numbers[~is_used[numbers]].tolist(), reverse=True)
    kept = set(rows) if unused else set()  # a text that is two tokens' may have its other row there
    return [token for number in unused if (token := model.tokens[number]) not in kept]


def _shown(token: Token) -> str:
    if isinstance(token, int):
        return f"<0x{token:02X}>"
    return shortened(token.decode(errors="replace") if isinstance(token, bytes) else token, 30)


def _roles(models: Sequence[_Model], wanted: _Model) -> list[str]:
    """Return where models use other tokens in special roles than the output's tokenizer."""
    own = wanted.tokenizer.special
    lines = []
    for model in models:
        other = model.tokenizer.special
        both = [role for role in own if role in other and other[role] != own[role]]
        differing = [f"{role} {_shown(other[role])!r}, here {_shown(own[role])!r}" for role in both]
        if differing:
            lines.append(f"{model.source.reference} uses other special tokens: {', '.join(differing)}")
    return lines
