"""Rows follow their tokens in every command: padded vocabularies, added tokens, other numbers."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner, Result

import mergekit_lite
from mergekit_lite.commands import main
from mergekit_lite.errors import UsageError
from tests.models import State, read_folder, same_bytes
from tests.test_vocabularies import VOCABULARY, WORDS, model

Tokens = list[str | None]
MORE = "<|im_end|>"
# name: the tokens of SFT and its rows, those of the aligned model and its rows
PAIRS: dict[str, tuple[Tokens, int, Tokens, int]] = {
    "padded": ([*WORDS], 12, [*WORDS], 16),
    "padded the other way": ([*WORDS], 16, [*WORDS], 12),
    "added": ([*WORDS], 10, [*WORDS, MORE], 11),
    "other numbers": ([*WORDS], 10, [*WORDS[:2], *reversed(WORDS[2:])], 10),
    "all of it": ([*WORDS], 12, [*WORDS[:2], *reversed(WORDS[2:]), MORE], 16),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def pair(place: Path, kind: str) -> tuple[State, State]:
    """Write SFT and the aligned model of a kind."""
    before, rows_before, after, rows_after = PAIRS[kind]
    sft, aligned = model(place / "sft", 0, before, rows_before), model(place / "aligned", 1, after, rows_after)
    return sft, aligned


def of_token(kind: str, tensor: str, sft: State, aligned: State, row: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Return both models' rows for a row of the aligned one, looked up by its token; a row alone stands for both."""
    before, _, after, _ = PAIRS[kind]
    own = aligned[tensor][row]
    token = after[row] if row < len(after) else None
    if token in before:
        return sft[tensor][before.index(token)], own
    is_padding = token is None and len(before) <= row < len(sft[tensor])
    return (sft[tensor][row] if is_padding else own), own


def run(*arguments: object) -> Result:
    return CliRunner().invoke(main, [str(argument) for argument in arguments])


@pytest.mark.parametrize("kind", PAIRS)
def test_extrapolation_goes_token_by_token(place: Path, kind: str) -> None:
    sft, aligned = pair(place, kind)
    result = run("extrapolate", "sft", "aligned", "-a", 0.5, "--tokenizer-source", "aligned", "-o", "out")
    assert result.exit_code == 0, result.output
    made = read_folder(place / "out")
    for tensor in VOCABULARY:
        assert len(made[tensor]) == len(aligned[tensor])
        for row, got in enumerate(made[tensor]):
            one, other = of_token(kind, tensor, sft, aligned, row)
            assert same_bytes(got, (other.float() + 0.5 * (other.float() - one.float())).bfloat16())
    assert json.loads((place / "out/config.json").read_text())["vocab_size"] == len(aligned[VOCABULARY[0]])
    assert (place / "out/tokenizer.json").read_text() == (place / "aligned/tokenizer.json").read_text()
    assert mergekit_lite.verify("out").sound


@pytest.mark.parametrize("kind", PAIRS)
def test_without_the_option_extrapolation_names_it(place: Path, kind: str) -> None:
    pair(place, kind)
    result = run("extrapolate", "sft", "aligned", "-a", 0.5, "-o", "out", "--dry-run")
    assert (result.exit_code == 0) == (kind == "other numbers")  # there the plan warns
    assert "--tokenizer-source" in result.output


def test_extrapolation_can_keep_the_tokenizer_of_the_base(place: Path) -> None:
    sft, aligned = pair(place, "all of it")
    mergekit_lite.extrapolate("sft", "aligned", "out", 0.5, tokenizer_source="base", width="max")
    made = read_folder(place / "out")
    for tensor in VOCABULARY:
        assert len(made[tensor]) == 16
        for row, token in enumerate(WORDS):
            own = aligned[tensor][PAIRS["all of it"][2].index(token)].float()
            assert same_bytes(made[tensor][row], (own + 0.5 * (own - sft[tensor][row].float())).bfloat16())
        assert same_bytes(made[tensor][12:], aligned[tensor][12:])
    assert (place / "out/tokenizer.json").read_text() == (place / "sft/tokenizer.json").read_text()
    with pytest.raises(UsageError, match="Did you mean 'aligned'"):
        mergekit_lite.extrapolate("sft", "aligned", "out", 0.5, tokenizer_source="alined")
    with pytest.raises(UsageError, match="give tokenizer_source"):
        mergekit_lite.extrapolate("sft", "aligned", "out", 0.5, width="max")
    with pytest.raises(UsageError, match="width expects one of base, max, min"):
        mergekit_lite.extrapolate("sft", "aligned", "out", 0.5, tokenizer_source="aligned", width="most")  # type: ignore[arg-type]


@pytest.mark.parametrize("kind", PAIRS)
def test_comparison_goes_token_by_token(place: Path, kind: str) -> None:
    """The figures are those of the rows that both have, gathered one by one."""
    sft, aligned = pair(place, kind)
    before, rows_before, after, rows_after = PAIRS[kind]
    compared = mergekit_lite.compare("sft", ["aligned"])
    both = [(row, after.index(token)) for row, token in enumerate(before) if token in after]
    both += [(row, row) for row in range(max(len(before), len(after)), min(rows_before, rows_after))]
    for tensor in VOCABULARY:
        of_tensor = next(each for each in compared.tensors if each.tensor.name == tensor)
        assert of_tensor.tensor.shape == (len(both), 8)
        one, other = (torch.stack([each[tensor][row] for row in rows]).double()
                      for each, rows in zip((sft, aligned), zip(*both, strict=True), strict=True))  # fmt: skip
        [norm] = compared.figures(of_tensor).norm
        assert norm == pytest.approx(float((other - one).norm()), rel=1e-6)
    told = [note for note in compared.notes if "rows are compared, token by token" in note]
    assert any(note.startswith("aligned: ") for note in told)
    if kind == "other numbers":
        assert told == [
            "aligned: 2 tokens at the same place, 8 at another, 0 it lacks; 10 rows are compared, token by token"
        ]


def test_comparison_tells_special_tokens_with_other_roles(place: Path) -> None:
    pair(place, "added")
    (place / "aligned/tokenizer_config.json").write_text(json.dumps({"eos_token": MORE}))
    result = run("compare", "sft", "aligned")
    assert f"aligned uses other special tokens: eos_token '{MORE}', here '</s>'" in result.output.replace("\n", " ")
    (place / "aligned/tokenizer.json").write_text("{")
    assert any("rows are compared by their numbers" in note for note in mergekit_lite.compare("sft", ["aligned"]).notes)
