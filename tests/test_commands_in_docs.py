"""The commands that pages name for what they claim are there, and each ``pytest`` line selects a test."""

from __future__ import annotations

import ast
import re
import shlex
from argparse import ArgumentParser
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGES = ("distill", "sources", "training", "fuse", "boost", "preview", "answer", "merging")
COMMAND = re.compile(
    r"`((?:pytest|python -m|make)\s[^`]+)`|^    ((?:pytest|python -m|make) .*?)(?:  +#.*)?$", re.MULTILINE
)


def commands(page: str) -> list[str]:
    """Those in code on a page, each in one line."""
    text = (ROOT / "docs" / f"{page}.md").read_text(encoding="utf-8")
    return [" ".join("".join(found).split()) for found in COMMAND.findall(text)]


NAMED = [(page, command) for page in PAGES for command in commands(page)]


def selectable(path: Path) -> Iterator[tuple[str, bool]]:
    """Yield the tests of a file or folder, each by what ``-k`` looks at, and whether it is slow, or with both."""
    for file in sorted(path.rglob("test_*.py")) if path.is_dir() else [path]:
        module = ast.parse(file.read_text(encoding="utf-8"))
        assigned = [each for each in module.body if isinstance(each, ast.Assign) and "mark.slow" in ast.unparse(each)]
        slow = {ast.unparse(each.targets[0]) for each in assigned}  # for the module, or for some parameters of a test
        for each in module.body:
            if isinstance(each, ast.FunctionDef) and each.name.startswith("test_"):
                words = {word for mark in each.decorator_list for word in re.findall(r"[\w.]+", ast.unparse(mark))}
                always = "pytestmark" in slow or "pytest.mark.slow" in words
                for is_slow in {always, always or bool(slow & words)}:
                    yield f"{file.name} {each.name}", is_slow


def selects(expression: str, name: str) -> bool:
    """Whether ``-k`` takes a test; parameters are left out of account."""
    words = re.sub(
        r"\w+", lambda word: word[0] if word[0] in ("and", "or", "not") else str(word[0].lower() in name), expression
    )
    return bool(eval(words))  # of True, False, and the three words: the pages are ours


@pytest.mark.parametrize(("page", "command"), NAMED, ids=[f"{page}-{command}" for page, command in NAMED])
def test_it_is_there(page: str, command: str) -> None:
    program, *words = shlex.split(command)
    if program == "make":
        assert re.search(rf"^{words[0]}:", (ROOT / "Makefile").read_text(encoding="utf-8"), re.MULTILINE)
    elif program == "python":
        place = ROOT / words[1].replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists()
    else:
        parser = ArgumentParser()
        parser.add_argument("-s", action="store_true")
        parser.add_argument("-m", default="not slow", choices=["slow"])
        parser.add_argument("-k", default="test_")
        parser.add_argument("paths", nargs="+", type=Path)
        given = parser.parse_args(words)
        for path in given.paths:
            found = [name for name, slow in selectable(ROOT / path) if slow == (given.m == "slow")]
            assert any(selects(given.k, name) for name in found), f"{path} has no test for -k {given.k!r}"


def test_every_page_names_some() -> None:
    assert {page for page, _ in NAMED} == set(PAGES)
    assert len(NAMED) > 40


def test_what_no_test_matches_is_seen() -> None:
    names = [name for name, _ in selectable(ROOT / "tests" / "test_commands_in_docs.py")]
    assert names and not any(selects("nothing_of_the_kind and not this", name) for name in names)
    assert [name.split()[1] for name in names if selects("seen or (page and not there)", name)] == [
        "test_every_page_names_some",
        "test_what_no_test_matches_is_seen",
    ]
