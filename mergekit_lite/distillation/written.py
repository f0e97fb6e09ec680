"""Prompts that a model writes as it is asked to: of drawn skills, or like given ones.

Each request is the recipe's text with its fields filled in. Lines of lists are drawn by the seed, such as two skills
and a kind of question of Instruct-SkillMix (Kaur et al. 2024, arXiv 2408.14774); given prompts, with their good answers
if wanted, are taken in turn, as REFED does for its new instructions (Mehri et al. 2025, arXiv 2502.04511). The words
are the recipe's, but for how the reply is to be given.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from xxhash import xxh3_64_hexdigest

from mergekit_lite.answers.asking import Task
from mergekit_lite.answers.prompts import load
from mergekit_lite.answers.respondents import respondent
from mergekit_lite.answers.rows import Message, Prompt, seed_of
from mergekit_lite.answers.scoring.judging import conversation
from mergekit_lite.answers.thoughts import parts_of
from mergekit_lite.distillation.drawing import Draws
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.choosing import Written
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.errors import UnreadableError, UsageError, counted, listing
from mergekit_lite.input_files import read_text

FORM = "Write that message alone, as the user would type it, without a word before it or after it."
MOST = 16 << 20  # bytes of a list
SHOWN = 5


def draws_of(written: Written, domain: str, folder: Path, seed: int, reporter: Reporter) -> Draws:
    """Return the draws of a model that writes prompts.

    Args:
        written: what it is asked.
        domain: of the prompts.
        folder: the recipe's.
        seed: the recipe's.
        reporter: is told of given prompts that were left out.

    Raises:
        UsageError: a list or the given prompts can't be read, or have too little.
    """
    lists = {name: _lines(each.path, each.each) for name, each in written.lists.items()}
    given = _given(written, reporter)
    in_turn = _shots(_in_turn(given, seed_of(seed, "written", written.name)), written.shots)
    tasks = [
        Task(
            Prompt(f"{written.name}:{number}", (Message(role="user", content=_request(written, lists, of, drawing)),)),
            0,
            drawing,
        )
        for number, of in zip(range(written.number), in_turn, strict=False)
        for drawing in [seed_of(seed, "written", written.name, number)]
    ]
    drawn = [(name, each.each, lists[name]) for name, each in sorted(written.lists.items())]
    content = [FORM, written.request, written.shots, drawn, [sorted(each.items()) for each in given]]
    return Draws(
        written,
        folder,
        Folder(folder).written(written.name),
        domain,
        tasks,
        # Other numbers of draws have the same requests at their beginning.
        {"requests": xxh3_64_hexdigest(repr(content).encode("utf-8", "surrogatepass")), "seed": seed},
        lambda log: respondent(written, written.model, log),
        _said,
    )


def _lines(path: Path, needed: int) -> list[str]:
    """Return the lines of a list, each once."""
    try:
        lines = dict.fromkeys(line.strip() for line in read_text(path, MOST).splitlines())
    except UnreadableError as error:
        raise UsageError(f"Can't read the list {path}: {error.reason}.") from error
    lines.pop("", None)
    if len(lines) < needed:
        raise UsageError(f"{path}: {counted(len(lines), 'line')}, of which {needed:,} are drawn at a time.")
    return list(lines)


def _given(written: Written, reporter: Reporter) -> list[Mapping[str, str]]:
    """Return the fields of the given prompts; those that lack a reference that is asked about are left out."""
    if not written.of:
        return []
    loaded = load(written.of)
    needs = "reference" in written.fields
    lacking = [prompt for prompt in loaded.prompts if needs and not prompt.reference]
    problems = [*loaded.problems, *(f"{loaded.places[prompt.id]}: no 'reference'" for prompt in lacking)]
    if problems:
        left_out = f"{written.name}: {counted(len(problems), 'row')} of the given prompts left out"
        reporter.warn(listing(left_out, problems, SHOWN))
    left = {prompt.id for prompt in lacking}
    found = [_fields(prompt) for prompt in loaded.prompts if prompt.id not in left]
    texts = len({each["prompt"] for each in found})
    if 0 < texts < written.shots:
        raise UsageError(f"{written.name}: {counted(texts, 'prompt')} given, where `shots` wants {written.shots:,}.")
    if not found:
        raise UsageError(listing(f"{written.name}: there is no prompt to write others of", problems or ["no rows"]))
    return found


def _fields(prompt: Prompt) -> Mapping[str, str]:
    alone = len(prompt.messages) == 1
    text = prompt.messages[0]["content"] if alone else conversation(prompt)
    return {"prompt": text, "reference": prompt.reference or ""}


def _in_turn(given: Sequence[Mapping[str, str]], seed: int) -> Iterator[Mapping[str, str]]:
    """Yield the given prompts again and again, each time in another order; without any, nothing for each request."""
    for turn in count():
        yield from sorted(given, key=lambda each: seed_of(seed, turn, each["prompt"])) or [{}]


def _shots(in_turn: Iterator[Mapping[str, str]], number: int) -> Iterator[Mapping[str, str]]:
    """Yield the fields of each request: of one given prompt, or of several with tags around each."""
    if number == 1:
        yield from in_turn
    while True:
        texts: dict[str, None] = {}
        while len(texts) < number:  # where one turn ends and the next begins, a prompt may come twice
            texts[next(in_turn)["prompt"]] = None
        yield {"prompt": "\n\n".join(f"<message>\n{text}\n</message>" for text in texts)}


def _request(written: Written, lists: Mapping[str, Sequence[str]], of: Mapping[str, str], seed: int) -> str:
    """Return the text of a request, with a given prompt and lines that the seed draws."""
    drawn = {
        name: ", ".join(lines[place] for place in _places(len(lines), written.lists[name].each, seed, name))
        for name, lines in lists.items()
    }
    return f"{written.request.format(**drawn, **of).strip()}\n\n{FORM}"


def _places(number: int, wanted: int, *seed: object) -> list[int]:
    """Draw some of a number of places, each once."""
    found: dict[int, None] = {}
    for draw in count():
        if len(found) == wanted:
            break
        found[seed_of(*seed, draw) % number] = None
    return list(found)


def _said(row: Mapping[str, Any]) -> str:
    """Return the prompt in a reply: what is said after thoughts, without quotation marks around all of it."""
    text = parts_of(row).answer.strip()
    inside = text[1:-1]
    return inside if len(text) > 1 and text[0] == text[-1] == '"' and '"' not in inside else text
