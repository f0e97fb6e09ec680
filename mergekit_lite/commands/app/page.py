"""The page: its tabs, and what happens when something on it is changed."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import gradio as gr

from mergekit_lite.commands.app.numbers import numbers, with_number
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.planned import Planned, planned, shown, tree_of
from mergekit_lite.commands.app.runs import Runs, State, ask, shown_command
from mergekit_lite.commands.prediction import headline, not_predicted, predicted
from mergekit_lite.engine.run import check_outputs
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.input_files import read_text
from mergekit_lite.pages.html import Markup, element
from mergekit_lite.yaml_document import text_of

SLIDERS = 12  # numbers of a recipe that can be moved; the others are changed in the text
MOST_CARD = 200_000  # bytes of an output's card that is shown
MARKED_LINES = 100  # of a recipe: of longer ones the editor has not all lines in the page
TICK = 1.0  # seconds between two looks at a run
THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")
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
    """Return the recipes that the package travels with, one for each method; those of the checkout where it is one."""
    package = Path(__file__).parents[2]
    folders = (Path(__file__).parent / "recipes", package.parent / "recipes" / "methods")
    folder = next((folder for folder in folders if folder.is_dir()), None)
    return {} if folder is None else {path.stem: path for path in sorted(folder.glob("*.yml"))}


def page(places: Places) -> gr.Blocks:
    """Return the page for the models in some places."""
    runs = Runs(places.root)
    blocks = gr.Blocks(title="mergekit-lite", analytics_enabled=False, fill_width=False)
    with blocks:
        gr.HTML(element("h1", "mergekit-lite"))
        with gr.Tab("Models"):
            _models(places)
        with gr.Tab("Recipe", id="recipe"):
            text = _recipe(blocks, places, runs)
        with gr.Tab("Run"):
            _run(places, runs, text)
    return blocks


def on(event: Callable[..., Any], function: Callable[..., Any], inputs: Any, outputs: Any, **options: Any) -> Any:
    """Bind a function of the page alone, which no other program may call by its name."""
    return event(function, inputs, outputs, api_visibility="private", **options)


def _models(places: Places) -> None:
    chosen = gr.Dropdown(
        places.models(), multiselect=True, label="Models", info="For a comparison, the base first", elem_id="models"
    )
    with gr.Row():
        inspect = gr.Button("Inspect", elem_id="inspect")
        compare = gr.Button("Compare", variant="primary", elem_id="compare")
        refresh = gr.Button("Look again", elem_id="refresh")
    told = gr.HTML(elem_id="told")

    def inspected(names: list[str]) -> Markup:
        return _listed([_asked(places, ["inspect", name], [name]) for name in names], "Choose a model.")

    def compared(names: list[str]) -> Markup:
        if len(names) < 2:
            return _said("Choose a base and a model that was tuned from it, or several.")
        with TemporaryDirectory() as folder:
            file = Path(folder, "compare.html")
            said = _asked(places, ["compare", *names], names, ["--html", str(file)])
            if not file.exists():
                return said
            whole = file.read_text(encoding="utf-8")
        frame = element("iframe", srcdoc=whole, sandbox="allow-scripts", title="Comparison", class_="report")
        return _listed([said, frame])

    on(inspect.click, inspected, chosen, told)
    on(compare.click, compared, chosen, told)
    on(refresh.click, lambda: gr.Dropdown(choices=places.models()), None, chosen)


def _asked(places: Places, arguments: list[str], references: list[str], more: list[str] | None = None) -> Markup:
    """Return what a command says, under the command itself."""
    if problems := [why for reference in references if (why := places.refusal(reference))]:
        return _said("\n".join(problems))
    try:
        said = ask(places.root, [*arguments, *(more or [])])
    except MergekitLiteError as error:
        said = str(error)
    return element("div", element("code", shown_command(arguments)), element("pre", said, tabindex="0"))


def _recipe(blocks: gr.Blocks, places: Places, runs: Runs) -> gr.Code:
    known = templates()
    template = gr.Dropdown(list(known), value=None, label="Start from a template", elem_id="template")
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
            sliders = [gr.Slider(0, 1, visible=False, interactive=True) for _ in range(SLIDERS)]
        with gr.Column(min_width=300):
            told = gr.HTML(elem_id="plan")
            time = gr.HTML(elem_id="time")
            predict = gr.Button("How long would it take?", elem_id="predict")

    def replanned(written: str) -> list[Any]:
        result = planned(written, "merged", places)
        return [_listed([shown(result), _marks(result)]), "", *_moved(result)]

    def moved(number: int) -> Callable[[str, float], str]:
        def change(written: str, value: float) -> str:
            found = numbers(tree_of(written))
            return with_number(written, found[number], value) if number < len(found) else written

        return change

    def timed(written: str) -> Markup:
        plan = planned(written, "merged", places).plan
        if plan is None:
            return _said("There is no plan yet.")
        prediction = predicted(plan)
        return element("p", headline(prediction) if prediction else not_predicted(plan) or "It can't be told here.")

    quick: dict[str, Any] = {"trigger_mode": "always_last", "show_progress": "hidden"}
    # One event for both: of two, the plan of the text that was there first might come last.
    gr.on([text.change, blocks.load], replanned, text, [told, time, *sliders], api_visibility="private", **quick)
    for number, slider in enumerate(sliders):
        on(slider.input, moved(number), [text, slider], text, **quick)
    on(template.input, lambda name: known[name].read_text(encoding="utf-8"), template, text)
    on(predict.click, timed, text, time)
    return text


def _latest(places: Places, runs: Runs) -> str:
    """Return the recipe of the latest run, or one to begin with."""
    path = runs.folder / f"{runs.state().output}.yml"
    if path.is_file():
        return text_of(path)
    models = [*filter(PLAIN.fullmatch, places.models()), "./first", "./second"]
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


def _run(places: Places, runs: Runs, text: gr.Code) -> None:
    output = gr.Textbox("merged", label="Name of the output", info=f"A folder in {places.root}", elem_id="output")
    with gr.Row():
        start = gr.Button("Run", variant="primary", elem_id="run")
        stop = gr.Button("Stop", variant="stop", elem_id="stop")
        resume = gr.Button("Resume", elem_id="resume")
        verify = gr.Button("Verify", elem_id="verify")
    refused = gr.HTML(elem_id="refused")
    stands = gr.HTML(elem_id="state")
    verdict = gr.HTML(elem_id="verdict")
    now = [stands, start, stop, resume, verify]

    def look() -> list[Any]:
        state = runs.state()
        usable = (state.kind != "running", state.kind == "running", state.kind == "stopped", state.kind == "done")
        return [_state(places, state), *(gr.Button(interactive=each) for each in usable)]

    def started(written: str, name: str) -> list[Any]:
        result = None
        try:
            result = planned(written, places.output(name), places)
            if result.plan is not None:
                check_outputs(result.plan)
                runs.start(written, name)
        except MergekitLiteError as error:
            return [_said(str(error)), "", *look()]
        return ["" if result.plan is not None else shown(result), "", *look()]

    def resumed() -> list[Any]:
        try:
            runs.resume()
        except MergekitLiteError as error:
            return [_said(str(error)), *look()]
        return ["", *look()]

    def stopped() -> list[Any]:
        runs.stop()
        return look()

    def verified() -> Markup:
        state = runs.state()
        return _asked(places, ["verify", state.output], [state.output])

    on(start.click, started, [text, output], [refused, verdict, *now])
    on(resume.click, resumed, None, [refused, *now])
    on(stop.click, stopped, None, now)
    on(verify.click, verified, None, verdict)
    on(gr.Timer(TICK).tick, look, None, now, show_progress="hidden")


def _state(places: Places, state: State) -> Markup:
    """Return how a run stands as HTML: the command, a bar, what it said, and the card of what it made."""
    if state.kind == "none":
        return element("p", "Nothing was run yet.")
    words = {"running": "runs", "stopped": "stopped: Resume goes on with what was finished", "failed": "failed",
             "done": "done"}  # fmt: skip
    parts = [element("p", element("b", state.output), f" {words[state.kind]}. {state.progress}", role="status")]
    if state.kind == "running":
        told = {} if state.share is None else {"value": str(state.share)}
        parts.append(element("progress", max="1", aria_label="Progress", **told))
    parts.append(element("code", shown_command(list(state.arguments))))
    if state.said:
        parts.append(element("pre", state.said, tabindex="0"))
    card = places.root / state.output / "README.md"
    if state.kind == "done" and card.is_file() and places.may_read(card):
        parts.append(
            element("details", element("summary", "Card"), element("pre", read_text(card, MOST_CARD), tabindex="0"))
        )
    return element("div", *parts, class_=state.kind)


def _said(text: str) -> Markup:
    return element("p", text, class_="wrong", role="alert")


def _listed(parts: list[Markup], otherwise: str = "") -> Markup:
    return element("div", *parts) if parts else _said(otherwise)
