"""Outputs verified: real ones are sound, also where inputs moved; what can't be checked is told."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.output.workspace import manifest_path
from tests.adapters import lora, write_adapter
from tests.models import state, write_folder
from tests.verification.outputs import CONFIG, PAIRS, RECIPES, edit, extrapolated, flip, invoke, merged


@pytest.mark.parametrize("name", PAIRS)
def test_extrapolations_are_sound(name: str, place: Path) -> None:
    for output in extrapolated(name):
        verdict = mergekit_lite.verify(output, samples="all", threads=3)
        assert verdict.findings == verdict.notes == verdict.unchecked == ()
        assert len(verdict.recomputed) == verdict.tensors == len(state(0)) + 1
        assert mergekit_lite.verify(output, samples=2).sound


@pytest.mark.parametrize("name", RECIPES)
def test_merges_are_sound(name: str, place: Path) -> None:
    output = merged(name)
    verdict = mergekit_lite.verify(output, samples="all")
    assert verdict.findings == verdict.notes == verdict.unchecked == ()
    for seed in range(3):  # a sample, whose statistics may span tensors that are not in it
        verdict = mergekit_lite.verify(output, samples=1, seed=seed)
        assert verdict.findings == () and len(verdict.recomputed) == 1
        assert mergekit_lite.verify(output, samples=1, seed=seed).recomputed == verdict.recomputed
        if name in ("ties-global", "varm-model") and verdict.recomputed != ("ids",):
            assert "more tensors had to be read" in verdict.notes[0]


def test_copied_rows_have_spans_of_their_own(place: Path) -> None:
    more = state(5, hidden=16, vocabulary=41) | {"ids": torch.arange(7)}
    write_folder(place / "wide", more, config=CONFIG)
    mergekit_lite.extrapolate("a", "wide", "out", 0.5, new_rows="copy")
    assert mergekit_lite.verify("out", samples="all").findings == ()
    assert "merged" in json.loads(manifest_path(Path("out")).read_bytes())["tensors"]["lm_head.weight"]


def test_real_spans_and_dtypes(tmp_path: Path) -> None:
    base = {"w": torch.arange((1 << 23) + 5000).remainder(977).div(7).half(), "v": torch.ones(3, dtype=torch.float64)}
    write_folder(tmp_path / "a", base)
    write_folder(tmp_path / "b", {name: tensor * 1.5 for name, tensor in base.items()})
    mergekit_lite.extrapolate(tmp_path / "a", tmp_path / "b", tmp_path / "out", 0.5)
    assert mergekit_lite.verify(tmp_path / "out", samples="all").sound
    spec = open_checkpoint(tmp_path / "out").tensors["w"]
    flip(spec.file, spec.offset + (2 << 23) + 1000)
    (found,) = mergekit_lite.verify(tmp_path / "out", samples=0).findings
    assert found.tensor == "w" and found.bytes == (spec.offset + (2 << 23), spec.offset + spec.nbytes)


def test_outputs_may_move_and_cards_be_edited(place: Path) -> None:
    extrapolated()
    Path("out/README.md").write_text("my model")
    Path("out").rename("mine")
    assert mergekit_lite.verify("mine", samples="all").sound
    extrapolated("torch")
    Path("out.pt").rename("a-longer-name.pt")
    Path("out.pt.manifest.json").rename("a-longer-name.pt.manifest.json")
    assert mergekit_lite.verify("a-longer-name.pt", samples="all").sound


def test_inputs_that_are_gone_or_moved(place: Path) -> None:
    extrapolated()
    Path("a").rename("z")
    verdict = mergekit_lite.verify("out")
    assert verdict.sound and verdict.recomputed == () and "a: is not there" in verdict.unchecked[0]
    code, text = invoke("out", "--all")
    assert code == 1 and "needed to make tensors again" in text and "--input a=PLACE" in text
    code, text = invoke("out", "--all", "--input", "a=z")
    assert code == 0 and "is sound\n" in text
    for wrong, told in (("a=nowhere", "nowhere"), ("aa=z", "Did you mean 'a'"), ("a", "OLD=NEW")):
        code, text = invoke("out", "--input", wrong)
        assert code == 2 and told in text
    (found, *_) = mergekit_lite.verify("out", inputs={"a": "c"}, samples="all").findings
    assert found.file == "a: model.safetensors" and found.tensor is not None  # of the same shapes, with other bytes
    code, text = invoke("out", "--input", "a=out/config.json")
    assert code == 1 and "can't be read" in text


def test_adapters_are_a_part_of_their_input(place: Path) -> None:
    module = "model.layers.1.self_attn.q_proj"
    write_adapter(place / "lora", lora(module, 16, 16))
    mergekit_lite.extrapolate("a", "a+lora", "out", 0.5)
    assert mergekit_lite.verify("out", samples="all").findings == ()
    write_adapter(place / "lora", lora(module, 16, 16, seed=1))
    (found,) = mergekit_lite.verify("out", samples="all").findings
    assert found.tensor == f"{module}.weight" and "what is added" in found.what
    Path("lora").rename("moved")
    assert "a+lora: is not there" in mergekit_lite.verify("out").unchecked[0]
    write_adapter(place / "moved", lora(module, 16, 16))
    assert mergekit_lite.verify("out", inputs={"a+lora": "a+moved"}, samples="all").sound


def test_an_input_of_other_shapes_is_told_by_its_header(place: Path) -> None:
    extrapolated()
    write_folder(place / "a", state(0, hidden=32), config=CONFIG)
    texts = [str(finding) for finding in mergekit_lite.verify("out").findings]
    assert "a: model.safetensors: an input that changed" in texts[0] and "no plan" in texts[1]


def test_another_version_is_told_and_suspected(place: Path) -> None:
    extrapolated()
    edit(Path("out"), lambda m: m.update(torch="1.0"))
    verdict = mergekit_lite.verify("out", samples="all")
    assert verdict.sound and "torch 1.0" in verdict.notes[0] and "may come from" not in verdict.notes[0]
    edit(Path("out"), lambda m: m["tensors"]["model.norm.weight"].update(output="0" * 32))
    verdict = mergekit_lite.verify("out", samples="all")
    assert "may come from that" in verdict.notes[0]


def test_exit_codes_json_and_what_is_printed(place: Path) -> None:
    extrapolated()
    code, text = invoke("out", "--samples", "3", "--seed", "4", "--json")
    told = json.loads(text)
    assert code == 0 and told["sound"] and told["seed"] == 4 and len(told["recomputed"]) == 3
    code, text = invoke("out", "--samples", "3", "--seed", "4")
    assert code == 0 and "--seed 4" in text and all(name in text for name in told["recomputed"])
    assert invoke("out", "-q") == (0, "")
    spec = open_checkpoint("out").tensors["lm_head.weight"]
    flip(spec.file, spec.offset)
    code, text = invoke("out", "--json")
    (found,) = json.loads(text)["findings"]
    assert code == 1 and found["tensor"] == "lm_head.weight" and found["bytes"] == [spec.offset, spec.offset + 512]
    code, text = invoke("out", "-q")
    assert code == 1 and f"{spec.file.name}: lm_head.weight, bytes {spec.offset:,} to" in text
    for arguments in (
        ["nothing"],
        ["out", "--all", "--samples", "1"],
        ["out", "--samples", "-1"],
        ["out", "--device", "x"],
    ):
        assert invoke(*arguments)[0] == 2, arguments
