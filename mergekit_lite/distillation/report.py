"""The report stage: how training went, and what it did to answers on held-out prompts, as files to read."""

from __future__ import annotations

import json

from mergekit_lite.answers.rows import write_text
from mergekit_lite.distillation import page
from mergekit_lite.distillation.findings import Findings, gathered
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.held_out import compare
from mergekit_lite.distillation.recipe import Recipe
from mergekit_lite.distillation.reporter import Tell
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
        save(figure, folder / picture.name)
    write_text(
        folder / "report.json", json.dumps(findings.to_json(), indent=1, ensure_ascii=False, allow_nan=False) + "\n"
    )
    write_text(folder / "report.md", page.markdown(findings))
    write_text(folder / "report.html", page.page(findings))
    for sentence in findings.said:
        tell.line(sentence)
    tell.line(f"report: {folder / 'report.html'}")
    return findings
