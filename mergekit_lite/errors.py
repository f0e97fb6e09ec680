"""Errors that the package raises on purpose, and the words that their messages share.

A message says what happened, where (tensor, file), what was expected and got, and what to do now.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from difflib import get_close_matches

GOES_ON = "A command that takes --resume goes on with what was finished."
UNFINISHED = (
    "With the recipe and options that it had --resume goes on with it, --force starts over and throws away what it made"
)
OF_ANOTHER_PLAN = f"holds an unfinished run of another plan (other models, options or version). {UNFINISHED}."
SHOWN_PROBLEMS = 20
SHOWN_CHARACTERS = 400


class MergekitLiteError(Exception):
    """Base of every error this package raises on purpose. The command line prints it without a traceback."""

    exit_code = 1


class UsageError(MergekitLiteError):
    """The request itself is wrong (an option, a name, a path): nothing was read or written."""

    exit_code = 2


class CheckpointError(MergekitLiteError):
    """A checkpoint can't be used: missing, damaged, hostile, or in a format that is refused by name."""


class UnreadableError(CheckpointError):
    """A small file can't be read, or doesn't hold what it should; ``why`` says so without the path."""

    def __init__(self, path: object, why: str):
        self.why = why
        super().__init__(f"{path}: {why}.")

    @property
    def reason(self) -> str:
        """The reason alone, for a message that says already that the file can't be read."""
        return self.why.removeprefix("can't be read: ")


class PlanError(MergekitLiteError):
    """The inputs don't fit together. Carries every problem that was found, not only the first."""

    def __init__(self, problems: Sequence[str]):
        self.problems = tuple(problems)
        super().__init__(listing(f"{counted(len(problems), 'problem')} in the plan, nothing was written", problems))


class NonFiniteError(MergekitLiteError):
    """An input holds NaN or infinity, and the run was not asked to accept that."""


class RunError(MergekitLiteError):
    """Reading or writing failed during a run. What was finished is kept for ``--resume``."""


def counted(number: int, noun: str) -> str:
    """Return a number with its noun: ``3 tensors``, ``1 tensor``."""
    return f"{number:,} {noun}" if number == 1 else f"{number:,} {noun}s"


def listing(title: str, lines: Sequence[str], shown: int = SHOWN_PROBLEMS) -> str:
    """Return a title with a list under it, cut after ``shown`` lines, with a count of the rest; cut long lines too."""
    rest = len(lines) - shown
    tail = [f"  - … and {rest:,} more"] if rest > 0 else []
    return "\n".join([f"{title}:", *(f"  - {shortened(line)}" for line in lines[:shown]), *tail])


def said_once(said: Iterable[tuple[str, str]]) -> list[str]:
    """Return a line for each thing that is said of tensors: what is said of many of them is one line."""
    names: dict[str, list[str]] = {}
    for name, what in said:
        names.setdefault(what, []).append(name)
    return [f"{first_of(each)}: {what}" for what, each in names.items()]


def first_of(tensors: Sequence[str]) -> str:
    """Return the names of one or two tensors; of more the first one, with the number of the others."""
    return " and ".join([tensors[0], f"{len(tensors) - 1} more tensors"] if len(tensors) > 2 else tensors)


def refuse(where: object, problems: Sequence[str], subject: str) -> None:
    """Raise CheckpointError where there are problems with the subject; all of them are named."""
    if problems:
        raise CheckpointError(listing(f"{where}: {counted(len(problems), 'problem')} with {subject}", problems))


def shortened(text: object, limit: int = SHOWN_CHARACTERS) -> str:
    """Return the text, or its start where it is longer than ``limit`` characters."""
    text = str(text)
    return text if len(text) <= limit else f"{text[:limit]}… ({len(text):,} characters)"


def one_line(text: object, limit: int = SHOWN_CHARACTERS) -> str:
    """Return what others wrote (a server, a program) as one line of printable text, cut as ``shortened`` cuts."""
    printable = "".join(character if character.isprintable() else " " for character in str(text))
    return shortened(" ".join(printable.split()), limit)


def nearest(name: str, known: Iterable[str]) -> str:
    """Return `` Did you mean 'x'?`` for the known name closest to ``name``; an empty string where none is close."""
    close = get_close_matches(name, list(known), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def reason(error: Exception) -> str:
    """Return what a system's error says, without its number and path, which the message around it names."""
    return getattr(error, "strerror", None) or str(error)
