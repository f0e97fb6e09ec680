"""The report stage: how training went, and how answers to held-out prompts changed, as files to read."""

from __future__ import annotations

import json

from mergekit_lite.answers.rows import write_text
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.recipe.schema import Recipe
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.reporting import page
from mergekit_lite.distillation.reporting.findings import Findings, gather
from mergekit_lite.distillation.reporting.held_out import compare
from mergekit_lite.pages.drawing import check_drawable, new_figure, save


def report(recipe: Recipe, reporter: Reporter) -> Findings:
    """Write ``report/``: ``report.md`` with its pictures, ``report.html`` in one file, and the figures as JSON.

    The models answer held-out prompts that they have not answered yet, and the recipe's scorers judge these answers.

    Raises:
        UsageError: nothing was trained yet, or held-out prompts are among the training data.
    """
    check_drawable(None)
    findings = gather(recipe, compare(recipe, reporter))
    folder = Folder(recipe.folder).report
    folder.mkdir(parents=True, exist_ok=True)
    for picture in findings.pictures:
        figure = new_figure(picture.height)
        picture.draw(figure)
        save(figure, folder / picture.name)
    figures = json.dumps(findings.to_json(), indent=1, ensure_ascii=False, allow_nan=False)
    write_text(folder / "report.json", f"{figures}\n")
    write_text(folder / "report.md", page.markdown(findings))
    write_text(folder / "report.html", page.page(findings))
    for sentence in findings.conclusions:
        reporter.line(sentence)
    reporter.line(f"report: {folder / 'report.html'}")
    return findings
