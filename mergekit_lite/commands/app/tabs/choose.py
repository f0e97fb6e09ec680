"""The tab of choosing: a search for alpha, whose curve grows as candidates come in; answers side by side."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import gradio as gr

from mergekit_lite.boosting.measure.scores import forms
from mergekit_lite.boosting.report import PAGE
from mergekit_lite.commands.app.boosts import BOOST, SCORES, boost_arguments, data_files, folder_of
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.runs import Runs, State
from mergekit_lite.commands.app.searched import beside, figures_of, found, in_part, names_of
from mergekit_lite.commands.app.tabs.chat import chat_part
from mergekit_lite.commands.app.tabs.parts import Watch, asked, on, refusal, standing, stops_and_resumes, usable
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.input_files import read_text
from mergekit_lite.pages.html import Markup, element

OUTPUT = 5  # of the fields
FURTHER = "As the command takes them: --max-tokens 64 --limits growth=2; or, without models, --recipe FILE --tune …"


def choose_tab(places: Places, watch: Watch) -> None:
    """Lay out the tab."""
    runs = Runs(places.root, BOOST)
    models = places.models()
    latest = [each for each in runs.state().arguments[1:3] if not each.startswith("-")]
    sft, aligned = latest if len(latest) == 2 else (None, None)
    own: dict[str, Any] = {"allow_custom_value": True, "interactive": True}
    with gr.Row():
        base = gr.Dropdown(models, value=sft, label="Before alignment (SFT)", elem_id="choose-sft", **own)
        tuned = gr.Dropdown(models, value=aligned, label="After alignment", elem_id="choose-aligned", **own)
    with gr.Row():
        data = gr.Dropdown(
            data_files(places),
            value=None,
            label="Prompts",
            info="Pairs for the score pairs",
            elem_id="choose-data",
            **own,
        )
        kinds = [form for kind, form in forms().items() if kind in SCORES]
        score = gr.Dropdown(
            kinds, value=None, label="Score", info="What candidates are judged by", elem_id="choose-score", **own
        )
    with gr.Row():
        alphas = gr.Textbox(
            label="Alphas", info="0.1,0.2,0.5; empty: the search finds them", elem_id="choose-alphas", max_lines=1
        )
        output = gr.Textbox(
            "boosted", label="Name of the output", info="A folder in the root", elem_id="choose-output", max_lines=1
        )
    more = gr.Textbox(label="Further options", info=FURTHER, elem_id="choose-more", max_lines=1)
    with gr.Row():
        refresh = gr.Button("Look again", elem_id="choose-refresh")
        check = gr.Button("Check", elem_id="choose-check")
        start = gr.Button("Search", variant="primary", elem_id="choose-start")
        stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="choose-stop")
        resume = gr.Button("Resume", interactive=False, elem_id="choose-resume")
    refused = gr.HTML(elem_id="choose-refused")
    stands = gr.HTML(elem_id="choose-state")
    curve = gr.HTML(elem_id="choose-curve")
    with gr.Accordion("Answers side by side", open=False, elem_id="choose-samples"):
        with gr.Row():
            chosen = gr.Dropdown(
                [],
                multiselect=True,
                label="Candidates",
                info="By default the baseline and the best",
                elem_id="choose-names",
            )
            number = gr.Number(1, minimum=1, precision=0, label="Item", elem_id="choose-item")
        answers = gr.HTML(elem_id="choose-answers")
    report = gr.Button("Report", interactive=False, elem_id="choose-report")
    page = gr.HTML(elem_id="choose-page")
    form = [base, tuned, data, score, alphas, output, more]
    figures = gr.State("")  # of which the curve is
    known = gr.State("")  # the state that is shown
    shows = [known, stands, start, stop, resume, report]
    drawn = [figures, curve, chosen]
    now = [watch.timer, *shows]

    def listed() -> list[Any]:
        models = places.models()
        return [gr.Dropdown(choices=models), gr.Dropdown(choices=models), gr.Dropdown(choices=data_files(places))]

    def look() -> list[Any]:
        state = runs.state()
        if state.kind == "running":
            let_go()  # a search needs the memory
        return [watch.soon(), "", _state(runs, state), *usable(state)]

    def seen(stood: str, before: str) -> tuple[bool, list[Any]]:
        state = runs.state()
        folder = folder_of(places.root, state.output)
        latest = "" if state.kind == "none" else "\n".join(map(str, (folder, *figures_of(folder))))
        stands = _state(runs, state)
        values: list[Any] = [gr.skip()] * (len(shows) + len(drawn))
        if stands != stood:
            values[: len(shows)] = [str(stands), stands, *usable(state)]
        if latest != before:
            names = gr.update(choices=names_of(folder))
            if before.partition("\n")[0] != str(folder):  # another search
                names["value"] = []
            values[len(shows) :] = [latest, found(folder), names]
        return state.kind == "running", values

    def checked(*fields: str) -> Markup:
        try:
            return asked(places, [*boost_arguments(places, *fields), "--dry-run"], [])
        except MergekitLiteError as error:
            return refusal(str(error))

    def started(*fields: str) -> list[Any]:
        try:
            runs.launch(boost_arguments(places, *fields), fields[OUTPUT])
        except MergekitLiteError as error:
            return [refusal(str(error)), gr.skip(), *look()]
        return ["", "", *look()]

    def shown(names: list[str], item: float | None) -> Markup:
        return beside(folder_of(places.root, runs.state().output), names, int(item or 1))

    def reported() -> Markup:
        path = folder_of(places.root, runs.state().output) / PAGE
        try:
            whole = read_text(path)
        except MergekitLiteError as error:
            return refusal(str(error))
        return element("iframe", srcdoc=whole, sandbox="allow-scripts", title="Report", class_="report")

    on(refresh.click, listed, None, [base, tuned, data])
    on(check.click, checked, form, refused)
    on(start.click, started, form, [refused, page, *now])
    stops_and_resumes(runs, look, stop, resume, refused, now)
    on(report.click, reported, None, page)
    watch.add(seen, [known, figures], [*shows, *drawn])
    gr.on(
        [chosen.change, number.change, number.submit, number.blur, figures.change],
        shown,
        [chosen, number],
        answers,
        api_visibility="private",
        show_progress="hidden",
        trigger_mode="always_last",  # else what is chosen while the page still answers is lost
    )
    let_go = chat_part(places, base, tuned, watch)


def _state(runs: Runs, state: State) -> Markup:
    """Return how a search stands."""
    if state.kind == "none":
        return element("p", "No search was begun yet.")
    done = state.kind == "done"
    parts = standing(state.output, replace(state, said="") if done else state)
    if done:  # the candidates stand below, in full
        warnings = [line for line in state.said.splitlines() if line.startswith("Warning:")]
        parts += [element("p", f"⚠ {line.removeprefix('Warning: ')}", class_="warning") for line in warnings]
        parts.append(element("details", element("summary", "What it said"), element("pre", state.said, tabindex="0")))
    if state.kind in ("running", "stopped") and (told := in_part(folder_of(runs.root, state.output))):
        parts.append(element("p", told))
    return element("div", *parts, class_=state.kind)
