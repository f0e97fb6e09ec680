"""Models of the hub, in the tab of models: what their download takes, the download, and a look at them by range."""

from __future__ import annotations

import shutil
from typing import Any

import gradio as gr

from mergekit_lite.checkpoint.hub import is_repository
from mergekit_lite.commands.app.downloads import Downloads, Needed
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.planned import table
from mergekit_lite.commands.app.runs import STREAM, State, shown_command
from mergekit_lite.commands.app.tabs.parts import Online, Watch, asked, compared, listed, on, refusal
from mergekit_lite.commands.units import size
from mergekit_lite.errors import MergekitLiteError, counted
from mergekit_lite.pages.html import Markup, element

MOST_NAMES = 16
MOST_COMPARED = 20_000_000_000  # bytes of weights that are fetched to be looked at once, and not kept


def hub_part(places: Places, online: Online, watch: Watch, chosen: gr.Dropdown) -> gr.Textbox:
    """Lay out the part, and return the field of the names; models that are ``chosen`` above are compared with them."""
    downloads = Downloads(places, online)
    with gr.Accordion("Models of the hub", open=False, elem_id="hub"):
        names = gr.Textbox(
            label="Names",
            info="org/name or org/name@revision, with blanks between. The buttons ask the hub; nothing else here does.",
            elem_id="hub-names",
        )
        with gr.Row():
            look = gr.Button("What would it take?", variant="primary", elem_id="hub-look")
            by_range = gr.Button("Inspect by range", elem_id="hub-range")
            compare = gr.Button("Compare by range", elem_id="hub-compare")
            start = gr.Button("Download", interactive=False, elem_id="hub-download")
            stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="hub-stop")
        told = gr.HTML(elem_id="hub-told")
        stands = gr.HTML(elem_id="hub-state")
        offered = gr.State([])
        known = gr.State()  # what is shown of a download

    def looked(written: str) -> list[Any]:
        nothing = [[], gr.Button("Download", interactive=False)]
        try:
            found = downloads.needed(_named(written))
        except MergekitLiteError as error:
            return [refusal(str(error)), *nothing]
        sound = [each for each in found if not each.error and not places.is_kept(each.name)]
        if not sound:
            return [_told(found, places), *nothing]
        label = f"Download {size(sum(each.nbytes for each in sound))}"
        return [_told(found, places), sound, gr.Button(label, interactive=True)]

    def inspected(written: str) -> Markup:
        try:
            found = _named(written)
        except MergekitLiteError as error:
            return refusal(str(error))
        return listed([asked(places, ["inspect", name, STREAM], [name], environment=online) for name in found])

    def compared_by_range(here: list[str], written: str) -> Markup:
        try:
            names = _named(written)
            found = downloads.needed(names)
        except MergekitLiteError as error:
            return refusal(str(error))
        if wrong := [f"{each.name}: {each.error}" for each in found if each.error]:
            return refusal("\n".join(wrong))
        models = [*here, *names]
        if (weights := sum(each.weights for each in found)) > MOST_COMPARED:
            command = shown_command(["compare", *models, STREAM])
            return refusal(
                f"All {size(weights)} of weights would be fetched; here it may be {size(MOST_COMPARED)}. Download the "
                f"models, or let the command compare them: {command}"
            )
        return compared(places, models, [STREAM], online)

    def started(models: list[Needed]) -> list[Any]:
        try:
            downloads.start(models)
        except MergekitLiteError as error:
            return [refusal(str(error)), gr.skip(), None, gr.skip()]
        return ["", gr.Button(interactive=False), None, watch.soon()]

    def seen(before: object) -> tuple[bool, list[Any]]:
        now = (downloads.state(), downloads.goes_on)
        (run, model, here), goes_on = now
        if now == before:
            return goes_on, [gr.skip()] * 3
        return goes_on, [_state(run, model, here), gr.Button(interactive=goes_on), now]

    on(look.click, looked, names, [told, offered, start])
    on(by_range.click, inspected, names, told)
    on(compare.click, compared_by_range, [chosen, names], told)
    on(start.click, started, offered, [stands, start, known, watch.timer])
    on(stop.click, downloads.stop, None, None)
    watch.add(seen, [known], [stands, stop, known])
    on(names.input, lambda: [[], gr.Button("Download", interactive=False)], None, [offered, start])
    return names


def _named(written: str) -> list[str]:
    """Return the repositories that a text names. Raises MergekitLiteError where one is none."""
    found = list(dict.fromkeys(written.replace(",", " ").split()))
    if wrong := [name for name in found if not is_repository(name)]:
        raise MergekitLiteError(f"{', '.join(wrong)}: org/name or org/name@revision is expected.")
    if not 0 < len(found) <= MOST_NAMES:
        raise MergekitLiteError(f"Write the names of models, {MOST_NAMES} at most.")
    return found


def _told(found: list[Needed], places: Places) -> Markup:
    """Return what models take as HTML."""
    rows = []
    for each in found:
        if each.error:
            rows.append((each.name, "", "", each.error))
            continue
        here = (
            "the cache has all of it" if places.is_kept(each.name) else f"downloaded by {shown_command(each.command)}"
        )
        what = f"{here}\nby range: headers, and {size(each.small)} of small files, before weights are read"
        rows.append((each.name, counted(len(each.files or {}), "file"), size(each.nbytes), what))
    folder = next(folder for folder in (places.cache, *places.cache.parents) if folder.exists())
    room = f"{size(shutil.disk_usage(folder).free)} are free for the hub's cache, {places.cache}"
    return element("div", table(("model", "files", "size", "what"), rows), element("p", room))


def _state(run: State, model: Needed | None, here: int) -> Markup:
    """Return how a download stands as HTML."""
    if model is None:
        return Markup()
    words = {"running": "is on its way", "done": "is here: Look again lists it",
             "failed": "is not here: what came is kept, and the next download goes on with it"}  # fmt: skip
    text = f" {words[run.kind]}. {size(here)} of {size(model.nbytes)}"
    parts = [element("p", element("b", model.name), text, role="status")]
    if run.kind == "running":
        parts.append(
            element("progress", max="1", value=f"{here / max(model.nbytes, 1):.3f}", aria_label="Share that is here")
        )
    parts.append(element("code", shown_command(model.command)))
    if run.said:
        parts.append(element("pre", run.said, tabindex="0"))
    return element("div", *parts, class_=run.kind)
