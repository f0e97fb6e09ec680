"""A chat with two alphas: each question is a ``preview`` of a conversation for each of them, kept on the disk.

One process answers the questions, so that the models are loaded once.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

from mergekit_lite.answers.rows import Message
from mergekit_lite.commands.app.places import Places
from mergekit_lite.commands.app.resident import Resident
from mergekit_lite.commands.app.runs import FOLDER, Kind, Runs, State
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.input_files import parse_json, read_json, read_text

CONVERSATIONS = "chat.jsonl"  # one for each alpha, as ``preview --prompts`` reads them
MOST_BYTES = 10_000_000  # of a chat
MOST_TOKENS = 1024  # of an answer
MOST_TURNS = 100


def _stands(root: Path, _state: State) -> str:
    """Return how a question stands that isn't being answered."""
    try:
        return "done" if "prompts" in read_json(root / FOLDER / "preview.out") else "failed"
    except MergekitLiteError:
        return "failed"


PREVIEW = Kind("preview", _stands, apart=True)


class Chat(NamedTuple):
    """A chat: the conversation of each alpha, whose last turn is an answer, or a question that has none."""

    models: tuple[str, ...] = ()
    alphas: tuple[str, ...] = ()
    conversations: tuple[tuple[Message, ...], ...] = ()
    figures: tuple[str, ...] = ()  # of the last answers
    answered: bool = True
    held: int = 0  # bytes of the models that gave them


def ask(
    places: Places,
    runs: Runs,
    resident: Resident,
    models: Sequence[str],
    alphas: Sequence[float],
    most: float,
    question: str,
) -> None:
    """Ask both alphas, in a process of their own; the chat goes on where models and alphas are those of before.

    Raises:
        UsageError: the page may not read a model, a field is wrong, or a run goes on.
    """
    if not all(models):
        raise UsageError("Choose the models before and after alignment, above.")
    for reference in models:
        if why := places.refusal(reference) or places.missing(reference):
            raise UsageError(why)
    if not question.strip():
        raise UsageError("Ask something.")
    if any(each is None or not math.isfinite(each) for each in alphas):
        raise UsageError("Each of the two alphas is a number.")
    if len(set(alphas)) < len(alphas):
        raise UsageError("The two alphas are the same: take two.")
    if most is None or not 1 <= most <= MOST_TOKENS:
        raise UsageError(f"The most tokens of an answer are from 1 to {MOST_TOKENS:,}.")
    written = tuple(f"{alpha:g}" for alpha in alphas)
    before = chat(runs)
    same = (tuple(models), written) == (before.models, before.alphas)
    talks = before.conversations if same else ((),) * len(written)
    asked = Message(role="user", content=question)
    told = [[*(talk if before.answered else talk[:-1]), asked] for talk in talks]
    if max(map(len, told)) > 2 * MOST_TURNS:
        raise UsageError(f"A chat has {MOST_TURNS} questions at most: begin anew.")
    rows = [{"id": f"alpha {alpha}", "messages": talk} for alpha, talk in zip(written, told, strict=True)]
    arguments = ["preview", f"--alpha={','.join(written)}", "--prompts", f"{FOLDER}/{CONVERSATIONS}"]
    arguments += ["--max-tokens", str(int(most)), "--json", "--", *models]
    files = {CONVERSATIONS: "".join(f"{json.dumps(row)}\n" for row in rows)}
    runs.launch(arguments, "chat", files, resident=resident)


def chat(runs: Runs) -> Chat:
    """Return the chat as it stands on the disk; an empty one where there is none."""
    state = runs.state()
    path = runs.folder / CONVERSATIONS
    if state.kind == "none" or not path.exists():
        return Chat()
    *_, first, second = state.arguments
    rows = [parse_json(line) for line in read_text(path, MOST_BYTES).splitlines()]
    talks = [tuple(row["messages"]) for row in rows]
    alphas = tuple(row["id"].removeprefix("alpha ") for row in rows)
    if state.kind != "done":
        return Chat((first, second), alphas, tuple(talks), answered=False)
    said = read_json(runs.folder / "preview.out")
    answers = [_answer(said, talk, number) for number, talk in enumerate(talks)]
    whole = tuple(
        (*talk, Message(role="assistant", content=each["text"])) for talk, each in zip(talks, answers, strict=True)
    )
    held = sum(model["bytes"] for model in said["models"])
    return Chat((first, second), alphas, whole, tuple(map(_figures, answers)), held=held)


def forget(runs: Runs, resident: Resident) -> None:
    """Begin anew with the next question."""
    if runs.state().kind != "running":
        resident.let_go()
        (runs.folder / CONVERSATIONS).unlink(missing_ok=True)


def _answer(said: dict[str, Any], talk: Sequence[Message], number: int) -> dict[str, Any]:
    """Return the answer of the alpha with this number to its own conversation; equal conversations are asked once."""
    prompts = [prompt for prompt in said["prompts"] if prompt["messages"] == list(talk)]
    answer: dict[str, Any] = prompts[0]["answers"][number]
    return answer


def _figures(answer: dict[str, Any]) -> str:
    cut = ", cut" if answer["finish"] != "stop" else ""
    likely = answer["log_probs"].get("ALIGNED")
    under = "" if likely is None else f", log-probability a token {likely:.2f} under ALIGNED"
    return f"{answer['tokens']:,} tokens{cut}{under}"
