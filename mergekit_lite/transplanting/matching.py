"""Which rows of a model the tokens of another one's tokenizer get: by their text, special ones by their role."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from mergekit_lite.checkpoint.tokenizer_file import Token, Tokenizer
from mergekit_lite.deferred import np
from mergekit_lite.errors import counted, shortened

if TYPE_CHECKING:
    import numpy.typing as npt

SHOWN = 3
NOBODY = -1


@dataclass(frozen=True)
class Match:
    """The rows of an output that has the donor's tokens.

    Attributes:
        rows: for each row of the output which row of the model it is, −1 where the model has none (int32).
        is_token: whether it stands for a token at all.
        shared: the numbers of the rows whose tokens both have by their text, and that have a row in both (int32).
        roles: special tokens that are matched by their role: (role, the donor's text, the model's).
        lost: texts of the model's tokens that the output lacks.
    """

    rows: npt.NDArray[np.int32]
    is_token: npt.NDArray[np.bool_]
    shared: npt.NDArray[np.int32]
    roles: tuple[tuple[str, str, str], ...]
    lost: tuple[str, ...]

    def told(self, model: str, donor: str, how: str) -> list[str]:
        """Return what the user should know of the rows; ``how`` those are made that the model lacks."""
        missing = int((self.is_token & (self.rows < 0)).sum())
        padding = int((~self.is_token).sum())
        lines = [
            f"{counted(int((self.rows >= 0).sum()), 'token')} of {donor} are in {model}, too, and keep its rows; "
            f"{missing:,} are {how}"
            + (f"; {counted(padding, 'row')} without a token are the mean of the shared ones" if padding else "")
        ]
        lines += [f"special tokens by their role: {self._roles()}"] * bool(self.roles)
        if self.lost:
            examples = ", ".join(repr(shortened(text, 30)) for text in self.lost[:SHOWN])
            more = " …" if len(self.lost) > SHOWN else ""
            lines.append(f"{counted(len(self.lost), 'token')} that only {model} has are left out: {examples}{more}")
        return lines

    def _roles(self) -> str:
        return ", ".join(
            f"{role} {shortened(new, 30)!r} has the row of {shortened(old, 30)!r}" for role, new, old in self.roles
        )


def matched(model: Tokenizer, donor: Tokenizer, rows: int, donor_rows: int, width: int) -> Match:
    """Match the tokens of two tokenizers, whose models have ``rows`` and ``donor_rows``, for an output of ``width``.

    Texts are compared as for a merge: as they are written, or between two alphabets by the bytes that they stand for.
    """
    in_bytes = model.alphabet is not donor.alphabet
    numbers: dict[Token, int] = {}
    for number in sorted(model.tokens):
        if number < rows:
            numbers.setdefault(model.as_compared(number, in_bytes=in_bytes), number)
    found = np.full(width, NOBODY, np.int32)
    is_token = np.zeros(width, bool)
    kept: set[Token] = set()
    for number in donor.tokens:
        token = donor.as_compared(number, in_bytes=in_bytes)
        is_token[number] = True
        found[number] = numbers.get(token, NOBODY)
        kept.add(token)
    shared = np.flatnonzero(found[:donor_rows] >= 0).astype(np.int32)
    roles = _with_roles(found, model, donor, rows)
    replaced = {old for _, _, old in roles}
    texts = (model.tokens[number] for token, number in numbers.items() if token not in kept)
    return Match(found, is_token, shared, roles, tuple(text for text in texts if text not in replaced))


def _with_roles(
    found: npt.NDArray[np.int32], model: Tokenizer, donor: Tokenizer, rows: int
) -> tuple[tuple[str, str, str], ...]:
    """Fill in the rows of special tokens that the model has under another text, and return those."""
    roles = []
    of_model, of_donor = _numbers(model.tokens), _numbers(donor.tokens)
    for role, text in donor.special.items():
        number, own = of_donor.get(text), of_model.get(model.special.get(role, ""))
        if number is not None and own is not None and own < rows and found[number] < 0:
            found[number] = own
            roles.append((role, text, model.special[role]))
    return tuple(roles)


def _numbers(tokens: Mapping[int, str]) -> dict[str, int]:
    return {text: number for number, text in sorted(tokens.items(), reverse=True)}


def digits_at_once(tokenizer: Tokenizer) -> int:
    """Return how many digits the longest token of digits alone has: no piece of a number is longer."""
    texts = (tokenizer.tokens[number].strip("Ġ▁ ") for number in tokenizer.tokens if number not in tokenizer.added)
    return max((len(text) for text in texts if text.isascii() and text.isdigit()), default=0)


def on_digits(model: Tokenizer, donor: Tokenizer) -> list[str]:
    """Return a warning where the two tokenizers cut numbers otherwise."""
    own, other = digits_at_once(model), digits_at_once(donor)
    if own == other:
        return []
    return [
        f"numbers are cut otherwise: tokens had up to {counted(own, 'digit')}, now up to {other:,}. Arithmetic suffers "
        "from that most, until the model is trained on"
    ]
