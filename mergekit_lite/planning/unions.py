"""Tokens put behind a tokenizer's own: those of other models, where none has the tokens of all, and new ones.

They become added tokens, as in mergekit 0.1.5: literal strings that are found before a text is split into words. So
most of them are reached by no text, and others cut texts as neither model was taught. Both are counted here, by the
tokenizer itself. mergekit numbers them in an order that changes from run to run, here it is that of the models.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from mergekit_lite.checkpoint import Checkpoint
from mergekit_lite.checkpoint.folder import small_file
from mergekit_lite.checkpoint.tokenizer_file import FLAGS, Token, Tokenizer
from mergekit_lite.errors import counted, shortened
from mergekit_lite.input_files import read_json

SHOWN = 3
TOKENIZER = "tokenizer.json"
PLAIN = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": True, "special": False}


class Appended(NamedTuple):
    """A token that a tokenizer gets: its number, its text, and how it is compared with those of models."""

    number: int
    text: str
    token: Token
    entry: Mapping[str, Any]  # among the added tokens of ``tokenizer.json``
    said: str | None  # what it stands for in a text, if that is text; None for an added token of its own model


@dataclass(frozen=True)
class Union:
    """What a tokenizer gets: new tokens, and its own that other models treat as added ones."""

    new: tuple[Appended, ...] = ()
    known: tuple[Mapping[str, Any], ...] = ()

    @property
    def entries(self) -> tuple[Mapping[str, Any], ...]:
        """The entries of ``tokenizer.json`` that are written."""
        return (*(each.entry for each in self.new), *self.known)


def having_all_tokens(read: Sequence[Tokenizer | None], base: int) -> int:
    """Return which model has a token for each token of the others: the base if it does, else the first; else the base.

    ``read`` are the models' tokenizers.
    """
    texts = [set(tokenizer.tokens.values()) if tokenizer is not None else set() for tokenizer in read]
    every = set().union(*texts)
    order = [base, *(number for number in range(len(read)) if number != base)]
    return next((number for number in order if texts[number] == every), base)


def appended(
    read: Sequence[Tokenizer], wanted: int, rows: Sequence[int], asked: Sequence[str], *, union: bool
) -> Union:
    """Return the tokens that the tokenizer of model ``wanted`` gets.

    First those of its words that other models' vocabularies have, model by model, then what these added; tokens without
    a row are left out. What is special for one model is special in the output. Last come tokens that are ``asked`` for.

    Args:
        read: the models' tokenizers.
        wanted: which of them is the output's.
        rows: of each model.
        asked: texts of tokens that have to be there.
        union: whether it gets the tokens of all models.
    """
    own = read[wanted]
    in_bytes = len({each.alphabet for each in read}) > 1
    numbers = {own.as_compared(number, in_bytes=in_bytes): number for number in sorted(own.tokens, reverse=True)}
    following = iter(range(max(own.tokens, default=-1) + 1, 1 << 62))
    new: dict[int, Appended] = {}
    known: dict[int, Mapping[str, Any]] = {}
    others = [number for number in range(len(read)) if number != wanted] if union else []
    ever_added = {each.tokens[number] for each in read for number in each.added}
    for is_added in (False, True):
        for at in others:
            for number, text in sorted(read[at].tokens.items()):
                is_mine = number in read[at].added if is_added else text not in ever_added
                if number >= rows[at] or not is_mine:
                    continue
                token = read[at].as_compared(number, in_bytes=in_bytes)
                flags = read[at].added.get(number, PLAIN)
                if token not in numbers:
                    at_end = numbers[token] = next(following)
                    said = None if is_added else _said(read[at], number)
                    new[at_end] = Appended(at_end, text, token, _entry(at_end, text, flags), said)
                elif is_added and (mine := numbers[token]) in new:
                    special = bool(new[mine].entry["special"] or flags["special"])
                    new[mine] = new[mine]._replace(entry={**new[mine].entry, "special": special})
                elif is_added:
                    before = known.get(mine) or own.added.get(mine)
                    if before is None or (flags["special"] and not before["special"]):
                        known[mine] = _entry(mine, own.tokens[mine], {**(before or flags), "special": flags["special"]})
    texts = {*own.tokens.values(), *(each.text for each in new.values())}
    for text in dict.fromkeys(asked):
        if text not in texts and text.encode() not in numbers:
            at_end = next(following)
            token = text.encode() if in_bytes else text
            new[at_end] = Appended(at_end, text, token, _entry(at_end, text, PLAIN), None)
    return Union(tuple(new.values()), tuple(known.values()))


def _entry(number: int, text: str, flags: Mapping[str, Any]) -> dict[str, Any]:
    return {"id": number, "content": text, **{flag: bool(flags.get(flag, PLAIN[flag])) for flag in FLAGS}}


def _said(tokenizer: Tokenizer, number: int) -> str | None:
    """Return what a token of a vocabulary stands for in a text; empty where that is no text."""
    token = tokenizer.as_compared(number, in_bytes=True)
    try:
        return token.decode() if isinstance(token, bytes) else ""
    except UnicodeDecodeError:
        return ""


def written_tokenizer(source: Checkpoint, entries: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Return the content of a model's ``tokenizer.json`` with more added tokens. Raises CheckpointError."""
    path = small_file(source.tokenizer_folder, TOKENIZER) if source.tokenizer_folder else None
    content = dict(read_json(path)) if path is not None else {}
    before = content.get("added_tokens")
    added = {each["id"]: each for each in before if isinstance(each, dict)} if isinstance(before, list) else {}
    added |= {entry["id"]: dict(entry) for entry in entries}
    return content | {"added_tokens": [added[number] for number in sorted(added)]}


def examined(source: Checkpoint, union: Union) -> tuple[list[str], list[str]]:
    """Load the tokenizer that will be written, and look at what its new tokens are good for.

    Returns:
        What the user should know, and what is wrong: the package tokenizers is missing, or gives other numbers.
    """
    try:
        from tokenizers import Tokenizer as Loaded
    except ImportError:
        return [], ["tokens are put behind a tokenizer's own by the package tokenizers: pip install tokenizers"]
    try:
        loaded: Any = Loaded.from_str(json.dumps(written_tokenizer(source, union.entries)))
    except Exception as error:  # the library raises nothing else
        return [], [f"{source.reference}: the package tokenizers can't load its tokenizer.json: {error}"]
    wrong = [each for each in union.new if loaded.token_to_id(each.text) != each.number]
    if wrong:
        text, number = shortened(wrong[0].text, 30), wrong[0].number
        return [], [
            f"{source.reference}: its tokenizer leaves out numbers, so that what is put behind it has none of its own: "
            f"{text!r} should be {number}, and is {loaded.token_to_id(wrong[0].text)}"
        ]
    return list(_told(loaded, source, union)), []


def _told(loaded: Any, source: Checkpoint, union: Union) -> Iterator[str]:
    pieces = [each for each in union.new if each.said is not None]
    others = [each for each in union.new if each.said is None]
    if others:
        yield f"{counted(len(others), 'token')} added to the tokenizer of {source.reference}: {_listed(others)}"
    if not pieces:
        return
    encoded = loaded.encode_batch([each.said for each in pieces], add_special_tokens=False)
    is_reached = [each.number in encoding.ids for each, encoding in zip(pieces, encoded, strict=True)]
    lost = [each for each, reached in zip(pieces, is_reached, strict=True) if not reached]
    literal = [each for each, reached in zip(pieces, is_reached, strict=True) if reached]
    told = [f"{len(lost):,} that no text reaches ({_listed(lost)})"] if lost else []
    if literal:
        told.append(
            f"{len(literal):,} that match wherever their letters stand, before a text is split: it is cut as for none "
            f"of the models ({_listed(literal)})"
        )
    yield (
        f"union: {counted(len(pieces), 'token')} of other vocabularies are put behind those of {source.reference}: "
        f"{'; '.join(told)}. Their rows are kept and of little use; 'mergekit-lite tokenizer transplant' gives a model "
        "another one's tokenizer in earnest"
    )


def _listed(tokens: Sequence[Appended]) -> str:
    return ", ".join(repr(shortened(each.text, 30)) for each in tokens[:SHOWN]) + " …" * (len(tokens) > SHOWN)
