"""The tab of models: what is in them, and how they differ."""

from __future__ import annotations

import gradio as gr

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.tabs.hub import hub_part
from mergekit_lite.commands.app.tabs.parts import Online, Watch, asked, compared, listed, on
from mergekit_lite.pages.html import Markup


def models_tab(places: Places, online: Online, watch: Watch) -> gr.Textbox:
    """Lay out the tab, and return the field for names of models of the hub."""
    chosen = gr.Dropdown(
        places.models(), multiselect=True, label="Models", info="For a comparison, the base first", elem_id="models"
    )
    with gr.Row():
        inspect = gr.Button("Inspect", elem_id="inspect")
        compare = gr.Button("Compare", variant="primary", elem_id="compare")
        refresh = gr.Button("Look again", elem_id="refresh")
    told = gr.HTML(elem_id="told")
    names = hub_part(places, online, watch, chosen)

    def inspected(names: list[str]) -> Markup:
        return listed([asked(places, ["inspect", name], [name]) for name in names], "Choose a model.")

    on(inspect.click, inspected, chosen, told)
    on(compare.click, lambda names: compared(places, names), chosen, told)
    on(refresh.click, lambda: gr.Dropdown(choices=places.models()), None, chosen)
    return names
