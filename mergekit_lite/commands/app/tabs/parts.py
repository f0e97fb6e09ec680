"""What the tabs have in common: binding an event, showing what a command says, showing what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import MappingProxyType
from typing import Any

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.runs import State, ask, shown_command
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.pages.html import Markup, element

Online = Mapping[str, str]  # variables of commands that may ask the hub, before those of this process, which may not


def on(event: Callable[..., Any], function: Callable[..., Any], inputs: Any, outputs: Any, **options: Any) -> Any:
    """Bind a function of the page alone, which no other program may call by its name."""
    return event(function, inputs, outputs, api_visibility="private", **options)


def asked(
    places: Places,
    arguments: list[str],
    references: list[str],
    more: Sequence[str] = (),
    seconds: float = 600,
    environment: Online = MappingProxyType({}),
) -> Markup:
    """Return what a command says, under the command itself."""
    if problems := [why for reference in references if (why := places.refusal(reference))]:
        return refusal("\n".join(problems))
    try:
        said = ask(places.root, [*arguments, *more], seconds, environment)
    except MergekitLiteError as error:
        said = str(error)
    return element("div", element("code", shown_command(arguments)), element("pre", said, tabindex="0"))


def refusal(text: str) -> Markup:
    """Return what is wrong, as it is read out at once."""
    return element("p", text, class_="wrong", role="alert")


def listed(parts: list[Markup], otherwise: str = "") -> Markup:
    """Return parts below each other; where there are none, what to do."""
    return element("div", *parts) if parts else refusal(otherwise)


def standing(name: str, state: State) -> list[Markup]:
    """Return how a run stands: what it makes, a bar while it goes on, the command, and what that said."""
    words = {"running": "runs", "stopped": "stopped: Resume goes on with what was finished", "failed": "failed",
             "done": "is done"}  # fmt: skip
    parts = [element("p", element("b", name), f" {words[state.kind]}. {state.progress}", role="status")]
    if state.kind == "running":
        told = {} if state.share is None else {"value": str(state.share)}
        parts.append(element("progress", max="1", aria_label="Progress", **told))
    parts.append(element("code", shown_command(list(state.arguments))))
    if state.said:
        parts.append(element("pre", state.said, tabindex="0"))
    return parts
