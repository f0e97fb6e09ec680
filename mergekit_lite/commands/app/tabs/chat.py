"""The part of the tab of choosing that talks: two alphas answer beside each other."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import gradio as gr

from mergekit_lite.answers.rows import Message
from mergekit_lite.commands.app.chats import MOST_TOKENS, PREVIEW, Chat, ask, chat, forget
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.resident import PATIENCE, Resident
from mergekit_lite.commands.app.runs import Runs, State, shown_command
from mergekit_lite.commands.app.tabs.parts import Watch, on, refusal
from mergekit_lite.commands.units import size
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.pages.html import Markup, element

KEPT = (
    "The first question loads the models, and they stay in memory until the chat begins anew, a search starts, or "
    f"nothing was asked for {PATIENCE // 60} minutes"
)


def chat_part(places: Places, base: gr.Dropdown, tuned: gr.Dropdown, watch: Watch) -> Callable[[], None]:
    """Lay out the part, for the two models that are chosen above; return what lets go of those that it keeps."""
    runs = Runs(places.root, PREVIEW)
    resident = Resident(places.root)
    with gr.Accordion("Chat with two alphas", open=False, elem_id="chat"):
        with gr.Row():
            first = gr.Number(0, label="First alpha", elem_id="chat-first", step=0.1)
            second = gr.Number(0.5, label="Second alpha", elem_id="chat-second", step=0.1)
            most = gr.Number(128, label="Most tokens", minimum=1, maximum=MOST_TOKENS, precision=0, elem_id="chat-most")
        question = gr.Textbox(label="Question", lines=2, elem_id="chat-question")
        with gr.Row():
            send = gr.Button("Ask", variant="primary", elem_id="chat-ask")
            stop = gr.Button("Stop", variant="stop", elem_id="chat-stop")
            anew = gr.Button("Begin anew", elem_id="chat-anew")
        refused = gr.HTML(elem_id="chat-refused")
        told = gr.HTML(elem_id="chat-told")
    seen = gr.State("")
    shows = [seen, told, send, stop, anew]
    now = [watch.timer, *shows]

    def look(before: str) -> tuple[bool, list[Any]]:
        state = runs.state()
        shown = _shown(runs, state, resident.holds)
        goes_on = state.kind == "running"
        if shown == before:
            return goes_on, [gr.skip()] * len(shows)
        usable = (not goes_on, goes_on, not goes_on)
        return goes_on, [str(shown), shown, *(gr.Button(interactive=each) for each in usable)]

    def looked(before: str) -> list[Any]:
        return [watch.soon(), *look(before)[1]]

    def asked(sft: str, aligned: str, one: float, other: float, tokens: float, text: str, before: str) -> list[Any]:
        try:
            ask(places, runs, resident, (sft, aligned), (one, other), tokens, text or "")
        except MergekitLiteError as error:
            return [refusal(str(error)), gr.skip(), *looked(before)]
        return ["", "", *looked(before)]

    def stopped(before: str) -> list[Any]:
        runs.stop()
        return looked(before)

    def begun_anew(before: str) -> list[Any]:
        forget(runs, resident)
        return looked(before)

    fields = [base, tuned, first, second, most, question, seen]
    gr.on([send.click, question.submit], asked, fields, [refused, question, *now], api_visibility="private")
    on(stop.click, stopped, seen, now)
    on(anew.click, begun_anew, seen, now)
    watch.add(look, [seen], shows)
    return resident.let_go


def _shown(runs: Runs, state: State, holds: bool) -> Markup:
    """Return the chat: the command, and the conversations beside each other."""
    try:
        talk = chat(runs)
    except (MergekitLiteError, LookupError, ValueError, TypeError) as error:
        return refusal(f"The chat can't be read: {error}")
    if not talk.conversations:
        return element("p", f"{KEPT}; nothing is loaded now.")
    parts = [element("code", shown_command(list(state.arguments)))]
    if holds:
        parts.append(element("p", f"The models are in memory{f': {size(talk.held)}' if talk.held else ''}. {KEPT}."))
    if state.kind == "running":
        parts += [element("p", "They answer …", role="status"), element("progress", max="1", aria_label="Progress")]
    elif state.kind == "failed":
        parts.append(element("p", "There is no answer to the last question.", class_="wrong", role="alert"))
    if state.said and state.kind != "running":
        parts.append(element("pre", state.said, tabindex="0"))
    columns = [
        _column(talk, number, alpha, messages)
        for number, (alpha, messages) in enumerate(zip(talk.alphas, talk.conversations, strict=True))
    ]
    return element("div", *parts, element("div", *columns, class_="beside"), class_=state.kind)


def _column(talk: Chat, number: int, alpha: str, messages: Sequence[Message]) -> Markup:
    """Return one conversation, the latest turn last, with the figures of the last answer."""
    figures = f": {talk.figures[number]}" if talk.figures else ""
    turns = [element("pre", each["content"], class_=each["role"], tabindex="0") for each in messages]
    return element("div", element("span", f"alpha {alpha}{figures}", class_="soft"), *turns)
