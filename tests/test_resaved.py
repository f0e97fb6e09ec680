"""A base as the hub has it beside a fine-tune saved by transformers, which drops what it computes, ties or ignores."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from pathlib import Path

import pytest
import torch
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite.commands import main
from mergekit_lite.errors import PlanError
from tests.models import State, read_folder, same_bytes, state, tuned, write_folder

LAYERS = 2
CONFIG = {"model_type": "tiny", "num_hidden_layers": LAYERS, "tie_word_embeddings": True}
SHARED = {"shared.weight": torch.ones(9, 4)}

# What only the hub's files have, and the other tensors that it needs beside it.
DROPPED: dict[str, tuple[State, State]] = {
    "layers behind the last": ({f"model.layers.{LAYERS}.eh_proj.weight": torch.ones(4, 8).bfloat16()}, {}),
    "mtp": ({"mtp.fc.weight": torch.ones(4, 8).bfloat16(), "mtp.layers.0.norm.weight": torch.ones(4)}, {}),
    "positions": ({"embeddings.position_ids": torch.arange(9)[None]}, {}),
    "positions as floats": ({"text_model.embeddings.position_ids": torch.arange(9.0)[None]}, {}),
    "masks": ({f"h.{n}.attn.bias": torch.ones(1, 1, 4, 4).bfloat16() for n in range(LAYERS)}, {}),
    "frequencies": ({"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}, {}),
    "T5's embeddings": (
        {f"{part}coder.embed_tokens.weight": SHARED["shared.weight"].clone() for part in ("en", "de")},
        SHARED,
    ),
    "Whisper's head": ({"proj_out.weight": torch.ones(9, 4)}, {"model.decoder.embed_tokens.weight": torch.ones(9, 4)}),
}
COPIES = {"encoder.embed_tokens.weight": "shared.weight", "decoder.embed_tokens.weight": "shared.weight",
          "proj_out.weight": "model.decoder.embed_tokens.weight"}  # fmt: skip


def hubs_own_are_right(out: State, hub: State, names: Iterable[str]) -> bool:
    """Return whether what only the hub's files have is as there, and copies of the embedding follow it."""
    return all(same_bytes(out[name], out[COPIES[name]] if name in COPIES else hub[name]) for name in names)


@pytest.fixture(params=DROPPED.values(), ids=DROPPED)
def pair(request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> State:
    """Write ``hub``, with what is dropped, and ``saved``, without; return what is dropped."""
    dropped, needed = request.param
    core = state(0, layers=LAYERS) | needed
    if needed:  # they are the only embedding, which the head is tied to
        del core["model.embed_tokens.weight"], core["lm_head.weight"]
        core |= needed
    write_folder(tmp_path / "hub", core | dropped, config=CONFIG)
    write_folder(tmp_path / "saved", tuned(core, 1), config=CONFIG)
    monkeypatch.chdir(tmp_path)
    return dict(dropped)


def test_extrapolated_from_the_hub(pair: State) -> None:
    plan = mergekit_lite.plan_extrapolation("hub", "saved", "out", 0.5)
    number = f"{len(pair)} tensor{'s' * (len(pair) > 1)} left out: saved lacks it"
    assert any(note.startswith(number) for note in plan.notes), plan.notes
    mergekit_lite.extrapolate("hub", "saved", "out", 0.5)
    out, hub, saved = map(read_folder, map(Path, ("out", "hub", "saved")))
    assert out.keys() == saved.keys()
    for name, tensor in out.items():
        exact = 1.5 * saved[name].double() - 0.5 * hub[name].double()
        torch.testing.assert_close(tensor.double(), exact, rtol=2**-7, atol=1e-6)


def test_the_other_way_round_it_is_kept(pair: State) -> None:
    mergekit_lite.extrapolate("saved", "hub", "out", 0.5)
    out, hub = read_folder(Path("out")), read_folder(Path("hub"))
    assert out.keys() == hub.keys()
    assert hubs_own_are_right(out, hub, pair)


def test_merged_on_the_hubs_base(pair: State) -> None:
    recipe = {"merge_method": "task_arithmetic", "base_model": "hub", "models": [{"model": "saved"}]}
    mergekit_lite.merge(recipe | {"parameters": {"weight": 1.0}}, "out")
    out, hub, saved = map(read_folder, map(Path, ("out", "hub", "saved")))
    assert out.keys() == hub.keys()
    assert hubs_own_are_right(out, hub, pair)
    for name, tensor in saved.items():
        torch.testing.assert_close(out[name], tensor, rtol=2**-7, atol=1e-6)


def test_vectors_and_comparisons(pair: State) -> None:
    extracted = mergekit_lite.extract_vector("hub", "saved", "v.safetensors")
    [told] = (note for note in extracted.notes if "only hub has it" in note or "ties it to" in note)
    assert told.startswith(tuple(pair)) and (" and " in told.partition(":")[0]) == (len(pair) > 1)
    mergekit_lite.apply_vectors("hub", ["v.safetensors"], "out")
    out, hub, saved = map(read_folder, map(Path, ("out", "hub", "saved")))
    assert out.keys() == hub.keys()
    assert all(same_bytes(out[name], tensor) for name, tensor in saved.items())
    assert hubs_own_are_right(out, hub, pair)
    compared = CliRunner().invoke(main, ["compare", "hub", "saved", "--json"])
    assert compared.exit_code == 0, compared.output
    left_out = json.dumps(json.loads(compared.output))
    assert all(name in left_out for name in pair)


def test_a_vector_of_saved_models_on_the_hubs_base(pair: State) -> None:
    hub = read_folder(Path("hub"))
    write_folder(Path("plain"), {name: tensor for name, tensor in hub.items() if name not in pair}, config=CONFIG)
    mergekit_lite.extract_vector("plain", "saved", "v.safetensors")
    mergekit_lite.apply_vectors("hub", ["v.safetensors"], "out", rebase=True)
    out, saved = read_folder(Path("out")), read_folder(Path("saved"))
    assert out.keys() == hub.keys()
    assert all(same_bytes(out[name], tensor) for name, tensor in saved.items())
    assert hubs_own_are_right(out, hub, pair)


@pytest.mark.parametrize(
    "name",
    ["model.layers.1.mlp.up_proj.weight", "model.embed_tokens.weight", "extra.weight"],
)
def test_what_a_model_can_not_do_without_is_an_error(tmp_path: Path, name: str) -> None:
    whole = state(0, layers=LAYERS) | {"extra.weight": torch.ones(3).bfloat16()}
    write_folder(tmp_path / "hub", whole, config=CONFIG)
    write_folder(tmp_path / "saved", {key: tensor for key, tensor in whole.items() if key != name}, config=CONFIG)
    models = (tmp_path / "hub", tmp_path / "saved", tmp_path / "out", 0.5)
    with pytest.raises(PlanError, match=r"but not in .*; exclude it to go on without it"):
        mergekit_lite.plan_extrapolation(*models)
    mergekit_lite.extrapolate(*models, exclude=[f"^{re.escape(name)}$"])
    assert read_folder(tmp_path / "out").keys() == whole.keys() - {name}
