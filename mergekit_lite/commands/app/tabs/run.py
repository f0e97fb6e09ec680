"""The tab of the run: start, stop, resume, verify, and what the run says meanwhile."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.planned import documents_by_range, output_of, planned, shown
from mergekit_lite.commands.app.runs import STREAM, Runs, State
from mergekit_lite.commands.app.tabs.parts import (
    Online,
    Watch,
    asked,
    listed,
    on,
    refusal,
    standing,
    stops_and_resumes,
    usable,
)
from mergekit_lite.commands.app.tabs.push import push_part
from mergekit_lite.engine.run import check_outputs
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.input_files import read_text
from mergekit_lite.pages.html import Markup, element
from mergekit_lite.recipe.documents import final

MOST_CARD = 200_000  # bytes of an output's card that is shown


def run_tab(places: Places, runs: Runs, text: gr.Code, online: Online, watch: Watch) -> None:
    """Lay out the tab."""
    output = gr.Textbox("merged", label="Name of the output", info=f"A folder in {places.root}", elem_id="output")
    streamed = gr.Checkbox(label="Read models of the hub by range (--stream): none is stored", elem_id="stream")
    with gr.Row():
        plan = gr.Button("Plan by range", visible=False, elem_id="plan-stream")
        start = gr.Button("Run", variant="primary", elem_id="run")
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="stop")
        resume = gr.Button("Resume", interactive=False, elem_id="resume")
        verify = gr.Button("Verify", interactive=False, elem_id="verify")
    refused = gr.HTML(elem_id="refused")
    stands = gr.HTML(elem_id="state")
    verdict = gr.HTML(elem_id="verdict")
    known = gr.State()  # what is shown of a run
    shows = [stands, start, stop, resume, verify, known]
    now = [watch.timer, *shows]

    def seen(before: State | None) -> tuple[bool, list[Any]]:
        state = runs.state()
        same = [gr.skip()] * len(shows)
        return state.kind == "running", same if state == before else [shown_state(places, state), *usable(state), state]

    def look() -> list[Any]:
        return [watch.soon(), *seen(None)[1]]

    def started(written: str, name: str, by_range: bool) -> list[Any]:
        wrong: Markup | str = ""
        try:
            if by_range:
                _start_streamed(written, places.output(name), places, runs)
            else:
                result = planned(written, places.output(name), places)
                if result.steps:
                    for step in result.steps:
                        if step.is_final:
                            check_outputs(step.plan)
                    runs.start(written, name, result.outputs)
                else:
                    wrong = shown(result)
        except MergekitLiteError as error:
            wrong = refusal(str(error))
        return [wrong, "", *look()]

    def planned_by_range(written: str) -> Markup:
        try:
            documents_by_range(written, places)
            file = runs.keep(written)
        except MergekitLiteError as error:
            return refusal(str(error))
        return asked(places, ["plan", file, STREAM], [], environment=online)

    def verified() -> Markup:
        return listed([asked(places, ["verify", output], [output]) for output in runs.state().outputs])

    on(start.click, started, [text, output, streamed], [refused, verdict, *now])
    stops_and_resumes(runs, look, stop, resume, refused, now)
    on(verify.click, verified, None, verdict)
    on(streamed.input, lambda given: gr.Button(visible=given), streamed, plan)
    on(plan.click, planned_by_range, text, refused)
    watch.add(seen, [known], shows)
    push_part(places, runs, online, watch)


def _start_streamed(written: str, name: str, places: Places, runs: Runs) -> None:
    """Start a run that reads models of the hub by range: only its process may ask the hub, so it plans it, too."""
    documents = documents_by_range(written, places)
    given = output_of(documents, name)
    outputs = [given.replace("{name}", each.name) for each in final(documents)]
    if there := [each for each in outputs if (places.root / each).exists()]:
        raise UsageError(f"{', '.join(there)}: exists. Choose another name.")
    runs.start(written, name, outputs, streamed=True)


def shown_state(places: Places, state: State) -> Markup:
    """Return how a run stands as HTML: the command, a bar, what it said, and the card of what it made."""
    if state.kind == "none":
        return element("p", "Nothing was run yet.")
    parts = standing(state.output, state)
    for output in state.outputs:
        card = places.root / output / "README.md"
        if state.kind == "done" and card.is_file() and places.may_read(card):
            written = element("pre", read_text(card, MOST_CARD), tabindex="0")
            parts.append(element("details", element("summary", f"Card of {output}"), written))
    return element("div", *parts, class_=state.kind)
