"""The report stage: how training went, and what it did to answers on held-out prompts, as files to read."""

from __future__ import annotations

import json
from pathlib import Path

from mergekit_lite.distill import page
from mergekit_lite.distill.findings import Findings, gathered
from mergekit_lite.distill.folder import Folder
from mergekit_lite.distill.held_out import compare
from mergekit_lite.distill.recipe import Recipe
from mergekit_lite.distill.telling import Tell
from mergekit_lite.pages.drawing import check_drawable, new_figure, save


def report(recipe: Recipe, tell: Tell) -> Findings:
    """Write ``report/``: ``report.md`` with its pictures, ``report.html`` in one file, and the figures as JSON.

    The models are asked what they were not asked yet, and judged as the sources were.

    Raises:
        UsageError: nothing was trained yet, or held-out prompts are among the training data.
    """
    check_drawable(None)
    findings = gathered(recipe, compare(recipe, tell))
    folder = Folder(recipe.folder).report
    folder.mkdir(parents=True, exist_ok=True)
    for picture in findings.pictures:
        figure = new_figure(picture.height)
        picture.draw(figure)
        partial = folder / f"writing-{picture.name}"
        save(figure, partial)
        partial.replace(folder / picture.name)
    _write(folder / "report.json", json.dumps(findings.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n")
    _write(folder / "report.md", page.markdown(findings))
    _write(folder / "report.html", page.page(findings))
    for sentence in findings.said:
        tell.line(sentence)
    tell.line(f"report: {folder / 'report.html'}")
    return findings


def _write(path: Path, text: str) -> None:
    partial = path.with_name(f"{path.name}.writing")
    partial.write_text(text, encoding="utf-8")
    partial.replace(path)
