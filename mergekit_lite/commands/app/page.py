"""The page: its tabs and its looks."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.public import public_runs
from mergekit_lite.commands.app.runs import Runs
from mergekit_lite.commands.app.tabs.choose import choose_tab
from mergekit_lite.commands.app.tabs.models import models_tab
from mergekit_lite.commands.app.tabs.parts import Online, Watch
from mergekit_lite.commands.app.tabs.public import public_models_tab, public_run_tab
from mergekit_lite.commands.app.tabs.recipe import recipe_tab
from mergekit_lite.commands.app.tabs.run import run_tab
from mergekit_lite.pages.html import element

THEME = gr.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    button_primary_background_fill="*primary_600"  # of a contrast in which its text can be read
)
STYLE = (Path(__file__).parent / "page.css").read_text(encoding="utf-8")


class Page(gr.Blocks):
    """Blocks that take no files.

    Gradio copies each file that a request names into its own folder, any file that this process may read where the page
    is mounted on a server, and fetches what it names by an address.
    """

    async def preprocess_data(self, block_fn: Any, inputs: list[Any], *others: Any, **more: Any) -> Any:
        """Do as Gradio does, but for files."""
        if _names_file(inputs):
            raise gr.Error("This page takes no files.")
        return await super().preprocess_data(block_fn, inputs, *others, **more)


def _names_file(data: object) -> bool:
    if isinstance(data, dict):
        return "meta" in data or any(map(_names_file, data.values()))
    return isinstance(data, list) and any(map(_names_file, data))


def page(places: Places, online: Online) -> gr.Blocks:
    """Return the page for the models in some places; some commands of it are ``online``."""
    runs = public_runs(places.root) if places.is_public else Runs(places.root, online=online)
    blocks = Page(title="mergekit-lite", analytics_enabled=False, fill_width=False)
    with blocks:
        gr.HTML(element("h1", "mergekit-lite"))
        watch = Watch()
        with gr.Tab("Models"):
            names = public_models_tab(places) if places.is_public else models_tab(places, online, watch)
        with gr.Tab("Recipe", id="recipe") as tab:
            text = recipe_tab([blocks.load, tab.select], places, runs, names)
        with gr.Tab("Run"):
            if places.is_public:
                public_run_tab(places, runs, text)
            else:
                run_tab(places, runs, text, online, watch)
        if not places.is_public:
            with gr.Tab("Choose"):
                choose_tab(places, watch)
            watch.begin()
    return blocks
