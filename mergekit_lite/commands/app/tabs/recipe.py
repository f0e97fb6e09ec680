"""The tab of the recipe: an editor that plans while one types, and sliders that move its numbers."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from time import thread_time
from typing import Any

import gradio as gr

from mergekit_lite.commands.app.curves import curves
from mergekit_lite.commands.app.numbers import numbers, with_number
from mergekit_lite.commands.app.pace import Pace
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.planned import Planned, planned, shown, tree_of
from mergekit_lite.commands.app.public import checked
from mergekit_lite.commands.app.runs import Runs
from mergekit_lite.commands.app.tabs.parts import listed, on
from mergekit_lite.commands.app.tabs.public import public_plan
from mergekit_lite.pages.html import Markup, element
from mergekit_lite.yaml_document import text_of

LATEST = "the latest run's"
SLIDERS = 12  # numbers of a recipe that can be moved; the others are changed in the text
OTHERS = ("moe", "answer")  # folders of recipes that are for other commands
MARKED_LINES = 100  # of a recipe: of longer ones the editor has not all lines in the page
PLAIN = re.compile(r"[\w./-]+")  # names that YAML takes as they are
FIRST = """\
merge_method: linear
models:
  - model: {}
    parameters: {{weight: 0.5}}
  - model: {}
    parameters: {{weight: 0.5}}
"""


def templates() -> dict[str, Path]:
    """Return the recipes that ``merge`` takes by what they are called: those of the package, or of its checkout."""
    package = Path(__file__).parents[3]
    folders = (Path(__file__).parents[1] / "recipes", package.parent / "recipes")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    found = [] if folder is None else [path for path in folder.glob("*/*.yml") if path.parent.name not in OTHERS]
    named = {f"{path.parent.name}/{path.stem}": path for path in found}
    return dict(sorted(named.items(), key=lambda each: (not each[0].startswith("methods/"), each[0])))


def recipe_tab(opened: list[Callable[..., Any]], places: Places, runs: Runs, names: gr.Textbox) -> gr.Code:
    """Lay out the tab, and return its editor.

    Events by which it is ``opened`` plan anew. Into ``names`` go the models that only the hub has.
    """
    known = templates()
    pace = Pace(places)
    offered = [*([] if places.is_public else [LATEST]), *known]
    template = gr.Dropdown(offered, value=None, label="Start from a template", elem_id="template")
    with gr.Row(elem_classes="columns"):
        with gr.Column(min_width=300):
            text = gr.Code(
                _latest(places, runs),
                language="yaml",
                label="Recipe",
                lines=16,
                elem_id="recipe",
                wrap_lines=True,
                buttons=["copy"],
            )
            drawn = gr.HTML(elem_id="curves")
            sliders = [gr.Slider(0, 1, visible=False, interactive=True) for _ in range(SLIDERS)]
        with gr.Column(min_width=300):
            told = gr.HTML(elem_id="plan")
            time = gr.HTML(elem_id="time")
            plan_by_range = gr.Button("Plan", visible=places.is_public, elem_id="predict")

    latest = [(Planned(""), 0.0)]  # the plan that was made last, and the processor time it took

    def made(written: str) -> tuple[Planned, float]:
        started = thread_time()
        result = checked(written, places) if places.is_public else planned(written, "merged", places)
        return result, thread_time() - started

    def replanned(written: str) -> list[Any]:
        latest[0] = result, _ = made(written)
        missing = dict.fromkeys(places.of_hub(result.tree)) if result.tree is not None and not result.steps else ()
        wanted = " ".join(missing) if missing and not places.is_public else gr.skip()
        return [listed([shown(result), _marks(result)]), "", wanted, curves(result), *_moved(result)]

    def moved(number: int) -> Callable[[str, float], str]:
        def change(written: str, value: float) -> str:
            found = numbers(tree_of(written))
            return with_number(written, found[number], value) if number < len(found) else written

        return change

    def timed(written: str) -> Markup | str:
        result, planning = latest[0]
        if result.text != written:
            result, planning = made(written)
        return element("p", pace.told(result.steps, planning)) if result.steps else ""

    def of_template(name: str | None) -> Any:
        if name == LATEST:
            return _latest(places, runs)
        return known[name].read_text(encoding="utf-8") if name else gr.skip()  # passed by with Tab, nothing is chosen

    quick: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
    # One event for all: of two, the plan of the text that was there first might come last.
    shows = [told, time, names, drawn, *sliders]
    plan = gr.on([text.change, *opened], replanned, text, shows, api_visibility="private", **quick)
    if places.is_public:
        on(plan_by_range.click, lambda written: public_plan(places, written), text, time)
    else:
        on(plan.then, timed, text, time, show_progress="hidden")
    for number, slider in enumerate(sliders):
        on(slider.input, moved(number), [text, slider], text, **quick)
    on(template.input, of_template, template, text, show_progress="hidden")
    return text


def _latest(places: Places, runs: Runs) -> str:
    """Return the recipe of the latest run, or one to begin with; a visitor gets none of another one."""
    path = runs.folder / f"{runs.state().output}.yml"
    if path.is_file() and not places.is_public:
        return text_of(path)
    where = "org" if places.is_public else "."
    models = [*filter(PLAIN.fullmatch, places.models()), f"{where}/first", f"{where}/second"]
    return FIRST.format(*models)


def _moved(result: Planned) -> list[Any]:
    """Return what becomes of the sliders: each shows a number of the text, or is hidden."""
    found = numbers(result.tree)[:SLIDERS]
    shown_ones = [
        gr.Slider(number.least, number.most, number.value, step=0.01, label=number.label, visible=True)
        for number in found
    ]
    return [*shown_ones, *(gr.Slider(visible=False) for _ in range(SLIDERS - len(found)))]


def _marks(result: Planned) -> Markup:
    """Return a style that marks the lines of the editor in which something is wrong."""
    lines = sorted({line for line, _ in result.problems if line is not None and line <= MARKED_LINES})
    marked = ", ".join(f"#recipe .cm-line:nth-child({line})" for line in lines)
    return element("style", Markup(f"{marked} {{ background: #d4351c33; }}" if marked else ""))
