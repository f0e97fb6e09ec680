"""Base models that read rules and examples, as URIAL's authors give them: behind servers and in this process."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import yaml

from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.in_context import STOPS, InContext, answer_in, text_of
from mergekit_lite.answers.local import Local
from mergekit_lite.answers.rows import Message, write_rows
from tests.answers.aggregating.aggregates import answer, rows
from tests.answers.fake_server import Fake, fake_server
from tests.answers.test_local import tasks_of, write_model

EXAMPLES = "# Instruction\n\nBe kind.\n\n# Query:\n```\nHi\n```\n\n# Answer:\n```\nHello!\n```\n"


def authors(examples: str, turns: list[str]) -> str:
    """What ``urial_backticks`` of tml-epfl/icl-alignment makes of a conversation, from its description."""
    text, roles = examples, ["# Query:", "# Answer:"]
    for number, turn in enumerate([*turns, None]):
        text += "\n" + roles[number % 2] + "\n" + "```" + "\n"
        if turn is not None:
            text += turn + "\n" + "```" + "\n"
    return text


@pytest.mark.parametrize("turns", [["Why?"], ["Why?", "Because.", "Why\n\nso?"]])
def test_the_text_is_the_authors(turns: list[str]) -> None:
    messages = [Message(role="assistant" if number % 2 else "user", content=turn) for number, turn in enumerate(turns)]
    assert text_of(EXAMPLES, messages) == authors(EXAMPLES, turns)


def test_a_system_message_stands_before_the_first_turn() -> None:
    messages = [Message(role="system", content="Be brief."), Message(role="user", content="Why?")]
    assert text_of(EXAMPLES, messages) == authors(EXAMPLES, ["Be brief.\n\nWhy?"])


@pytest.mark.parametrize(
    ("written", "answer"),
    [
        ("Hello!\n```\n\n", "Hello!"),
        ("Hello!```", "Hello!"),
        ("Hello!", "Hello!"),
        ("So:\n```python\nx = 1\n```\nDone.\n```\n\nmore", "So:\n```python\nx = 1\n```\nDone."),
        ("So:\n```python\nx = 1\n```", "So:\n```python\nx = 1\n```"),
        ("```", ""),
        ("So:\n```\nx = 1\n```\nDone.\n```\n\n", "So:\n```\nx = 1\n```\nDone."),
        ("```\nx = 1\n```\n```\n", "```\nx = 1\n```"),
        ("```\nx\n```\nor\n```\ny\n```\n```", "```\nx\n```\nor\n```\ny\n```"),
        ("Hello!\n```\n\n# Instruction:\n```\nx\n```", "Hello!"),
    ],
)
def test_the_fence_that_closes_ends_an_answer(written: str, answer: str) -> None:
    assert answer_in(written) == answer


def test_a_server_goes_on_with_the_text(tmp_path: Path) -> None:
    def reply(body: dict[str, object]) -> str:
        return f"Because {len(str(body['prompt']))}.\n```\n"

    write_rows(tmp_path / "prompts.jsonl", [{"id": "p", "prompt": "Why?"}])
    (tmp_path / "urial.txt").write_text(EXAMPLES)
    with fake_server(Fake(reply=reply)) as fake:
        model = {"name": "base", "model": "org/base", "server": fake.url, "in_context": "urial.txt"}
        model["sampling"] = {"temperature": 0, "repetition_penalty": 1.15}
        recipe = tmp_path / "recipe.yml"
        recipe.write_text(
            yaml.safe_dump({"models": [model], "layers": [{"step": "generate", "model": "base"}]}, sort_keys=False)
        )
        assert answer(recipe)[0] == 0
        (body,) = fake.bodies
        text = authors(EXAMPLES, ["Why?"])
        assert body["prompt"] == text and "messages" not in body
        assert body["stop"] == list(STOPS) and body["repetition_penalty"] == 1.15 and body["temperature"] == 0
        assert rows(tmp_path / "answers.jsonl")[0]["response"] == f"Because {len(text)}."
        (tmp_path / "urial.txt").write_text(EXAMPLES + "\n")
        assert answer(recipe)[0] == 0 and len(fake.bodies) == 2  # other examples, other answers
        (tmp_path / "urial.txt").unlink()
        code, _, error = answer(recipe)
        assert code == 2 and "urial.txt" in error


def test_a_prompt_that_is_refused_is_no_parameter_to_leave_out(tmp_path: Path) -> None:
    write_rows(tmp_path / "prompts.jsonl", [{"id": "p", "prompt": "Why?"}])
    (tmp_path / "urial.txt").write_text(EXAMPLES)
    with fake_server(Fake(refuses=lambda body: "a prompt of this length is not supported")) as fake:
        model = {"name": "base", "model": "org/base", "server": fake.url, "in_context": "urial.txt"}
        (tmp_path / "recipe.yml").write_text(
            yaml.safe_dump({"models": [model], "layers": [{"step": "generate", "model": "base"}]})
        )
        code, _, error = answer(tmp_path / "recipe.yml")
        assert code == 1 and "a prompt of this length is not supported" in error and len(fake.bodies) == 1


def test_a_model_in_this_process_reads_the_text(tmp_path: Path) -> None:
    number = random.randrange(1000)
    print(f"number {number}")
    folder = str(write_model(tmp_path, style=None))
    sampling = Sampling(temperature=0, max_tokens=8)
    local = InContext("base", folder, sampling, examples=EXAMPLES)
    (task, *_) = tasks_of((f"one {number}",), samples=1)
    (draw,) = local.draws([task], frozenset([task.key]), 0)
    assert local.tokenizer.decode(draw.prompt) == authors(EXAMPLES, [f"one {number}"])
    plain = Local("base", folder, sampling)
    (other,) = plain.draws([task], frozenset([task.key]), 0)
    assert other.prompt != draw.prompt and not local.notes and plain.notes
