"""Write ``recipes/README.md`` from the recipes' own first lines: ``python -m docs.catalogue``."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

import yaml

FOLDER = Path(__file__).parents[1] / "recipes"
PAGE = FOLDER / "README.md"
HEAD = """\
# Recipes

Written by `python -m docs.catalogue` from the recipes' first lines.

Run one by `mergekit-lite merge recipes/…/name.yml -o out`, or see what it would do with `mergekit-lite plan`. Each file
says in its first lines what it makes, and every key has a comment. Figures are the sources' own, not measured here.
"""
ABOUT = {  # the folders in their order: the heading, and what is to be known of its recipes
    "expo": (
        "Released pairs of ExPO",
        "An SFT model and its aligned model, with the published alpha: from table 7 of the paper (Zheng et al. 2025, "
        "arXiv 2404.16792), or from the model card of the released ExPO model. Win rate, LC (the length-controlled win "
        "rate) and characters of an answer are AlpacaEval 2's, before and after, as the authors' "
        "results_alpaca/leaderboard.csv or the card has them. No source names revisions, so none is pinned: add yours "
        "as `org/name@revision`.",
    ),
    "fusechat": ("FuseChat", "The merges of FuseChat-7B, v1 and v2."),
    "fuseo1": ("FuseO1", "The five FuseO1 previews."),
    "distill": ("Distillation", "Run by `mergekit-lite distill run` ([docs/distill.md](../docs/distill.md))."),
    "methods": (
        "Methods",
        "One for each method, with names to fill in (`org/tuned-a`, …). `mixed.yml` shows what the language has beyond "
        "mergekit's.",
    ),
    "boost": (
        "Searches",
        "Numbers that are searched for by measuring (`mergekit-lite boost`). `boost/published.sh` has the searches of "
        "ExPO's paper as commands.",
    ),
    "moe": ("Mixtures of experts", "From dense models (`mergekit-lite moe`), one for each family."),
    "tokenizers": ("Tokenizers", "Models with other tokens."),
    "documents": ("Several merges", "A file of several merges, one made of another."),
    "parts": ("Parts", "Models of several parts."),
}
SOURCE = re.compile(r" ?\(([^()]*\b\d{4}\b[^()]*)\)")  # the first parenthesis with a year
PAPER = "Zheng et al. 2025, arXiv 2404.16792, "  # said once, above the table
FIGURES = ("AlpacaEval", "Arena-Hard", "MT-Bench", "AIME", "LiveCodeBench", "BBH")
ALPACA = re.compile(r"win rate (\S+ -> \S+), LC (\S+ -> [\d.]+)(?:, (\d+ -> \d+) characters)?")


class Entry(NamedTuple):
    """What the first lines of a recipe say."""

    what: str
    source: str  # empty where they name none
    figures: str  # empty where they have none


def page() -> str:
    """Return the whole page."""
    parts = [HEAD]
    there = sorted(path.name for path in FOLDER.iterdir() if path.is_dir())
    for name in dict.fromkeys([*ABOUT, *there]):
        heading, about = ABOUT.get(name, (name.capitalize(), ""))
        files = sorted(path for path in (FOLDER / name).iterdir() if path.suffix in (".yml", ".yaml"))
        made = pairs(files) if name == "expo" else entries(files)
        parts.append("\n\n".join(filter(None, (f"## {heading}", about, made))))
    return "\n".join(parts)


def pairs(files: Iterable[Path]) -> str:
    """Return the table of ExPO's pairs."""
    rows = []
    for file in files:
        recipe: dict[str, Any] = yaml.safe_load(file.read_text(encoding="utf-8"))
        said = " ".join(head(file))
        alpha = re.search(r"alpha: (.*?)\.(?= [A-Z]|$)", said)
        found = ALPACA.search(said)
        if alpha is None:
            raise ValueError(f"{file}: no line 'alpha: …' says where alpha is from")
        rows.append(
            (
                link(file),
                recipe["base_model"],
                recipe["models"][0]["model"],
                f"{recipe['parameters']['alpha']:g}",
                alpha[1].replace(PAPER, ""),
                *((figure or "" for figure in found.groups()) if found else ("", "", "")),
            )
        )
    heads = ("recipe", "from", "to", "alpha", "found", "win rate", "LC", "characters")
    return table(heads, rows)


def entries(files: Iterable[Path]) -> str:
    """Return the table of a folder; columns that are empty in all rows are left out."""
    found = [(link(file), *entry(file)) for file in files]
    heads = ("recipe", "what", "source", "figures")
    kept = [column for column in range(len(heads)) if any(row[column] for row in found)]
    return table([heads[column] for column in kept], [[row[column] for column in kept] for row in found])


def entry(file: Path) -> Entry:
    """Read a recipe's first paragraph: what it makes, (its source), and the sentences with figures."""
    paragraph = " ".join(takewhile(bool, head(file)))
    text = re.sub(r"\s*\bRun:?$", "", paragraph).strip()
    source = SOURCE.search(text)
    sentences = re.split(r"(?<=[.])\s+(?=[A-Z])", SOURCE.sub("", text, count=1))
    figures = [each for each in sentences[1:] if any(name in each for name in FIGURES)]
    return Entry(
        sentences[0].rstrip("."),
        source[1] if source else "",
        " ".join(figures).removeprefix("Published: ").rstrip("."),
    )


def head(file: Path) -> list[str]:
    """Return the lines of the comment that a recipe begins with, without their marks."""
    comment = file.read_text(encoding="utf-8").split("\n\n", 1)[0]
    return [line.removeprefix("#").strip() for line in comment.splitlines()]


def link(file: Path) -> str:
    """Return a link from the page to a recipe."""
    return f"[{file.stem}]({file.relative_to(FOLDER).as_posix()})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """Return a table in Markdown."""
    lines = [heads, ("---",) * len(heads), *rows]
    return "".join(
        f"| {' | '.join(cell.replace('->', '→').replace('|', chr(92) + '|') for cell in row)} |\n" for row in lines
    )


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
