"""Rows follow their tokens in every command: padded vocabularies, added tokens, other numbers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner, Result
from safetensors import safe_open
from safetensors.torch import save_file

import mergekit_lite
from mergekit_lite.boosting.candidates.family import PairFamily
from mergekit_lite.boosting.candidates.tunable import parse
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.checkpoint.vector_file import TOKENS, open_vector
from mergekit_lite.commands import main
from mergekit_lite.errors import CheckpointError, UsageError
from mergekit_lite.resident.model import build
from mergekit_lite.resident.weights import Weights
from parity.vocabularies import MODELS
from parity.vocabularies import model as llama
from tests.models import State, read_folder, same_bytes, write_folder
from tests.test_vocabularies import VOCABULARY, WORDS, linear, model

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


@pytest.mark.parametrize("source", ["base", "tuned"])
@pytest.mark.parametrize("kind", PAIRS)
def test_vectors_are_extracted_and_applied_token_by_token(place: Path, kind: str, source: str) -> None:
    """Applied to their base they give the tuned model's rows, and to a model in the other order those of its tokens."""
    sft, aligned = pair(place, kind)
    before, _, after, _ = PAIRS[kind]
    result = run("vector", "extract", "sft", "aligned", "-o", "v.safetensors", "--tokenizer-source", source)
    assert result.exit_code == 0, result.output
    mergekit_lite.apply_vectors("sft", ["v.safetensors"], "same")
    made = read_folder(place / "same")
    for tensor in VOCABULARY:
        assert len(made[tensor]) == len(sft[tensor])
        for row, token in enumerate(before):
            close(made[tensor][row], aligned[tensor][after.index(token)])
    assert (place / "same/tokenizer.json").read_text() == (place / "sft/tokenizer.json").read_text()
    assert mergekit_lite.verify("same").sound
    order: Tokens = [*WORDS[::-1], "of its own"]
    other = model(place / "other", 2, order, 14)
    mergekit_lite.apply_vectors("other", ["v.safetensors:0.5"], "moved", rebase=True)
    made = read_folder(place / "moved")
    for tensor in VOCABULARY:
        for row, token in enumerate(order[:-1]):
            step = aligned[tensor][after.index(token)].double() - sft[tensor][before.index(token)].double()
            assert same_bytes(made[tensor][row], (other[tensor][row].double() + 0.5 * step).bfloat16())
        assert same_bytes(made[tensor][10], other[tensor][10])
    assert mergekit_lite.verify("moved").sound


def close(one: torch.Tensor, other: torch.Tensor) -> None:
    torch.testing.assert_close(one.float(), other.float(), rtol=2**-7, atol=1e-6)


@pytest.mark.parametrize("format", ["sparse", "lowrank", "sign"])
def test_vectors_of_every_format_follow_their_tokens(place: Path, format: str) -> None:
    """Rows added in another order are those added in the vector's own."""
    sft, _ = pair(place, "other numbers")
    how: dict[str, Any] = {"sparse": {"density": 0.5}, "lowrank": {"rank": 2}, "sign": {}}[format]
    mergekit_lite.extract_vector("sft", "aligned", "v.safetensors", format=format, tokenizer_source="tuned", **how)  # type: ignore[arg-type]
    order = PAIRS["other numbers"][2]
    for name, tokens in (("straight", order), ("turned", [*WORDS[::-1]])):
        rows = [WORDS.index(token) for token in tokens]
        moved = {key: value[rows] if key in VOCABULARY else value for key, value in sft.items()}
        model(place / name, 0, tokens)
        write_folder(place / name, moved, config=json.loads((place / name / "config.json").read_text()))
        mergekit_lite.apply_vectors(name, ["v.safetensors"], f"{name} tuned", rebase=True)
    straight, turned = read_folder(place / "straight tuned"), read_folder(place / "turned tuned")
    for tensor in VOCABULARY:
        for row, token in enumerate(order):
            close(turned[tensor][WORDS[::-1].index(token)], straight[tensor][row])


@pytest.mark.parametrize("kind", PAIRS)
def test_without_the_option_extraction_names_it(place: Path, kind: str) -> None:
    pair(place, kind)
    result = run("vector", "extract", "sft", "aligned", "-o", "v.safetensors")
    assert result.exit_code == 0 and "--tokenizer-source" in result.output.replace("\n", "")


def test_vectors_of_different_orders_are_not_combined(place: Path) -> None:
    pair(place, "other numbers")
    for source in ("base", "tuned"):
        mergekit_lite.extract_vector("sft", "aligned", f"{source}.safetensors", tokenizer_source=source)  # type: ignore[arg-type]
    combine = ["vector", "combine", "--method", "linear", "-o", "both.safetensors", "base.safetensors"]
    result = run(*combine, "tuned.safetensors")
    assert "are of different tokens" in result.output.replace("\n", " ")
    mergekit_lite.combine_vectors(["base.safetensors"], "one.safetensors", "linear")
    assert open_vector("one.safetensors").tokens == open_vector("base.safetensors").tokens != ""


def test_tokens_of_a_vector_that_are_damaged_are_told(place: Path) -> None:
    pair(place, "other numbers")
    mergekit_lite.extract_vector("sft", "aligned", "v.safetensors", tokenizer_source="base")
    for damaged in (
        "{",
        "[]",
        '{"alphabet":"x","tokens":[],"added":[]}',
        '{"alphabet":"plain","tokens":[[]],"added":[]}',
    ):
        with safe_open("v.safetensors", "pt") as file:
            metadata = file.metadata() | {TOKENS: damaged}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        save_file(tensors, "w.safetensors", metadata)
        with pytest.raises(CheckpointError, match="what it says of its tokens"):
            open_checkpoint("sft+vector:w.safetensors")


def test_an_extraction_of_other_tokens_is_not_resumed(place: Path) -> None:
    """A tokenizer that changed makes another vector; the same one is found done."""
    pair(place, "other numbers")
    mergekit_lite.extract_vector("sft", "aligned", "v.safetensors", tokenizer_source="tuned")
    mergekit_lite.extract_vector("sft", "aligned", "v.safetensors", tokenizer_source="tuned", resume=True)
    (place / "aligned/tokenizer.json").write_text((place / "sft/tokenizer.json").read_text())
    with pytest.raises(UsageError, match="exists"):
        mergekit_lite.extract_vector("sft", "aligned", "v.safetensors", tokenizer_source="tuned", resume=True)


@pytest.mark.parametrize("is_head", [True, False])
def test_a_head_by_another_name_follows_where_it_has_the_shape_of_an_embedding(place: Path, is_head: bool) -> None:
    """Whisper's ``proj_out``; in other models that is a layer, whose rows stay."""
    tensors = {}
    for number, (name, tokens) in enumerate({"one": [*WORDS], "two": [*WORDS[::-1]]}.items()):
        own = model(place / name, number, [*tokens])
        own["proj_out.weight"] = own.pop("lm_head.weight")[: None if is_head else 3]
        write_folder(place / name, own, config=json.loads((place / name / "config.json").read_text()))
        tensors[name] = own["proj_out.weight"]
    mergekit_lite.merge(linear([*tensors], tokenizer_source="one"), "out")
    other = tensors["two"].flip(0) if is_head else tensors["two"]
    expected = ((tensors["one"].float() + other.float()) / 2).bfloat16()
    assert same_bytes(read_folder(place / "out")["proj_out.weight"], expected)


@pytest.mark.parametrize("command", ["extrapolate", "merge", "extract", "apply"])
def test_what_was_stopped_goes_on_to_the_same_bytes(place: Path, command: str) -> None:
    """Stopped after its first tensor; a finished run, made again from the journal, is found done."""
    pair(place, "all of it")
    mergekit_lite.extract_vector("sft", "aligned", "v.safetensors", tokenizer_source="tuned")
    model(place / "other", 2, [*WORDS[::-1]])
    recipe = linear(["sft", "aligned"], tokenizer_source="aligned")

    def make(name: str, **how: Any) -> None:
        match command:
            case "extrapolate":
                mergekit_lite.extrapolate("sft", "aligned", name, 0.5, tokenizer_source="aligned", **how)
            case "merge":
                mergekit_lite.merge(recipe, name, **how)
            case "extract":
                mergekit_lite.extract_vector("sft", "aligned", f"{name}.safetensors", tokenizer_source="base", **how)
            case "apply":
                mergekit_lite.apply_vectors("other", ["v.safetensors"], name, rebase=True, **how)

    def stop(done: int, total: int) -> None:
        raise RuntimeError("stopped")

    make("whole")
    with pytest.raises(RuntimeError, match="stopped"):
        make("out", threads=1, progress=stop)
    make("out", resume=True)
    suffix = ".safetensors" if command == "extract" else "/model.safetensors"
    assert (place / f"out{suffix}").read_bytes() == (place / f"whole{suffix}").read_bytes()
    if command != "extract":
        assert mergekit_lite.verify("out").sound


def test_boost_holds_a_model_of_the_output_s_vocabulary(place: Path) -> None:
    """Width, special tokens and rows are those of the written candidate."""
    for number, name in enumerate(("one", "more")):
        llama(place / name, number + 1, MODELS[name])
    (place / "one/generation_config.json").write_text('{"eos_token_id": 1}')
    (place / "more/generation_config.json").write_text('{"eos_token_id": 6}')
    for source, rows, ends in (("aligned", 7, 6), ("base", 6, 1)):
        family = PairFamily("one", "more", parse(("alpha=0:1",)), {"tokenizer_source": source})
        plan = family.plan({"alpha": 0.5})
        built = build(plan, "cpu")
        Weights(built, "cpu").set(plan)
        mergekit_lite.extrapolate("one", "more", "out", 0.5, tokenizer_source=source, force=True)
        held = dict(built.model.named_parameters())
        assert built.model.config.vocab_size == rows and built.model.generation_config.eos_token_id == ends
        for name, tensor in read_folder(place / "out").items():
            assert same_bytes(held[name].detach(), tensor)
