"""Where in the text of a response each of its tokens ends, in bytes.

The tokens of a response, as ``answers/template.py`` makes them, spell the text in a frame: a blank or closed thoughts
that the template writes before it, marks of its own around thoughts, the end of the turn. The bytes of the tokens are
joined, and the text's parts (thoughts, answer) are looked for in them. What is found is equal byte for byte, but for
the blanks at the borders of a part, which templates strip, and for blanks that the tokenizer itself drops (WordPiece,
T5). Nothing else is taken for the same: where a tokenizer changes case or Unicode forms, a text that it changes has no
ends, and the reason is told.
"""

from __future__ import annotations

import re
from array import array
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from mergekit_lite.answers.thoughts import MARKS, parted
from mergekit_lite.distillation.alignment.spelling import Spelling, spelling_of

if TYPE_CHECKING:
    import numpy.typing as npt
    from transformers import PreTrainedTokenizerBase

UNKNOWN = "the tokenizer has no tokens for a part of the text"
NO_THOUGHTS = "the chat template leaves out the thoughts of the answer"
CHANGED = "the tokens spell another text: the tokenizer or the chat template changes it"

THOUGHT_MARKS = tuple(mark.encode() for pair in MARKS.items() for mark in pair)
CHANNEL = 32  # bytes of the longest name that a template writes between two special tokens
BLANK = b"|".join(re.escape(chr(code).encode()) for code in range(0x3001) if chr(code).isspace())
BLANKS = re.compile(b"(?:" + BLANK + b")*")


def response_ends(
    tokenizer: PreTrainedTokenizerBase, ids: Sequence[int], text: str, *, reasons: Counter[str] | None = None
) -> array[int] | None:
    """Return how many bytes of a response's text are consumed with each of its tokens, ascending.

    Tokens that the template writes before the text (a blank, a line break, closed thoughts, the mark that opens
    thoughts): 0. The token that ends the turn, and what follows: one more than the text has bytes, so that both
    tokenizers' ends of turn meet. A token that ends within the marks between thoughts and answer has consumed the
    thoughts alone, unless the marks are the text's own.

    Args:
        tokenizer: any; slow ones, too.
        ids: the response, or its first tokens, where it was cut.
        text: as it was given to ``ChatTemplate.tokens``: an answer, its thoughts in front of it.
        reasons: counts why there are no ends.

    Returns:
        (len(ids),) int32; None where the text isn't found in the tokens.
    """
    found = _ends(spelling_of(tokenizer), ids, text)
    if isinstance(found, str):
        if reasons is not None:
            reasons[found] += 1
        return None
    return array("i", found.astype(np.int32).tobytes())


class Written(NamedTuple):
    """The bytes that tokens spell."""

    data: bytes
    ends: npt.NDArray[np.int64]  # of each token
    special: Mapping[int, int]  # where special tokens begin: where they end


class Part(NamedTuple):
    """Where the thoughts or the answer lie in the bytes of the text."""

    outer: int  # with the blanks before it that templates may strip
    start: int
    end: int


class Span(NamedTuple):
    """Bytes of the written text that are bytes of the text, from ``at`` on."""

    start: int
    end: int
    at: int


def _ends(spelling: Spelling, ids: Sequence[int], text: str) -> npt.NDArray[np.int64] | str:
    """Return the ends of tokens, or why there are none."""
    pieces = [piece for piece in spelling.pieces(ids) if piece is not None]
    if len(pieces) < len(ids):
        return UNKNOWN
    ends = np.cumsum([len(piece) for piece in pieces], dtype=np.int64)
    special = (number for number, token in enumerate(ids) if token in spelling.frame and pieces[number])
    places = {int(ends[number]) - len(pieces[number]): int(ends[number]) for number in special}
    written = Written(b"".join(pieces), ends, places)
    data, parts = text.encode(), _parts(text)
    found = _consumed(written, data, parts)
    if found is None and not spelling.keeps_blanks:
        found = _consumed_without_blanks(written, data, parts)
    if found is not None:
        return found
    if spelling.unknown in ids:
        return UNKNOWN
    return NO_THOUGHTS if len(parts) > 1 and _consumed(written, data, parts[1:]) is not None else CHANGED


def _parts(text: str) -> list[Part]:
    """Return the places of thoughts, if there are any, and of the answer in the bytes of a text."""
    parts = parted(text)
    answer = _part(text, len(text) - len(parts.answer), len(text))
    if not parts.has_thoughts:
        return [answer]
    before = text[: len(text) - len(parts.text)]
    closing = "" if parts.open else next(mark for mark in MARKS.values() if before.endswith(mark))
    end = len(before) - len(closing)
    thoughts = _part(text, end - len(parts.thoughts.lstrip()), end)
    return [thoughts] if parts.open else [thoughts, answer]


def _part(text: str, start: int, end: int) -> Part:
    whole = text[start:end]
    outer = len(text[:start].encode())
    inner = outer + len(whole.encode()) - len(whole.lstrip().encode())
    return Part(outer, inner, inner + len(whole.strip().encode()))


def _consumed(written: Written, text: bytes, parts: Sequence[Part]) -> npt.NDArray[np.int64] | None:
    """Return the bytes of the text consumed with each token; None where the parts aren't found."""
    whole = Part(parts[0].outer, parts[0].start, parts[-1].end)  # thoughts and answer with the text's own marks between
    for wanted in ([whole], parts)[: len(parts)]:
        places = _located(written, [text[part.start : part.end] for part in wanted], 0)
        if places is not None:
            return _mapped(written, text, _widened(written.data, text, wanted, places))
    return None


def _located(written: Written, wanted: Sequence[bytes], start: int) -> list[tuple[int, int]] | None:
    """Return where parts of the text were written, from a place on; the last that is found may be cut by the end."""
    part, *others = wanted
    for place in _frame_ends(written, start):
        end = place + len(part)
        if written.data.startswith(part, place):
            after = _located(written, others, end) if others else [] if _ends_turn(written, end) else None
            if after is not None:
                return [(place, end), *after]
        elif place < len(written.data) < end and part.startswith(written.data[place:]):
            return [(place, len(written.data))]
    return None


def _frame_ends(written: Written, place: int) -> Iterator[int]:
    """Yield where a part of the text may begin: after blanks, after marks of thoughts, after special tokens.

    Between two special tokens there may be a name (``<|channel|>final<|message|>``).
    """
    data, special = written.data, written.special
    named = False
    while True:
        place = _after_blanks(data, place)
        yield place
        mark = next((mark for mark in THOUGHT_MARKS if data.startswith(mark, place)), None)
        if place not in special and mark is None:
            near = range(place + 1, place + CHANNEL) if named else ()
            place = next((near_place for near_place in near if near_place in special), -1)
            if place < 0:
                return
        named = place in special
        place = special[place] if named else place + len(mark or b"")


def _ends_turn(written: Written, place: int) -> bool:
    """Return whether nothing but blanks and special tokens follows."""
    place = _after_blanks(written.data, place)
    while place in written.special:
        place = _after_blanks(written.data, written.special[place])
    return place == len(written.data)


def _after_blanks(data: bytes, place: int) -> int:
    found = BLANKS.match(data, place)
    return found.end() if found else place


def _widened(data: bytes, text: bytes, parts: Sequence[Part], places: Sequence[tuple[int, int]]) -> list[Span]:
    """Return the spans of parts with the bytes around them that are the same in both: blanks, the text's own marks."""
    spans: list[Span] = []
    for number, (part, (start, end)) in enumerate(zip(parts, places, strict=False)):
        at, last = part.start, part.start + end - start
        floor = spans[-1].end if spans else 0
        while at > part.outer and start > floor and data[start - 1] == text[at - 1]:
            start, at = start - 1, at - 1
        stop = places[number + 1][0] if number + 1 < len(places) else len(data)
        limit = parts[number + 1].outer if number + 1 < len(parts) else len(text)
        while end < stop and last < limit and data[end] == text[last]:
            end, last = end + 1, last + 1
        spans.append(Span(start, end, at))
    return spans


def _mapped(written: Written, text: bytes, spans: Sequence[Span]) -> npt.NDArray[np.int64]:
    """Return the bytes of the text consumed with each token, of the spans that they wrote."""
    ends = written.ends
    found = np.zeros(len(ends), np.int64)
    for number, span in enumerate(spans):
        inside = ends >= span.start if number else ends > span.start
        found[inside] = np.minimum(ends[inside], span.end) - span.start + span.at
    turn = min((start for start in written.special if start >= spans[-1].end), default=None)
    if turn is not None:
        found[ends > turn] = len(text) + 1
    return found


def _consumed_without_blanks(written: Written, text: bytes, parts: Sequence[Part]) -> npt.NDArray[np.int64] | None:
    """Do as ``_consumed`` does where the tokenizer drops blanks: each is consumed with the token that follows it."""
    data, before = _dense(written.data)
    dense, places = _dense(text)
    special = {int(before[start]): int(before[end]) for start, end in written.special.items()}
    wanted = [Part(*(int(places[place]) for place in part)) for part in parts]
    found = _consumed(Written(data, before[written.ends], special), dense, wanted)
    if found is None:
        return None
    back = np.concatenate([[0], np.flatnonzero(np.diff(places, prepend=0)), [len(text) + 1]])
    return back[found]


def _dense(data: bytes) -> tuple[bytes, npt.NDArray[np.int64]]:
    """Return bytes without blanks, and for each place, the end included, how many of them are left before it."""
    kept = np.ones(len(data), np.int64)
    for blank in re.finditer(BLANK, data):
        kept[blank.start() : blank.end()] = 0
    return re.sub(BLANK, b"", data), np.concatenate([[0], np.cumsum(kept)])
