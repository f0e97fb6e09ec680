"""An output put on the hub, in the tab of the run: looked at first, and pushed by the user's second word."""

from __future__ import annotations

from typing import Any

import gradio as gr

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.runs import Runs, State, apart, shown_command
from mergekit_lite.commands.app.tabs.parts import Online, Watch, on, refusal
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.pages.html import Markup, element
from mergekit_lite.pushing import check_name

DRY = "--dry-run"
PUSH = apart("push", "push.lock")
WORDS = {"running": "goes on", "failed": "failed", "done": "is done"}


def push_part(places: Places, runs: Runs, online: Online, watch: Watch) -> None:
    """Lay out the part."""
    pushes = Runs(places.root, PUSH, online=online)
    with gr.Accordion("Put it on the hub", open=False, elem_id="push"):
        output = gr.Textbox(label="Output", info="Empty: what the latest run made", elem_id="push-output")
        repository = gr.Textbox(
            label="Repository",
            info="org/name. The token is that of hf auth login, or HF_TOKEN of this server; the page asks for none.",
            elem_id="push-repository",
        )
        public = gr.Checkbox(label="Let everybody see it (--public); else it is private", elem_id="push-public")
        check = gr.Button("Check what would be pushed", elem_id="push-check")
        again = gr.Textbox(label="Once more the repository's name, to push it", interactive=False, elem_id="push-again")
        with gr.Row():
            push = gr.Button("Push", variant="primary", interactive=False, elem_id="push-now")
            stop = gr.Button("Stop", variant="stop", interactive=False, elem_id="push-stop")
        refused = gr.HTML(elem_id="push-refused")
        stands = gr.HTML(elem_id="push-state")
        checked = gr.State([])  # the command that may be run, once its dry run was sound
        known = gr.State()  # what is shown of a push

    def dry(name: str, where: str, everybody: bool) -> list[Any]:
        try:
            arguments = _command(places, runs, name, where, everybody)
            pushes.launch([*arguments, DRY], arguments[1])
        except MergekitLiteError as error:
            return [refusal(str(error)), [], *_closed(), gr.skip(), gr.skip()]
        return ["", [], *_closed(), None, watch.soon()]

    def pushed(arguments: list[str], word: str) -> list[Any]:
        try:
            if not arguments or word.strip() != arguments[2]:
                raise UsageError("Write the repository's name once more, as it was checked.")
            pushes.launch(arguments, arguments[1])
        except MergekitLiteError as error:
            return [refusal(str(error)), arguments, *[gr.skip()] * 4]
        return ["", [], *_closed(), None, watch.soon()]

    def seen(before: State | None) -> tuple[bool, list[Any]]:
        state = pushes.state()
        goes_on = state.kind == "running"
        if state == before:
            return goes_on, [gr.skip()] * 6
        sound = [*state.arguments[:-1]] if state.kind == "done" and state.arguments[-1] == DRY else []
        opened = (gr.Textbox(interactive=bool(sound)), gr.Button(interactive=bool(sound)))
        return goes_on, [_state(state, pushes.printed()), sound, *opened, gr.Button(interactive=goes_on), state]

    begins = [refused, checked, again, push, known, watch.timer]
    on(check.click, dry, [output, repository, public], begins)
    on(push.click, pushed, [checked, again], begins)
    on(stop.click, pushes.stop, None, None)
    watch.add(seen, [known], [stands, checked, again, push, stop, known])
    changed: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}
    gr.on([output.input, repository.input, public.input], lambda: [[], *_closed()], None, [checked, again, push],
          **changed)  # fmt: skip


def _closed() -> list[Any]:
    """Return what the second word's field and its button are as long as nothing was checked."""
    return [gr.Textbox("", interactive=False), gr.Button(interactive=False)]


def _command(places: Places, runs: Runs, output: str, repository: str, public: bool) -> list[str]:
    """Return the command. Raises UsageError where it has no output that is done, or no repository."""
    if not output.strip():
        state = runs.state()
        if state.kind != "done":
            raise UsageError("The latest run has made nothing that could be pushed.")
        if len(state.outputs) > 1:
            raise UsageError(f"Which one? The latest run made {', '.join(state.outputs)}.")
        output = state.outputs[0]
    if why := places.refusal(places.output(output.strip())):
        raise UsageError(why)
    check_name(repository.strip())
    return ["push", output.strip(), repository.strip(), *["--public"] * public]


def _state(state: State, printed: str) -> Markup:
    """Return how a command stands as HTML, with what it printed as its result."""
    if state.kind == "none":
        return Markup()
    what = "The check of every byte" if state.arguments[-1] == DRY else "The push"
    parts = [element("p", f"{what} {WORDS[state.kind]}. {state.progress}", role="status")]
    if state.kind == "running":
        told = {} if state.share is None else {"value": str(state.share)}
        parts.append(element("progress", max="1", aria_label="Progress of the push", **told))
    said = "\n".join(filter(None, (printed, state.said)))
    parts += [element("code", shown_command(list(state.arguments))), element("pre", said, tabindex="0")]
    return element("div", *parts, class_=state.kind)
