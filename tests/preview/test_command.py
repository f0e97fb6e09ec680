"""``mergekit-lite preview`` as a user types it."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from mergekit_lite.commands import main
from mergekit_lite.commands import preview as preview_command
from mergekit_lite.commands.screen import PlainConsole, Screen
from tests.preview.pairs import greedy, write_pair

QUESTION = "What is one and one?"


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    return write_pair(tmp_path_factory.mktemp("pair"))


def run(pair: tuple[Path, Path], *arguments: str) -> Result:
    return CliRunner().invoke(main, ["preview", *map(str, pair), "--max-tokens", "9", *arguments])


def as_json(pair: tuple[Path, Path], *arguments: str) -> Any:
    result = run(pair, "--json", *arguments)
    assert result.exit_code == 0, result.output
    return json.loads(result.stdout)


def test_answers_are_printed_and_told_as_json(pair: tuple[Path, Path], tmp_path: Path) -> None:
    told = as_json(pair, "--alpha=-1,0,0.5", "--prompt", QUESTION)
    (prompt,) = told["prompts"]
    assert [each["alpha"] for each in prompt["answers"]] == [-1, 0, 0.5]
    assert {model["role"] for model in told["models"]} == {"SFT", "ALIGNED"}
    shown = run(pair, "--alpha=-1,0,0.5", "--prompt", QUESTION)
    assert shown.exit_code == 0 and "of memory on cpu; at most 9 tokens to 1 prompt, 3 answers at once" in shown.stderr
    for each in prompt["answers"]:
        likely = f"{each['log_probs']['ALIGNED']:.2f} under ALIGNED"
        assert f"alpha {each['alpha']:g}  9 tokens, cut, log-probability a token {likely}\n" in shown.stdout
    file = tmp_path / "dev.jsonl"
    file.write_text("".join(json.dumps({"prompt": text}) + "\n" for text in (QUESTION, "one two", "three")))
    two = as_json(pair, "--alpha=-1,0,0.5", "--prompts", str(file), "--limit", "2")["prompts"]
    assert [each["messages"][-1]["content"] for each in two] == [QUESTION, "one two"]
    assert two[0]["answers"] == prompt["answers"]


def test_one_model_is_loaded_where_one_is_enough(pair: tuple[Path, Path]) -> None:
    told = as_json(pair, "--alpha", "0", "--prompt", QUESTION)
    assert [model["role"] for model in told["models"]] == ["ALIGNED"]
    dry = run(pair, "--alpha=-1", "--prompt", QUESTION, "--dry-run")
    assert dry.exit_code == 0 and "SFT" in dry.stdout and "ALIGNED" not in dry.stdout


def test_a_search(pair: tuple[Path, Path]) -> None:
    told = as_json(pair, "--alpha=-1", "--prompt", QUESTION, "--search", "2,3,inf")
    assert told["search"] == {"width": 2, "successors": 3, "length": None}
    assert told["sampling"]["temperature"] == 0.7
    assert {model["role"] for model in told["models"]} == {"SFT", "ALIGNED"}


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        ((), 2, "What is to be asked? Give --prompt TEXT, or --prompts FILE."),
        (("--prompt", "x", "--alpha", "0,0"), 2, "The same alpha was given twice."),
        (("--prompt", "x", "--search", "4,4"), 2, "should be W,K,L"),
        (("--prompt", "x", "--search", "4,0,4"), 2, "at least one draft, one successor"),
        (("--prompt", "x", "--temperature", "-1", "--top-p", "2"), 2, "temperature: expected a number from 0, got -1"),
        (("--prompt", "x", "--dtype", "int8"), 2, "dtype 'int8': expected one of float32, bfloat16, float16."),
        (("--prompt", "x " * 3000), 2, "tokens, SFT ("),
    ],
)
def test_wrong_usage(pair: tuple[Path, Path], arguments: tuple[str, ...], code: int, message: str) -> None:
    result = run(pair, *arguments)
    assert (result.exit_code, "Traceback" in result.output) == (code, False)
    assert message in result.stderr


def test_on_a_terminal_answers_stand_side_by_side_while_they_grow(
    pair: tuple[Path, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A console that thinks it is a terminal: the answers are there at the end, in columns where it is wide enough."""

    def printed(width: int) -> str:
        stream = io.StringIO()
        screen = Screen(quiet=False, verbose=False)
        screen.out = PlainConsole(file=stream, force_terminal=True, width=width, height=20, highlight=False)
        monkeypatch.setattr("mergekit_lite.commands.screen.Screen", lambda **_: screen)
        preview_command.command.main([*map(str, pair), "--prompt", QUESTION, "--alpha", "0,0.5", "--max-tokens", "9"],
                                     standalone_mode=False)  # fmt: skip
        return stream.getvalue()

    wide = printed(160)
    assert any("alpha 0 " in line and "alpha 0.5 " in line for line in wide.splitlines())
    assert "alpha 0  1 token " in wide  # while it grew
    narrow = printed(40)
    assert not any("alpha 0 " in line and "alpha 0.5 " in line for line in narrow.splitlines())


def test_what_is_printed_is_the_model_s_answer(pair: tuple[Path, Path]) -> None:
    told = as_json(pair, "--alpha", "0", "--prompt", QUESTION)
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(pair[1])
    text = f"<|im_start|>user\n{QUESTION}<|im_end|>\n<|im_start|>assistant\n"
    expected = greedy(pair[1], tuple(tokenizer(text)["input_ids"]), 9)
    assert told["prompts"][0]["answers"][0]["text"] == tokenizer.decode(expected, skip_special_tokens=True)
