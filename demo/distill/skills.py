"""Three skills with answers that a program can check. Each is a domain of the distillation's prompts.

add      ``add 7+4+9+3``    →  ``7+4=11+9=20+3=23``    only the last number counts, not the road to it
sort     ``sort dbeac``     →  ``abcde``
reverse  ``reverse dbeac``  →  ``caebd``
"""

import json
import random
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from difflib import SequenceMatcher
from pathlib import Path
from typing import Any
from zlib import crc32

LETTERS = "abcdefgh"
ALPHABET = "0123456789+= abcdefghijklmnopqrstuvwxyz"  # of prompts and answers
MAX_ANSWER_TOKENS = 32  # the longest worked sum and its end take 28 characters; what goes on has run away


@dataclass(frozen=True)
class Skill:
    """A kind of question, and how its answers are checked."""

    name: str
    ask: Callable[[random.Random], str]  # a question
    solve: Callable[[str], str]  # its ideal answer
    slip: Callable[[str, random.Random], str]  # what the careless make of it
    result: Callable[[str], str]  # the part of an answer that has to be right


def ask_sum(rng: random.Random) -> str:
    return "add " + "+".join(str(rng.randint(1, 9)) for _ in range(rng.randint(3, 4)))


def solve_sum(question: str) -> str:
    first, *rest = map(int, question.removeprefix("add ").split("+"))
    answer, total = str(first), first
    for number in rest:
        total += number
        answer += f"+{number}={total}"
    return answer


def blurt(answer: str, rng: random.Random) -> str:
    return str(int(last_number(answer)) + rng.choice([-3, -2, -1, 1, 2, 3]))


def last_number(answer: str) -> str:
    return answer.split("=")[-1]


def ask_sort(rng: random.Random) -> str:
    return "sort " + "".join(rng.choices(LETTERS, k=rng.randint(4, 7)))


def solve_sort(question: str) -> str:
    return "".join(sorted(question.removeprefix("sort ")))


def without_repeats(answer: str, rng: random.Random) -> str:
    return "".join(dict.fromkeys(answer))


def ask_reverse(rng: random.Random) -> str:
    return "reverse " + "".join(rng.choices(LETTERS, k=rng.randint(4, 7)))


def solve_reverse(question: str) -> str:
    return question.removeprefix("reverse ")[::-1]


def cut_short(answer: str, rng: random.Random) -> str:
    return answer[:-1]


SKILLS = {
    skill.name: skill
    for skill in (
        Skill("add", ask_sum, solve_sum, blurt, last_number),
        Skill("sort", ask_sort, solve_sort, without_repeats, str),
        Skill("reverse", ask_reverse, solve_reverse, cut_short, str),
    )
}


def skill_of(question: str) -> Skill:
    """Return the skill that the first word of a question names."""
    return SKILLS[question.split(maxsplit=1)[0]]


def solve(question: str) -> str:
    """Return the ideal answer."""
    return skill_of(question).solve(question)


def demonstrate(question: str, careful: float, rng: random.Random) -> str:
    """Return the answer that a person writes down; ``careful`` is the share of careful people."""
    answer = solve(question)
    return answer if rng.random() < careful else skill_of(question).slip(answer, rng)


def is_right(question: str, answer: str) -> bool:
    """Return whether an answer is right: the verifier."""
    skill = skill_of(question)
    return skill.result(answer) == skill.result(skill.solve(question))


def reward(prompts: list[str], completions: list[str], **columns: Any) -> list[float]:
    """Score answers from 0 to 1: 0.7 of it for a right one, 0.3 for likeness to the ideal one. As TRL's rewards are."""
    scores = []
    for question, answer in zip(prompts, completions, strict=True):
        likeness = SequenceMatcher(None, solve(question), answer, autojunk=False).ratio()
        scores.append(0.7 * is_right(question, answer) + 0.3 * likeness)
    return scores


def as_row(question: str) -> dict[str, str]:
    """Return a row of a recipe's prompts."""
    skill = skill_of(question)
    return {"id": question, "prompt": question, "domain": skill.name, "reference": skill.result(skill.solve(question))}


def write_rows(path: Path, rows: Iterable[dict[str, str]]) -> None:
    path.parent.mkdir(exist_ok=True)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def is_held_out(question: str) -> bool:
    """Return whether a checksum puts a question in the quarter of all that no model ever learns from."""
    return crc32(question.encode()) % 4 == 0


def drawn(skill: Skill, rng: random.Random, held_out: bool = False) -> str:
    """Draw a question of one skill."""
    while is_held_out(question := skill.ask(rng)) != held_out:
        pass
    return question


def questions(skill: str, count: int, rng: random.Random, held_out: bool = False) -> list[str]:
    """Return distinct questions of one skill, so that slices of the list never share one."""
    found: dict[str, None] = {}
    while len(found) < count:
        found[drawn(SKILLS[skill], rng, held_out)] = None
    mixed = list(found)
    rng.shuffle(mixed)  # short ones run out first: without this they would all be at the front
    return mixed
