"""The part of the tab of choosing that talks: two alphas answer beside each other."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import gradio as gr

from mergekit_lite.answers.rows import Message
from mergekit_lite.commands.app.chats import MOST_TOKENS, PREVIEW, Chat, ask, chat, forget
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.runs import Runs, State, shown_command
from mergekit_lite.commands.app.tabs.parts import on, refusal
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.pages.html import Markup, element

TICK = 1.0  # seconds between two looks at an answer


def chat_part(places: Places, base: gr.Dropdown, tuned: gr.Dropdown) -> None:
    """Lay out the part, for the two models that are chosen above."""
    runs = Runs(places.root, PREVIEW)
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
    now = [seen, told, send, stop, anew]

    def look(before: str) -> list[Any]:
        state = runs.state()
        shown = _shown(runs, state)
        if shown == before:
            return [gr.skip()] * len(now)
        goes_on = state.kind == "running"
        return [str(shown), shown, *(gr.Button(interactive=each) for each in (not goes_on, goes_on, not goes_on))]

    def asked(sft: str, aligned: str, one: float, other: float, tokens: float, text: str, before: str) -> list[Any]:
        try:
            ask(places, runs, (sft, aligned), (one, other), tokens, text or "")
        except MergekitLiteError as error:
            return [refusal(str(error)), gr.skip(), *look(before)]
        return ["", "", *look(before)]

    def stopped(before: str) -> list[Any]:
        runs.stop()
        return look(before)

    def begun_anew(before: str) -> list[Any]:
        forget(runs)
        return look(before)

    fields = [base, tuned, first, second, most, question, seen]
    gr.on([send.click, question.submit], asked, fields, [refused, question, *now], api_visibility="private")
    on(stop.click, stopped, seen, now)
    on(anew.click, begun_anew, seen, now)
    on(gr.Timer(TICK).tick, look, seen, now, show_progress="hidden")


def _shown(runs: Runs, state: State) -> Markup:
    """Return the chat: the command, and the conversations beside each other."""
    try:
        talk = chat(runs)
    except (MergekitLiteError, LookupError, ValueError, TypeError) as error:
        return refusal(f"The chat can't be read: {error}")
    if not talk.conversations:
        return element("p", "Each question loads both models anew, as the command does.")
    parts = [element("code", shown_command(list(state.arguments)))]
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
