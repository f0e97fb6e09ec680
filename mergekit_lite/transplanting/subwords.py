"""Tokens in pieces: what a tokenizer cuts the text of another one's token into."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from mergekit_lite.checkpoint.tokenizer_file import BYTE_LEVEL, WORD, Alphabet, Token, Tokenizer
from mergekit_lite.errors import CheckpointError
from mergekit_lite.input_files import read_json, read_text

CHARACTERS = {byte: character for character, byte in BYTE_LEVEL.items()}


class Subwords:
    """Cuts bytes into tokens of one tokenizer, by its model alone: what texts are split at before plays no part."""

    def __init__(self, path: Path, tokenizer: Tokenizer, rows: int) -> None:
        """Load a ``tokenizer.json``. Raises CheckpointError where the library isn't there, or refuses the file."""
        try:
            from tokenizers import Tokenizer as Loaded
        except ImportError as error:
            raise CheckpointError("subword needs the package tokenizers: pip install tokenizers") from error
        try:
            self._model: Any = Loaded.from_str(read_text(path)).model
        except Exception as error:  # the library raises nothing else
            raise CheckpointError(f"{path}: the package tokenizers can't load it: {error}") from error
        self._alphabet = tokenizer.alphabet
        self._rows = rows
        self._unknown = getattr(self._model, "unk_token", None)
        self._numbers = {text: number for number, text in tokenizer.tokens.items()}

    def pieces(self, token: Token) -> tuple[int, ...]:
        """Return the numbers of the tokens that bytes are cut into; empty where they can't be."""
        data = bytes([token]) if isinstance(token, int) else token.encode() if isinstance(token, str) else token
        cut = self._tokens(data)
        return cut if cut and all(number < self._rows for number in cut) else ()

    def _tokens(self, data: bytes) -> tuple[int, ...]:
        if self._alphabet is Alphabet.BYTES:
            return self._cut("".join(CHARACTERS[byte] for byte in data))
        try:
            text = data.decode()
        except UnicodeDecodeError:
            numbers = [self._numbers.get(f"<0x{byte:02X}>") for byte in data]
            return tuple(number for number in numbers if number is not None) if None not in numbers else ()
        return self._cut(text.replace(" ", WORD) if self._alphabet is Alphabet.WORDS else text)

    def _cut(self, text: str) -> tuple[int, ...]:
        pieces = self._model.tokenize(text)
        if any(piece.value == self._unknown for piece in pieces):
            return ()
        return tuple(piece.id for piece in pieces)


def halves(path: Path, numbers: Mapping[str, int]) -> dict[int, tuple[int, int]]:
    """Return for each token of a BPE the two that it is joined of, as its first merge says; ``numbers`` are by text."""
    model = read_json(path).get("model")
    merges = model.get("merges") if isinstance(model, dict) else None
    found: dict[int, tuple[int, int]] = {}
    for merge in merges if isinstance(merges, list) else ():
        pair = merge.split(" ") if isinstance(merge, str) else merge
        if isinstance(pair, list) and len(pair) == 2 and all(isinstance(part, str) for part in pair):
            whole, first, second = (numbers.get(text) for text in ("".join(pair), *pair))
            if whole is not None and first is not None and second is not None:
                found.setdefault(whole, (first, second))
    return found
