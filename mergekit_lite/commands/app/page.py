"""The page: its tabs and its looks."""

from __future__ import annotations

from pathlib import Path

import gradio as gr

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.runs import Runs
from mergekit_lite.commands.app.tabs.choose import choose_tab
from mergekit_lite.commands.app.tabs.models import models_tab
from mergekit_lite.commands.app.tabs.parts import Online
from mergekit_lite.commands.app.tabs.recipe import recipe_tab
from mergekit_lite.commands.app.tabs.run import run_tab
from mergekit_lite.pages.html import element

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"])
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


def page(places: Places, online: Online) -> gr.Blocks:
    """Return the page for the models in some places; some commands of it are ``online``."""
    runs = Runs(places.root, online=online)
    blocks = gr.Blocks(title="mergekit-lite", analytics_enabled=False, fill_width=False)
    with blocks:
        gr.HTML(element("h1", "mergekit-lite"))
        with gr.Tab("Models"):
            names = models_tab(places, online)
        with gr.Tab("Recipe", id="recipe") as tab:
            text = recipe_tab([blocks.load, tab.select], places, runs, names)
        with gr.Tab("Run"):
            run_tab(places, runs, text, online)
        with gr.Tab("Choose"):
            choose_tab(places)
    return blocks
