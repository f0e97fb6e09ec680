"""Rows of routers: the hidden states of each prompt alone, and the numbers of mergekit where those are right."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite.commands import main
from mergekit_lite.errors import PlanError, UsageError
from mergekit_lite.mixtures.building import routers
from mergekit_lite.mixtures.building.building import build_moe, plan_moe
from tests.mixtures.models import LAYERS, VOCABULARY, dense_model, settled_model, write
from tests.models import read_folder
from tests.tokenizers import tokenizer

KINDS = ("llama", "qwen3")
LONG = "one two three four five " * 4
STYLES = {"llama": "llama-3", "qwen3": "chatml"}  # with a token that begins texts, and without one
PROMPTS: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (("one two three", "What is one and one? It is two."), ()),
    (("You are helpful.",), ("user system assistant", "four")),
)
ROUTERS = {"llama": "model.layers.{}.block_sparse_moe.gate.weight", "qwen3": "model.layers.{}.mlp.gate.weight"}
# The first numbers of each row by layer and expert; hidden in bfloat16. Made by mergekit_rows.py.
MERGEKIT = {
    ("llama", "hidden"): [[[-0.0645, 0.2168, 0.1816], [-0.2451, -0.0337, 0.2275]],
                          [[0.1768, -0.2188, 0.2314], [-0.2061, -0.0884, 0.2832]]],
    ("llama", "cheap_embed"): [[[0.062, 0.2532, 0.0733], [-0.1349, 0.1661, 0.2246]]] * 2,
    ("qwen3", "hidden"): [[[-0.0645, 0.2168, 0.1816], [-0.2451, -0.0337, 0.2275]],
                          [[-0.0903, 0.3203, 0.1465], [-0.0898, -0.2217, 0.1289]]],
    ("qwen3", "cheap_embed"): [[[0.159, 0.2313, -0.0352], [-0.2006, 0.0867, 0.2474]]] * 2,
}  # fmt: skip
WITH_PADDING = {  # mergekit's averages, which count what pads the shorter prompt of an expert
    "llama": [[[-0.2393, -0.0046, 0.2373], [-0.1875, 0.1045, 0.2441]],
              [[-0.2773, 0.1235, 0.0962], [0.1475, -0.25, 0.2324]]],
    "qwen3": [[[-0.1865, -0.2109, 0.0767], [-0.1836, 0.1118, 0.2441]],
              [[-0.0767, 0.1377, -0.0015], [-0.1699, -0.0781, 0.248]]],
}  # fmt: skip


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def recipe(mode: str, prompts: Any = PROMPTS, **more: Any) -> dict[str, Any]:
    """A recipe of a model's mixture with itself."""
    experts = [{"source_model": "a", "positive_prompts": list(positive), "negative_prompts": list(negative)}
               for positive, negative in prompts]  # fmt: skip
    return {"base_model": "a", "gate_mode": mode, "experts": experts, "dtype": "float32"} | more


def rows_of(kind: str, mode: str, out: str) -> torch.Tensor:
    """The rows of a mixture's routers: (layers, experts, hidden)."""
    build_moe(recipe(mode), out, equal_experts=True)
    written = read_folder(Path(out))
    return torch.stack([written[ROUTERS[kind].format(layer)] for layer in range(LAYERS)])


@torch.no_grad()
def alone(model: Any, prompts: Sequence[str], mode: str) -> torch.Tensor:
    """What a mode makes of prompts, each by itself, nothing batched: (layers, hidden)."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained("a")
    vectors = []
    for prompt in prompts:
        text = (tokenizer.bos_token or "") + prompt
        numbers = torch.tensor([tokenizer(text, add_special_tokens=False)["input_ids"]])
        if mode == "cheap_embed":
            vectors.append(model.model.embed_tokens(numbers)[0].sum(dim=0).expand(LAYERS, -1))
            continue
        states = torch.stack(model(numbers, output_hidden_states=True).hidden_states[:-1])[:, 0]
        vectors.append(states.mean(dim=1) if mode == "hidden_avg" else states[:, -1])
    total = torch.stack(vectors).sum(dim=0)
    return total / total.norm(dim=-1, keepdim=True) if mode == "cheap_embed" else total / len(prompts)


@pytest.mark.parametrize("kind", KINDS)
def test_rows_are_those_of_each_prompt_alone(kind: str) -> None:
    model = settled_model(kind)
    write(model, Path("a"), STYLES[kind])
    made = {mode: rows_of(kind, mode, mode) for mode in ("hidden", "hidden_last", "hidden_avg", "cheap_embed")}
    for mode, rows in made.items():
        for number, (positive, negative) in enumerate(PROMPTS):
            wanted = alone(model, positive, mode)
            wanted = wanted - alone(model, negative, mode) if negative else wanted
            wanted = wanted / wanted.norm(dim=-1, keepdim=True)
            torch.testing.assert_close(rows[:, number], wanted, rtol=1e-4, atol=1e-5)
    assert torch.equal(made["hidden"], made["hidden_last"])
    assert float((made["hidden_avg"][:, :, :3] - torch.tensor(WITH_PADDING[kind])).abs().max()) > 0.05
    for (of_kind, mode), numbers in MERGEKIT.items():
        if of_kind == kind:
            torch.testing.assert_close(made[mode][:, :, :3], torch.tensor(numbers), rtol=0, atol=0.03)
    assert mergekit_lite.verify("hidden", samples="all").findings == ()


def test_a_prompts_row_does_not_depend_on_its_neighbours(monkeypatch: pytest.MonkeyPatch) -> None:
    """mergekit's average counts what pads a prompt: its rows change with the batch."""
    write(settled_model("llama"), Path("a"), "llama-3")
    together = rows_of("llama", "hidden_avg", "together")
    monkeypatch.setattr(routers, "BATCH", 1)
    apart = rows_of("llama", "hidden_avg", "apart")
    torch.testing.assert_close(apart, together, rtol=1e-4, atol=1e-5)


def test_prompts_alike_are_warned_of() -> None:
    """Nearly the same prompts give nearly the same rows."""
    write(dense_model("llama", 0), Path("a"), "llama-3")
    alike = (f"{LONG} one", f"{LONG} two")
    for prompts, warned in ((alike, True), (("one two three", "user system"), False)):
        planned = plan_moe(recipe("cheap_embed", [((each,), ()) for each in prompts]), "out", equal_experts=True)
        warning = routers.make_routers(planned).warning
        assert ("the router's rows of all layers are nearly dependent" in warning) is warned


@pytest.mark.parametrize("mode", ["hidden", "cheap_embed"])
def test_tokens_behind_the_last_row_are_refused(mode: str) -> None:
    """What lies behind the embedding in its file is another tensor's."""
    write(dense_model("llama", 0), Path("a"))
    own = tokenizer("llama-3")
    own.add_tokens([f"<more-{number}>" for number in range(VOCABULARY)])
    own.save_pretrained("a")
    asked = recipe(mode, [(("one",), ()), ((f"<more-{VOCABULARY - 1}>",), ())])
    with pytest.raises(UsageError, match=rf"a: its tokenizer gives the number 6\d\d .* has {VOCABULARY} rows"):
        build_moe(asked, "out", equal_experts=True)
    assert not Path("out").exists()


def test_a_base_without_a_tokenizer_is_refused_early() -> None:
    write(dense_model("llama", 0), Path("a"))
    asked = recipe("hidden", base_model="a/model.safetensors")
    with pytest.raises(PlanError, match="with no tokenizer for the prompts"):
        plan_moe(asked, "out", equal_experts=True)


def test_the_command_warns_and_shows_the_plan_alone() -> None:
    write(settled_model("llama"), Path("a"), "llama-3")
    text = "base_model: a\ngate_mode: cheap_embed\nexperts:\n"
    for prompt in (f"{LONG} one", f"{LONG} two"):
        text += f"  - {{source_model: a, positive_prompts: ['{prompt}'], noise_scale: 0.01}}\n"
    Path("r.yml").write_text(text)
    shown = CliRunner().invoke(main, ["moe", "r.yml", "-o", "out", "--dry-run"])
    assert (shown.exit_code, "condition number" in shown.output) == (0, False)
    made = CliRunner().invoke(main, ["moe", "r.yml", "-o", "out"])
    assert made.exception is None, repr(made.exception)
    assert (made.exit_code, "condition number" in made.output) == (0, True)


def test_a_base_with_an_adapter_or_in_other_files_runs_too() -> None:
    """The model that prompts go through is what the reference stands for, not what lies in its folder."""
    model = settled_model("llama")
    write(model, Path("a"), "llama-3")
    write(dense_model("llama", 3), Path("b"), "llama-3")
    mergekit_lite.extract_vector("a", "b", "v.safetensors")
    moved = recipe("hidden") | {"base_model": "a+v.safetensors:0.5"}
    build_moe(moved, "out", equal_experts=True)
    mergekit_lite.apply_vectors("a", ["v.safetensors:0.5"], "half")
    build_moe(recipe("hidden") | {"base_model": "half"}, "other", equal_experts=True)
    one, two = read_folder(Path("out")), read_folder(Path("other"))
    for layer in range(LAYERS):
        name = ROUTERS["llama"].format(layer)
        torch.testing.assert_close(one[name], two[name], rtol=1e-4, atol=1e-5)
