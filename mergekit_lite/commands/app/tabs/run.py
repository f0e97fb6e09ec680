"""The tab of the run: start, stop, resume, verify, and what the run says meanwhile."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.planned import planned, shown
from mergekit_lite.commands.app.runs import Runs, State, shown_command
from mergekit_lite.commands.app.tabs.parts import asked, on, refusal
from mergekit_lite.engine.run import check_outputs
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.input_files import read_text
from mergekit_lite.pages.html import Markup, element

MOST_CARD = 200_000  # bytes of an output's card that is shown
TICK = 1.0  # seconds between two looks at a run


def run_tab(places: Places, runs: Runs, text: gr.Code) -> None:
    """Lay out the tab."""
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
        return [shown_state(places, state), *(gr.Button(interactive=each) for each in usable)]

    def started(written: str, name: str) -> list[Any]:
        result = None
        try:
            result = planned(written, places.output(name), places)
            if result.plan is not None:
                check_outputs(result.plan)
                runs.start(written, name)
        except MergekitLiteError as error:
            return [refusal(str(error)), "", *look()]
        return ["" if result.plan is not None else shown(result), "", *look()]

    def resumed() -> list[Any]:
        try:
            runs.resume()
        except MergekitLiteError as error:
            return [refusal(str(error)), *look()]
        return ["", *look()]

    def stopped() -> list[Any]:
        runs.stop()
        return look()

    def verified() -> Markup:
        state = runs.state()
        return asked(places, ["verify", state.output], [state.output])

    on(start.click, started, [text, output], [refused, verdict, *now])
    on(resume.click, resumed, None, [refused, *now])
    on(stop.click, stopped, None, now)
    on(verify.click, verified, None, verdict)
    on(gr.Timer(TICK).tick, look, None, now, show_progress="hidden")


def shown_state(places: Places, state: State) -> Markup:
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
