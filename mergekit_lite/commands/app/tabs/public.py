"""The tabs of a public page, where they are others: models by their names, a run that is downloaded."""

from __future__ import annotations

from typing import Any
from urllib.parse import quote

import gradio as gr

from mergekit_lite.checkpoint import hub
from mergekit_lite.commands.app import public
from mergekit_lite.commands.app.guard import OUTPUT
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.planned import shown
from mergekit_lite.commands.app.runs import STREAM, Runs, shown_command
from mergekit_lite.commands.app.tabs.parts import asked, compared, listed, on, refusal
from mergekit_lite.commands.app.tabs.run import shown_state
from mergekit_lite.commands.units import size
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.pages.html import Markup, element

TICK = 2.0  # seconds between two looks at a run
MOST_NAMES = 8


def public_models_tab(places: Places) -> gr.Textbox:
    """Lay out the tab of models, and return the field of their names."""
    named = gr.Textbox(
        label="Models of the hub",
        info="org/name, several with spaces; for a comparison, the base first",
        elem_id="models",
    )
    with gr.Row():
        inspect = gr.Button("Inspect", elem_id="inspect")
        compare = gr.Button("Compare", variant="primary", elem_id="compare")
    told = gr.HTML(elem_id="told")

    def looked(written: str, is_compared: bool) -> Markup:
        names = written.split()
        if wrong := [name for name in names if not hub.is_repository(name)]:
            return refusal("\n".join(f"{name!r} is not the name of a model on the hub: org/name" for name in wrong))
        if len(names) > MOST_NAMES:
            return refusal(f"This page looks at up to {MOST_NAMES} models at once.")
        if not is_compared:
            looks = [asked(places, ["inspect", name, STREAM], [], (), public.SECONDS_TO_LOOK) for name in names]
            return listed(looks, "Name a model.")
        try:
            public.check(sum(map(public.weight_bytes, names)))
        except MergekitLiteError as error:
            return refusal(str(error))
        return compared(places, names, [STREAM])

    on(inspect.click, lambda written: looked(written, False), named, told)
    on(compare.click, lambda written: looked(written, True), named, told)
    return named


def public_plan(places: Places, text: str) -> Markup:
    """Return what the command ``plan`` says of a recipe."""
    result = public.checked(text, places)
    if result.problems:
        return shown(result)
    try:
        said = public.plan(text)
    except MergekitLiteError as error:
        return refusal(str(error))
    command = element("code", shown_command(["plan", "recipe.yml", STREAM]))
    return element("div", command, element("pre", said, tabindex="0"), class_="plan", role="status")


def public_run_tab(places: Places, runs: Runs, text: gr.Code) -> None:
    """Lay out the tab of the run."""
    gr.HTML(element("p", public.TERMS))
    with gr.Row():
        start = gr.Button("Run", variant="primary", elem_id="run")
        stop = gr.Button("Stop", variant="stop", elem_id="stop")
    refused = gr.HTML(elem_id="refused")
    stands = gr.HTML(elem_id="state")
    now = [stands, start, stop]
    mine = {""}  # the session whose run is the latest one

    def look(request: gr.Request) -> list[Any]:
        state = runs.state()
        goes_on = state.kind == "running"
        files = [
            element("li", element("a", name, href=f"{OUTPUT}{quote(name)}", download=name), f" {size(nbytes)}")
            for name, nbytes in public.downloads(runs).items()
        ]
        links = [element("p", "To download:"), element("ul", *files, class_="files")] if files else []
        usable = gr.Button(interactive=not goes_on), gr.Button(interactive=goes_on and request.session_hash in mine)
        return [listed([shown_state(places, state), *links]), *usable]

    def started(written: str, request: gr.Request) -> list[Any]:
        result = public.checked(written, places)
        if result.problems:
            return [shown(result), *look(request)]
        try:
            public.check_size(written)
            public.make_room(runs)
            runs.start(written, public.OUTPUT, streamed=True)
        except MergekitLiteError as error:
            return [refusal(str(error)), *look(request)]
        mine.clear()
        mine.add(str(request.session_hash))
        return ["", *look(request)]

    def stopped(request: gr.Request) -> list[Any]:
        if request.session_hash in mine:
            runs.stop()
        return look(request)

    on(start.click, started, text, [refused, *now])
    on(stop.click, stopped, None, now)
    on(gr.Timer(TICK).tick, look, None, now, show_progress="hidden")
