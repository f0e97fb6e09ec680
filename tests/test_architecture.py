"""The house is as docs/architecture.md draws it: who imports whom, no circles, docstrings without fillers."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "mergekit_lite"
PAGE = (ROOT / "docs" / "architecture.md").read_text(encoding="utf-8")
FILES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__"): path
    for path in sorted(PACKAGE.rglob("*.py"))
}
# Phrases that leave the reader to guess what is meant.
FILLERS = re.compile(
    r"\b(so many|may lack|what came of|where there is such|if there is such|the same of|told beside)\b", re.I
)


def imports(module: str) -> Iterator[tuple[str, int]]:
    """Every module of the package that a module imports, at its head, for types or inside a function; and the line."""
    for node in ast.walk(ast.parse(FILES[module].read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "mergekit_lite":
            for alias in node.names:
                target = f"{node.module}.{alias.name}"
                target = target if target in FILES else node.module
                if target != module:
                    yield target, node.lineno


def room(module: str) -> str:
    """The folder or top-level file that a module belongs to, as the table names it."""
    parts = module.split(".")
    name = parts[1] if len(parts) > 1 else "__init__"
    return f"{name}/" if (PACKAGE / name).is_dir() else f"{name}.py"


def table() -> list[tuple[list[str], set[str]]]:
    """The rows of the page's table of rooms: the rooms of a row, and those they may import."""
    rows = re.findall(r"^\| ((?:`\w+(?:/|\.py)`(?:, )?)+) \|[^|]*\| ([^|]*) \|$", PAGE, re.MULTILINE)
    return [(re.findall(r"`([^`]+)`", rooms), set(re.findall(r"`([^`]+)`", known))) for rooms, known in rows]


def test_every_room_is_in_the_table() -> None:
    listed = [name for rooms, _ in table() for name in rooms]
    assert sorted(listed) == sorted({room(module) for module in FILES} - {"__init__.py", "__main__.py", "_version.py"})


def test_a_room_knows_what_the_table_says() -> None:
    """The third column is exact: what is imported stands there, and what stands there is imported."""
    known: dict[str, set[str]] = {}
    for module in FILES:
        known.setdefault(room(module), set()).update(room(target) for target, _ in imports(module))
    for rooms, told in table():
        actual = set().union(*(known.get(name, set()) for name in rooms)) - set(rooms) - {"_version.py"}
        assert actual == told, f"{', '.join(rooms)}: imports {sorted(actual)}, the table says {sorted(told)}"


def test_arrows_point_down() -> None:
    """A room imports only rooms above it in the table, which lists the ground floor first."""
    seen: set[str] = set()
    for rooms, told in table():
        assert told <= seen, f"{', '.join(rooms)} stands above {sorted(told - seen)} in the table"
        seen.update(rooms)


def test_no_circles() -> None:
    """No file imports itself through others, be it inside a function or for types alone."""
    graph = {module: {target for target, _ in imports(module)} for module in FILES}
    done: set[str] = set()

    def visit(module: str, trail: tuple[str, ...]) -> None:
        assert module not in trail, " → ".join([*trail[trail.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, (*trail, module))
            done.add(module)

    for module in graph:
        visit(module, ())


def docstrings(path: Path) -> Iterator[tuple[int, str]]:
    """The docstrings of a file, each with its line."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            text = ast.get_docstring(node)
            if text:
                yield getattr(node, "lineno", 1), text


@pytest.mark.parametrize("module", FILES)
def test_docstrings_have_no_fillers(module: str) -> None:
    found = [(line, match[0]) for line, text in docstrings(FILES[module]) if (match := FILLERS.search(text))]
    assert not found, f"{FILES[module]}: {found}"


def test_files_tell_one_story() -> None:
    """A file stays under some 400 lines."""
    long = {str(path): len(path.read_text(encoding="utf-8").splitlines()) for path in FILES.values()}
    assert all(lines <= 420 for lines in long.values()), {path: lines for path, lines in long.items() if lines > 420}
