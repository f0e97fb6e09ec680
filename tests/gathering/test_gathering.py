"""Statistics of a model on prompts: against slow second ways, however prompts are batched and work is cut."""

from __future__ import annotations

import errno
import json
import os
import re
import signal
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from mergekit_lite import Gathered, RunError, UsageError, gather_statistics, positioned
from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.checkpoint.statistics_file import Gram, open_statistics
from mergekit_lite.gathering import kept_sums, working_file
from mergekit_lite.gathering.examples import prompts_in
from tests.gathering.models import PROMPTS, prompts, written
from tests.processes import preload, run

preload("mergekit_lite.gathering.working_file", "mergekit_lite.gathering.passes", "transformers")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("statistics")
    for architecture in ("llama", "gpt2", "gemma2"):
        written(folder / architecture, architecture)
    prompts(folder / "prompts.jsonl")
    prompts(folder / "bare.jsonl", responses=False)
    return folder


def gathered(place: Path, model: str, name: str, **options: Any) -> Gathered:
    return gather_statistics(place / model, [place / "prompts.jsonl"], place / name, force=True, **options)


def slowly(place: Path, model: str) -> tuple[Any, list[Any]]:
    """The model, and the tokens of each example."""
    template = ChatTemplate(AutoTokenizer.from_pretrained(place / model))
    rows = [template.tokens(p.messages, p.reference or "") for p in prompts_in([place / "prompts.jsonl"]).prompts]
    return AutoModelForCausalLM.from_pretrained(place / model, dtype=torch.float64).eval(), rows


def inputs_of(model: Any, rows: list[Any]) -> dict[str, np.ndarray]:
    """The inputs of each module that has a matrix, example by example without padding: (tokens, inputs)."""
    seen: dict[str, list[np.ndarray]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, given, __, name=name: seen.setdefault(name, []).append(given[0][0].detach().numpy())
        )
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D")
    ]
    with torch.no_grad():
        for row in rows:
            model(torch.tensor([[*row.prompt, *row.response]]))
    for handle in handles:
        handle.remove()
    return {name: np.concatenate(parts) for name, parts in seen.items()}


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma2"])
def test_gram_matrices_are_those_of_a_slow_second_way(place: Path, model: str) -> None:
    told = gathered(place, model, f"{model}-gram.safetensors")
    statistics = open_statistics(str(place / f"{model}-gram.safetensors"))
    slow, rows = slowly(place, model)
    assert (told.examples, told.tokens) == (PROMPTS, sum(len(row.prompt) + len(row.response) for row in rows))
    assert (statistics.tokens, statistics.examples, told.passes) == (told.tokens, told.examples, 1)
    tensors = load_file(place / f"{model}-gram.safetensors")
    tied = slow.get_input_embeddings().weight is slow.get_output_embeddings().weight
    inputs = {f"{name}.weight": x for name, x in inputs_of(slow, rows).items() if not (tied and name == "lm_head")}
    assert statistics.grams.keys() == inputs.keys()
    for weight, x in inputs.items():
        gram = statistics.grams[weight]
        assert gram.axis == (0 if model == "gpt2" and weight != "lm_head.weight" else 1)
        np.testing.assert_allclose(tensors[gram.name].numpy(), x.T @ x / len(x), rtol=1e-4, atol=1e-5 * np.abs(x).max())


def test_layers_that_read_the_same_share_a_matrix(place: Path) -> None:
    gathered(place, "llama", "shared.safetensors")
    grams = open_statistics(str(place / "shared.safetensors")).grams
    layer = "model.layers.0."
    query = Gram(f"{layer}self_attn.q_proj.gram", 1)
    assert all(grams[f"{layer}self_attn.{name}_proj.weight"] == query for name in "qkv")
    assert grams[f"{layer}mlp.gate_proj.weight"] == grams[f"{layer}mlp.up_proj.weight"]
    assert len(load_file(place / "shared.safetensors")) == 2 * 4 + 1  # of each layer, and of the head


@pytest.mark.parametrize("model", ["llama", "gpt2", "gemma2"])
def test_fisher_information_is_that_of_a_slow_second_way(place: Path, model: str) -> None:
    gathered(place, model, "fisher.safetensors", fisher=True)
    slow, rows = slowly(place, model)
    wanted = {name: torch.zeros_like(parameter) for name, parameter in slow.named_parameters()}
    for row in rows:
        slow.zero_grad()
        logits = slow(torch.tensor([[*row.prompt, *row.response]])).logits[0].log_softmax(-1)
        places = range(len(row.prompt) - 1, len(row.prompt) + len(row.response) - 1)
        sum(logits[at, token] for at, token in zip(places, row.response, strict=True)).backward()
        for name, parameter in slow.named_parameters():
            wanted[name] += parameter.grad.square() / len(rows)
    found = load_file(place / "fisher.safetensors")
    assert found.keys() == wanted.keys()
    for name, values in wanted.items():
        np.testing.assert_allclose(found[name], values, rtol=2e-3, atol=1e-5 * float(values.max()))
        assert float(values.max()) > 0


def test_padding_and_passes_change_nothing(place: Path) -> None:
    for kind in ({}, {"fisher": True}):
        gathered(place, "llama", "one.safetensors", batch_size=1, **kind)
        several = gathered(place, "llama", "four.safetensors", batch_size=4, memory=30_000, **kind)
        assert several.passes > 1
        one, four = load_file(place / "one.safetensors"), load_file(place / "four.safetensors")
        assert one.keys() == four.keys()
        for name, values in one.items():
            np.testing.assert_allclose(four[name], values, rtol=1e-4, atol=1e-5 * float(values.abs().max()))


def test_a_pass_for_each_matrix_gives_the_bytes_of_one_for_all(place: Path) -> None:
    gathered(place, "llama", "at-once.safetensors")
    assert gathered(place, "llama", "one-by-one.safetensors", memory=1).passes == 9
    assert (place / "at-once.safetensors").read_bytes() == (place / "one-by-one.safetensors").read_bytes()


def kill_after_three() -> None:
    """Let this process be killed when it has written three matrices."""
    write, left = working_file.WorkingFile.write, [3]

    def written_or_killed(self: working_file.WorkingFile, name: str, values: torch.Tensor) -> None:
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        write(self, name, values)

    working_file.WorkingFile.write = written_or_killed  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [(), pytest.param(("--fisher",), marks=pytest.mark.slow)])
def test_a_killed_command_goes_on(place: Path, tmp_path: Path, kind: tuple[str, ...]) -> None:
    words = ("statistics", place / "llama", "--prompts", place / "prompts.jsonl", "--memory", "1", *kind)
    undisturbed = run(tmp_path, *words, "-o", "whole.safetensors", "--json")
    in_all = json.loads(undisturbed.stdout)["matrices"]
    assert run(tmp_path, *words, "-o", "killed.safetensors", before=kill_after_three).returncode == -signal.SIGKILL
    assert not (tmp_path / "killed.safetensors").exists()
    other = run(tmp_path, *words, "--limit", "2", "-o", "killed.safetensors")
    assert other.returncode == 2
    assert "killed.safetensors.partial is unfinished and of other work" in other.stderr
    resumed = run(tmp_path, *words, "-o", "killed.safetensors", "--json")
    assert resumed.returncode == 0, resumed.stderr
    assert json.loads(resumed.stdout)["passes"] == in_all - 3
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.safetensors", "whole.safetensors"]


def kill_after_keeping_twice() -> None:
    """Let this process keep its sums after each batch, and be killed when it is to do so for the third time."""
    kept_sums.EVERY = kept_sums.SHARE = 0
    keep, left = kept_sums.KeptSums.keep, [2]

    def kept_or_killed(self: kept_sums.KeptSums, sums: Any, batches: int) -> None:
        self._due = 0
        if not left[0]:
            os.kill(os.getpid(), signal.SIGKILL)
        left[0] -= 1
        keep(self, sums, batches)

    kept_sums.KeptSums.keep = kept_or_killed  # type: ignore[method-assign]


@pytest.mark.parametrize("kind", [(), ("--fisher",)])
def test_a_command_killed_within_a_pass_goes_on_there(place: Path, tmp_path: Path, kind: tuple[str, ...]) -> None:
    options = ("--batch-size", "1", *kind)
    words = ("statistics", place / "llama", "--prompts", place / "prompts.jsonl", *options)
    assert run(tmp_path, *words, "-o", "whole.safetensors").returncode == 0
    killed = run(tmp_path, *words, "-o", "killed.safetensors", before=kill_after_keeping_twice)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    sums = tmp_path / "killed.safetensors.sums"
    assert int(sums.read_bytes()[32:52]) == 2  # batches
    assert run(tmp_path, *words, "-o", "killed.safetensors").returncode == 0
    assert (tmp_path / "killed.safetensors").read_bytes() == (tmp_path / "whole.safetensors").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["killed.safetensors", "whole.safetensors"]


def test_kept_sums_are_taken_up_to_the_bit_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_sums, "EVERY", 0)
    file = tmp_path / "out.sums"
    sums = [torch.randn(3, 5, dtype=torch.float64).mT, torch.randn(7), torch.empty(0)]
    kept_sums.KeptSums(file, "this").keep(sums, 12)

    def taken(what: str) -> int:
        found = [torch.zeros_like(each) for each in sums]
        batches = kept_sums.KeptSums(file, what).take_up(found)
        wanted = sums if batches else [torch.zeros_like(each) for each in sums]
        assert all(torch.equal(one, other) for one, other in zip(found, wanted, strict=True))
        return batches

    assert taken("this") == 12
    assert taken("other") == 0
    content = bytearray(file.read_bytes())
    flipped = (bytes([*content[:at], content[at] ^ 1, *content[at + 1 :]]) for at in range(len(content)))
    for damaged in (*flipped, content[:-1], content + b"x", b"", content[:32] + b"x" * 52 + content[84:]):
        file.write_bytes(damaged)
        assert taken("this") == 0
    kept_sums.KeptSums(file, "this").discard()
    assert taken("this") == 0
    assert not list(tmp_path.iterdir())


def test_a_full_disk_gets_back_the_room_that_sums_did_not_find(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kept_sums, "EVERY", 0)
    file, sums = tmp_path / "out.sums", [torch.ones(7), torch.ones(5)]
    kept_sums.KeptSums(file, "this").keep(sums, 12)
    write, left = positioned.write, [1]

    def full(descriptor: int, data: memoryview, place: int) -> int:
        if not left[0]:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        left[0] -= 1
        return write(descriptor, data, place)

    monkeypatch.setattr(positioned, "write", full)
    kept_sums.KeptSums(file, "this").keep(sums, 13)
    assert list(tmp_path.iterdir()) == [file]
    assert kept_sums.KeptSums(file, "this").take_up(sums) == 12


def test_what_was_damaged_meanwhile_is_made_again(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    publish = working_file.WorkingFile.name
    arguments = (place / "llama", [place / "prompts.jsonl"], tmp_path / "gram.safetensors")
    monkeypatch.setattr(working_file.WorkingFile, "name", lambda self: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        gather_statistics(*arguments)
    monkeypatch.setattr(working_file.WorkingFile, "name", publish)
    partial = tmp_path / "gram.safetensors.partial"
    content = bytearray(partial.read_bytes())
    content[-1] ^= 1
    partial.write_bytes(content)
    assert gather_statistics(*arguments, memory=1).passes == 1
    gathered(place, "llama", "sound.safetensors")
    assert (tmp_path / "gram.safetensors").read_bytes() == (place / "sound.safetensors").read_bytes()


def test_what_is_wrong_is_said_before_anything_is_written(place: Path, tmp_path: Path) -> None:
    (tmp_path / "empty.jsonl").write_text("")
    (tmp_path / "there.safetensors").write_bytes(b"")
    fine = {"model": place / "llama", "prompts": [place / "prompts.jsonl"], "output": tmp_path / "out.safetensors"}
    before = {path.name for path in tmp_path.iterdir()}
    for wrong, text in (
        ({"prompts": [tmp_path / "empty.jsonl"]}, "No prompts"),
        ({"prompts": [place / "bare.jsonl"], "fisher": True}, "6 of 6 prompts have no response"),
        ({"response": "answer"}, "No row has a response in the column 'answer', which --response names"),
        ({"output": tmp_path / "out.pt"}, "give the output a name that ends so"),
        ({"output": tmp_path / "none" / "out.safetensors"}, "its folder is not there"),
        ({"output": tmp_path / "there.safetensors"}, "exists"),
        ({"limit": 0}, "from 1 on"),
        ({"device": "tpu"}, "tpu"),
    ):
        with pytest.raises(UsageError, match=re.escape(text)):
            gather_statistics(**fine | wrong)
    assert {path.name for path in tmp_path.iterdir()} == before


def test_a_model_that_is_damaged_gives_no_statistics(place: Path, tmp_path: Path) -> None:
    written(tmp_path / "damaged")
    tensors = load_file(tmp_path / "damaged" / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] = torch.nan
    save_file(tensors, tmp_path / "damaged" / "model.safetensors", {"format": "pt"})
    with pytest.raises(RunError, match=r"model\.layers\.1\.mlp\.down_proj\.gram: its statistics are NaN"):
        gather_statistics(tmp_path / "damaged", [place / "prompts.jsonl"], tmp_path / "gram.safetensors")


def test_gram_matrices_need_no_response_and_long_prompts_are_cut(place: Path, tmp_path: Path) -> None:
    long = tmp_path / "long.jsonl"
    long.write_text(json.dumps({"prompt": "many words " * 1500}) + "\n" + (place / "bare.jsonl").read_text())
    told = gather_statistics(place / "llama", [long], tmp_path / "gram.safetensors")
    assert told.cut == 1
    assert "1 example cut at 2,048 tokens" in told.notes[0]
    assert told.examples == 1 + PROMPTS
