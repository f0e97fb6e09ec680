"""What the tokens of a loaded tokenizer spell: bytes, whatever alphabet its vocabulary is written in."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

from mergekit_lite.answers.template import QUESTION, ChatTemplate, TemplateError
from mergekit_lite.checkpoint.tokenizer_file import BYTE, ROLES, Alphabet, alphabet_in

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "a  b\n\nc"  # what a tokenizer that keeps blanks gives back as it is


class Spelling:
    """The bytes of a tokenizer's tokens.

    A token that was added stands for its own text; one of the vocabulary for what its alphabet writes it with:
    byte-level, SentencePiece, or plain text with a mark for a piece inside a word (WordPiece) or at its end.

    Attributes:
        alphabet: how the vocabulary is written. Where a tokenizer has no ``tokenizer.json``: by its tokens.
        unknown: the id of the token for what the others can't spell; None where that is the end of text, too.
        special: ids of the special tokens.
        frame: those of them that a template may write around a text: all but the unknown one.
    """

    def __init__(self, tokenizer: PreTrainedTokenizerBase) -> None:
        backend = getattr(tokenizer, "backend_tokenizer", None)
        content: dict[str, Any] = json.loads(backend.to_str()) if backend is not None else {}
        model = content.get("model") or {}
        self._inside: str = model.get("continuing_subword_prefix") or ""
        self._at_end: str = model.get("end_of_word_suffix") or ""
        self._tokenizer = tokenizer
        self._added = {number: token.content for number, token in tokenizer.added_tokens_decoder.items()}
        special = {number for number, token in tokenizer.added_tokens_decoder.items() if token.special}
        self.special = frozenset({*tokenizer.all_special_ids, *special})
        self.alphabet = alphabet_in(content) if content else _alphabet_of(tokenizer.get_vocab())
        self.unknown = tokenizer.unk_token_id if tokenizer.unk_token_id != tokenizer.eos_token_id else None
        self.frame = self.special - {self.unknown}
        self._known: dict[int, bytes | None] = {}

    def of(self, token: int) -> bytes | None:
        """Return the bytes that a token stands for; None where there is no token of this number."""
        if token not in self._known:
            self._known[token] = self._spelled(token)
        return self._known[token]

    def pieces(self, ids: Sequence[int]) -> Iterator[bytes | None]:
        """Yield the bytes of each of these tokens."""
        return map(self.of, ids)

    @property
    def rows(self) -> int:
        """One more than the largest id."""
        return max(self._vocabulary, default=-1) + 1

    def readings(self, token: int) -> tuple[bytes, ...]:
        """Return what a token stands for in any text, the likeliest first.

        The first piece of a word of WordPiece, whose blanks are dropped, is read with a blank before it and without.
        A special token stands for no text: it has no readings.
        """
        if token in self.special or token not in self._vocabulary:
            return ()
        spelled = self.of(token) or b""
        begins = self._inside and token not in self._added and not self._vocabulary[token].startswith(self._inside)
        return (b" " + spelled, spelled) if begins else (spelled,)

    def text(self, token: int) -> str:
        """Return a token as the vocabulary writes it."""
        return self._vocabulary.get(token, "")

    @cached_property
    def numbers(self) -> dict[bytes, int]:
        """The id of each token by its bytes; of several the one that isn't a byte's stand-in, then the lowest."""
        likeliest: dict[bytes, int] = {}
        others: dict[bytes, int] = {}
        for token in sorted(range(self.rows), key=self._stands_in):  # stable
            for place, read in enumerate(self.readings(token)):
                (others if place else likeliest).setdefault(read, token)
        return others | likeliest

    def _stands_in(self, token: int) -> bool:
        """Return whether a token is a byte's, for texts without a token of their own (``<0x41>``)."""
        return self.alphabet is Alphabet.WORDS and BYTE.fullmatch(self.text(token)) is not None

    @cached_property
    def _vocabulary(self) -> dict[int, str]:
        return {number: str(token) for token, number in self._tokenizer.get_vocab().items()}

    @cached_property
    def roles(self) -> dict[str, int]:
        """The ids of special tokens by what they are for; ``end_of_turn`` is the chat template's own."""
        found = {role: getattr(self._tokenizer, f"{role}_id", None) for role in ROLES}
        known = {role: token for role, token in found.items() if isinstance(token, int)}
        try:
            answered = ChatTemplate(self._tokenizer).tokens(QUESTION, PROBE)
        except TemplateError:
            return known
        return {"end_of_turn": answered.response[-1]} | known if answered.response[-1] in self.special else known

    @cached_property
    def keeps_blanks(self) -> bool:
        """Whether blanks and line breaks of a text are all in its tokens."""
        ids = self._tokenizer(PROBE, add_special_tokens=False)["input_ids"]
        return PROBE.encode() in b"".join(piece or b"" for piece in self.pieces(ids))

    def _spelled(self, token: int) -> bytes | None:
        if token in self._added:
            added = self._added[token]
            # Runs of blanks that Gemma's tokenizers list as added are tokens of the vocabulary still.
            return added.encode() if token in self.special else self._plain(added, Alphabet.BYTES)
        text: Any = self._tokenizer.convert_ids_to_tokens(int(token))  # bytes in tiktoken's wrappers
        if not isinstance(text, str):
            return text if isinstance(text, bytes) else None
        if self._inside:
            text = text.removeprefix(self._inside)
        if self._at_end:
            text = text.removesuffix(self._at_end)
        return self._plain(text)

    def _plain(self, text: str, but: Alphabet | None = None) -> bytes:
        if self.alphabet is but:
            return text.encode()
        decoded = self.alphabet.decoded(text)
        if isinstance(decoded, int):
            return bytes([decoded])
        return decoded.encode() if isinstance(decoded, str) else decoded


def _alphabet_of(vocabulary: dict[Any, int]) -> Alphabet:
    """Return the alphabet that a vocabulary without a ``tokenizer.json`` is written in, by how it writes blanks."""
    begins = {token[:1] for token in vocabulary if isinstance(token, str) and len(token) > 1}
    if "Ġ" in begins:
        return Alphabet.BYTES
    return Alphabet.WORDS if "▁" in begins else Alphabet.PLAIN


@lru_cache(16)
def spelling_of(tokenizer: PreTrainedTokenizerBase) -> Spelling:
    """Return what the tokens of a tokenizer spell; made once for each."""
    return Spelling(tokenizer)
