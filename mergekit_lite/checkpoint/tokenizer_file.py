"""What a ``tokenizer.json`` says of its tokens: their numbers, which were added, and what alphabet writes them."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from enum import Enum
from typing import TYPE_CHECKING, Any

import xxhash

from mergekit_lite.checkpoint.folder import small_file
from mergekit_lite.deferred import np
from mergekit_lite.input_files import read_bytes, read_json

if TYPE_CHECKING:
    import numpy.typing as npt

    from mergekit_lite.checkpoint.checkpoint import Checkpoint

ROLES = ("bos_token", "eos_token", "unk_token", "pad_token", "sep_token", "cls_token", "mask_token")
BYTE = re.compile(r"<0x([0-9A-Fa-f]{2})>")
FLAGS = ("single_word", "lstrip", "rstrip", "normalized", "special")  # of an added token
WORD = "▁"  # SentencePiece's blank
Token = str | bytes | int  # its text; its bytes; the number of a byte that is a token for want of a better one


def _byte_level() -> dict[str, int]:
    """Return the byte of each character of the byte-level alphabet.

    Printable bytes of Latin-1 are written as themselves, all others, in their order, as the characters from U+0100 on
    (GPT-2, Radford et al. 2019).
    """
    plain = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in set(plain)]
    return {chr(byte): byte for byte in plain} | {chr(256 + number): byte for number, byte in enumerate(others)}


BYTE_LEVEL = _byte_level()


class Alphabet(Enum):
    """How a tokenizer writes its tokens."""

    BYTES = "byte-level"  # a character for each byte
    WORDS = "SentencePiece"  # ▁ for a blank, <0xNN> for a byte
    PLAIN = "plain"

    def decoded(self, text: str) -> Token:
        """Return the bytes that a token stands for, or the number of a lone byte that is no text by itself."""
        if self is Alphabet.BYTES and all(character in BYTE_LEVEL for character in text):
            data = bytes(BYTE_LEVEL[character] for character in text)
            return data[0] if len(data) == 1 and data[0] > 127 else data
        if self is Alphabet.WORDS:
            if byte := BYTE.fullmatch(text):
                return int(byte[1], 16)
            text = text.replace(WORD, " ")
        return text.encode()


@dataclass(frozen=True)
class Tokenizer:
    """The tokens of a model by their numbers, the flags of added ones, their alphabet, and special ones by role."""

    tokens: Mapping[int, str]
    added: Mapping[int, Mapping[str, bool]]
    alphabet: Alphabet
    special: Mapping[str, str]

    def as_compared(self, number: int, *, in_bytes: bool) -> Token:
        """Return a token as it is compared with others: its text, or between two alphabets what that stands for."""
        text = self.tokens[number]
        if not in_bytes:
            return text
        return text.encode() if number in self.added else self.alphabet.decoded(text)


def alphabet_in(content: Mapping[str, Any]) -> Alphabet:
    """Return how the tokens in the content of a ``tokenizer.json`` are written."""
    return _tokenizer_in(content).alphabet


def read_tokenizers(sources: Sequence[Checkpoint]) -> list[Tokenizer | None]:
    """Read each model's ``tokenizer.json`` and the special tokens beside it; None where it has none.

    Files of equal bytes are read once. Raises CheckpointError where a file can't be read.
    """
    known: dict[bytes, Tokenizer] = {}
    read: list[Tokenizer | None] = []
    for source in sources:
        path = small_file(source.tokenizer_folder, "tokenizer.json") if source.tokenizer_folder else None
        if path is None:
            read.append(None)
            continue
        digest = xxhash.xxh3_128(read_bytes(path)).digest()
        if digest not in known:
            known[digest] = _tokenizer_in(read_json(path))
        read.append(replace(known[digest], special=_special(source)))
    return read


def numbers_of(tokens: Mapping[int, Token]) -> dict[Token, int]:
    """Return the number of each token; of a text that is two tokens' the first one."""
    return {tokens[number]: number for number in sorted(tokens, reverse=True)}


def own_rows(
    wanted: Sequence[Token | None], tokens: Mapping[int, Token], numbers: Mapping[Token, int], rows: int
) -> npt.NDArray[np.int32]:
    """Return for each wanted token which row of a model is its; −1 where it has none.

    A text that is two tokens' stays at its number where the model has it there. Padding, where no token is wanted, is
    the same row of whoever has one there that stands for nothing.

    Args:
        wanted: the tokens, in the order that is wanted.
        tokens: the model's by number, those alone that have a row.
        numbers: their numbers, as of ``numbers_of``.
        rows: of the model.
    """
    own = [numbers.get(token, -1) for token in wanted]  # type: ignore[arg-type]
    apart = [number for number, token in enumerate(wanted) if token is None]
    if len(numbers) < len(tokens):
        apart = [number for number, token in enumerate(wanted) if token == tokens.get(number)]
    for number in apart:
        own[number] = number if number < rows and wanted[number] == tokens.get(number) else -1
    return np.array(own, np.int32)


def _tokenizer_in(content: Mapping[str, Any]) -> Tokenizer:
    """Return the tokenizer in the content of a ``tokenizer.json``, without special tokens."""
    added = content.get("added_tokens")
    listed = [token for token in added if isinstance(token, dict)] if isinstance(added, list) else []
    flags = {
        token["id"]: {flag: bool(token.get(flag, False)) for flag in FLAGS}
        for token in listed
        if _is_number(token.get("id"))
    }
    return Tokenizer(vocabulary_in(content), flags, _alphabet(content), {})


def vocabulary_in(content: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens in the content of a ``tokenizer.json`` by their numbers."""
    tokens = _words(content)
    added = content.get("added_tokens")
    for token in added if isinstance(added, list) else ():
        if isinstance(token, dict) and _is_number(token.get("id")):
            tokens[token["id"]] = str(token.get("content"))
    return tokens


def _words(content: Mapping[str, Any]) -> dict[int, str]:
    """Return the tokens of the vocabulary itself by their numbers, without those that were added."""
    model = content.get("model")
    vocabulary = model.get("vocab") if isinstance(model, dict) else None
    if isinstance(vocabulary, dict):
        return {number: token for token, number in vocabulary.items() if _is_number(number)}
    listed = vocabulary if isinstance(vocabulary, list) else []  # unigram: [token, score], numbered by their order
    return {number: str(entry[0]) for number, entry in enumerate(listed) if isinstance(entry, list) and entry}


def _is_number(value: object) -> bool:
    """Return whether a value can be the number of a row."""
    return isinstance(value, int) and not isinstance(value, bool) and value >= 0


def _alphabet(content: Mapping[str, Any]) -> Alphabet:
    if "ByteLevel" in _kinds([content.get("pre_tokenizer"), content.get("decoder")]):
        return Alphabet.BYTES
    words = _words(content).values()
    return Alphabet.WORDS if any(text.startswith(WORD) for text in words) else Alphabet.PLAIN


def _kinds(parts: Any) -> set[str]:
    """Return the types of all steps in a part of a ``tokenizer.json``, however they are nested."""
    if isinstance(parts, list):
        return {kind for part in parts for kind in _kinds(part)}
    if not isinstance(parts, dict):
        return set()
    own = {str(parts["type"])} if "type" in parts else set()
    return own | {kind for value in parts.values() for kind in _kinds(value)}


def _special(source: Checkpoint) -> dict[str, str]:
    special: dict[str, str] = {}
    for name in ("special_tokens_map.json", "tokenizer_config.json"):
        path = small_file(source.tokenizer_folder, name) if source.tokenizer_folder else None
        content = read_json(path) if path else {}
        for role in ROLES:
            value = content.get(role)
            text = value.get("content") if isinstance(value, dict) else value
            if isinstance(text, str):
                special[role] = text
    return special
