"""FuseLLM's map of vocabularies by edit distance (2401.10491, MinED), for reproduction.

Distances (Levenshtein) are found bit-parallel: a column of the table at once (Myers 1999, in the form of Hyyrö 2003).
For two vocabularies of 150,000 that takes some ten minutes of a core.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import lru_cache
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mergekit_lite.checkpoint.tokenizer_file import WORD
from mergekit_lite.distillation.alignment.spelling import spelling_of
from mergekit_lite.distillation.alignment.vocabulary import NOBODY, VocabularyMap

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

WIDTH = 64  # letters of a word that numpy can do with
ONE = np.uint64(1)


def edit_distance_map(
    student: PreTrainedTokenizerBase, teacher: PreTrainedTokenizerBase, *, rows: int | None = None
) -> VocabularyMap:
    """Map each of the teacher's tokens to itself or else to the student's nearest by edit distance (FuseLLM's MinED).

    For reproduction. Its flaws: every token gets one, however far: ``Ġutterly`` may become ``Ġbitterly``, a number
    another number; special tokens are words like others; byte-level letters of one character count by themselves; of
    equally near ones the first of the vocabulary is taken, which means nothing. ``exact_map`` has none where
    there is none.

    Args:
        student: its tokenizer.
        teacher: its tokenizer.
        rows: of the teacher's head, where it has more than its tokenizer has tokens.
    """
    own, other = spelling_of(student), spelling_of(teacher)
    words = {_marked(own.text(token)): token for token in reversed(range(own.rows)) if own.text(token)}
    ordered = sorted(words, key=words.__getitem__)
    nearest = Nearest(ordered)
    found = np.full(max(other.rows, rows or 0), NOBODY, np.int32)
    for token in range(other.rows):
        word = _marked(other.text(token))
        if word:
            found[token] = words[word] if word in words else words[ordered[nearest.to(word)]]
    return VocabularyMap(found)


def _marked(word: str) -> str:
    """Return a token as it is written, with a blank for its mark of one."""
    return " " + word[1:] if word[:1] in ("Ġ", WORD) else word


@lru_cache(1 << 16)
def edit_distance(one: str, other: str) -> int:
    """Return the least number of letters to insert, remove or replace that make one word of another."""
    if not one:
        return len(other)
    whole, last = (1 << len(one)) - 1, 1 << (len(one) - 1)
    places = _places(one)
    up, down, distance = whole, 0, len(one)  # where the column rises and falls by one; its last number
    for letter in other:
        equal = places.get(letter, 0)
        across = (((equal & up) + up) ^ up) | equal
        rises, falls = down | ~(across | up) & whole, up & across
        distance += bool(rises & last) - bool(falls & last)
        rises, falls = (rises << 1 | 1) & whole, (falls << 1) & whole
        up, down = falls | ~(equal | down | rises) & whole, rises & (equal | down)
    return distance


def _places(word: str) -> dict[str, int]:
    """Return for each letter of a word a bit at each of its places."""
    places: dict[str, int] = {}
    for place, letter in enumerate(word):
        places[letter] = places.get(letter, 0) | 1 << place
    return places


class Lot(NamedTuple):
    """Words of one length: their numbers, ascending, and the numbers of their letters."""

    words: npt.NDArray[np.int64]
    letters: npt.NDArray[np.int32]  # (words, length)


class Nearest:
    """Finds the nearest of many words by edit distance, of equally near ones the first.

    Words whose length differs by more than the least distance found so far aren't looked at.
    """

    def __init__(self, words: Sequence[str]) -> None:
        """Sort words by length."""
        self._words = words
        self._letters = {letter: number for number, letter in enumerate(sorted({*"".join(words)}))}
        lengths: dict[int, list[int]] = {}
        for number, word in enumerate(words):
            lengths.setdefault(len(word), []).append(number)
        self._lots = {
            length: Lot(np.array(numbers), self._numbered(numbers, length)) for length, numbers in lengths.items()
        }

    def to(self, word: str) -> int:
        """Return the number of the nearest word. There has to be one."""
        best, found = 1 << 30, -1
        for length in sorted(self._lots, key=lambda length: abs(length - len(word))):
            if abs(length - len(word)) > best:
                break
            lot = self._lots[length]
            distances = self._distances(word, lot)
            place = int(distances.argmin())
            number = int(lot.words[place])
            best, found = min((best, found), (int(distances[place]), number))
        return found

    def _numbered(self, numbers: Sequence[int], length: int) -> npt.NDArray[np.int32]:
        letters = [self._letters[letter] for number in numbers for letter in self._words[number]]
        return np.array(letters, np.int32).reshape(len(numbers), length)

    def _distances(self, word: str, lot: Lot) -> npt.NDArray[np.int64]:
        if not 0 < len(word) <= WIDTH:
            return np.array([edit_distance(word, self._words[number]) for number in lot.words])
        return _to_all(len(word), self._masks(_places(word)), lot.letters)

    def _masks(self, places: Mapping[str, int]) -> npt.NDArray[np.uint64]:
        masks = np.zeros(len(self._letters) + 1, np.uint64)
        for letter, mask in places.items():
            if letter in self._letters:
                masks[self._letters[letter]] = mask
        return masks


def _to_all(size: int, masks: npt.NDArray[np.uint64], letters: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
    """Return the distance of a word of ``size`` letters to each of many, as ``edit_distance`` does."""
    last = np.uint64(size - 1)
    up, down = np.full(len(letters), ~np.uint64(0)), np.zeros(len(letters), np.uint64)
    distance = np.full(len(letters), size, np.int64)
    for column in letters.T:
        equal = masks[column]
        across = (((equal & up) + up) ^ up) | equal
        rises, falls = down | ~(across | up), up & across
        distance += (rises >> last & ONE).astype(np.int64) - (falls >> last & ONE).astype(np.int64)
        rises, falls = rises << ONE | ONE, falls << ONE
        equal |= down
        up, down = falls | ~(equal | rises), rises & equal
    return distance
