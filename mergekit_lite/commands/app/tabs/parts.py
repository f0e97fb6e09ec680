"""What the tabs have in common: events, looks at what runs, what a command says, what is wrong."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from itertools import islice
from pathlib import Path
from tempfile import TemporaryDirectory
from types import MappingProxyType
from typing import Any, NamedTuple

import gradio as gr

from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.runs import Runs, State, ask, shown_command
from mergekit_lite.errors import MergekitLiteError
from mergekit_lite.pages.html import Markup, element

Online = Mapping[str, str]  # variables of commands that may ask the hub, before those of this process, which may not
TICK = 1.0  # seconds between two looks at what runs
IDLE = 5.0  # where nothing does: another page may start something


def on(event: Callable[..., Any], function: Callable[..., Any], inputs: Any, outputs: Any, **options: Any) -> Any:
    """Bind a function of the page alone, which no other program may call by its name."""
    return event(function, inputs, outputs, api_visibility="private", **options)


class Part(NamedTuple):
    """A part of the page that shows something that runs.

    ``look`` gets what the part shows, its ``known``, and returns whether something runs and the values of ``outputs``.
    Those that are as they were are skipped.
    """

    look: Callable[..., tuple[bool, list[Any]]]
    known: list[gr.State]
    outputs: list[Any]


class Watch:
    """The looks of all parts of a page at what runs, in one request: a page that nobody uses costs next to nothing.

    What starts something sets ``timer`` to ``soon()``.
    """

    def __init__(self) -> None:
        """Look at nothing yet."""
        self.timer = gr.Timer(TICK)
        self._parts: list[Part] = []

    def add(self, look: Callable[..., tuple[bool, list[Any]]], known: list[gr.State], outputs: list[Any]) -> None:
        """Look at a part, too."""
        self._parts.append(Part(look, known, outputs))

    def soon(self) -> gr.Timer:
        """Return what the timer becomes where something was started."""
        return gr.Timer(TICK)

    def begin(self) -> None:
        """Bind the looks, once all parts are added."""
        known = [each for part in self._parts for each in part.known]
        outputs = [each for part in self._parts for each in part.outputs]

        on(self.timer.tick, self.looked, [self.timer, *known], [self.timer, *outputs], show_progress="hidden")

    def looked(self, seconds: float, *before: Any) -> list[Any]:
        """Return what the timer and all outputs become, from the timer's seconds and what all parts show."""
        each = iter(before)
        found = [part.look(*islice(each, len(part.known))) for part in self._parts]
        wanted = TICK if any(goes_on for goes_on, _ in found) else IDLE
        values = [value for _, values in found for value in values]
        return [gr.skip() if seconds == wanted else gr.Timer(wanted), *values]


def usable(state: State) -> list[gr.Button]:
    """Return what becomes of the buttons of a run: start, stop, resume, and what is for one that is done."""
    kinds = (state.kind != "running", state.kind == "running", state.kind == "stopped", state.kind == "done")
    return [gr.Button(interactive=each) for each in kinds]


def stops_and_resumes(
    runs: Runs, look: Callable[[], list[Any]], stop: gr.Button, resume: gr.Button, refused: gr.HTML, now: list[Any]
) -> None:
    """Bind the buttons that stop a run and go on with it; ``look`` returns what ``now`` becomes."""

    def resumed() -> list[Any]:
        try:
            runs.resume()
        except MergekitLiteError as error:
            return [refusal(str(error)), *look()]
        return ["", *look()]

    def stopped() -> list[Any]:
        runs.stop()
        return look()

    on(resume.click, resumed, None, [refused, *now])
    on(stop.click, stopped, None, now)


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


def compared(
    places: Places, names: list[str], options: Sequence[str] = (), environment: Online = MappingProxyType({})
) -> Markup:
    """Return what ``compare`` says of models, the base first, and its page."""
    if len(names) < 2:
        return refusal("Choose a base and a model that was tuned from it, or several.")
    with TemporaryDirectory() as folder:
        file = Path(folder, "compare.html")
        more = ["--html", str(file)]
        said = asked(places, ["compare", *names, *options], names, more, environment=environment)
        if not file.exists():
            return said
        whole = file.read_text(encoding="utf-8")
    frame = element("iframe", srcdoc=whole, sandbox="allow-scripts", title="Comparison", class_="report")
    return listed([said, frame])


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
