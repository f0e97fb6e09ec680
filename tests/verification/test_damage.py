"""Damage to output, inputs or manifest is found, and told by its place; hostile manifests give a message."""

from __future__ import annotations

import json
import random
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.output.workspace import manifest_path
from mergekit_lite.verification import Finding
from tests.verification.outputs import edit, extrapolated, flip, invoke, merged


@pytest.mark.parametrize("name", ["shards", "safetensors", "torch"])
def test_a_flipped_byte_of_the_output_is_found_where_it_is(name: str, place: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    (output,) = extrapolated(name)
    specs = open_checkpoint(output).tensors.values()
    for _ in range(60):
        path = chance.choice([spec.file for spec in specs])
        position = chance.randrange(path.stat().st_size)
        flip(path, position, bit := chance.randrange(8))
        findings = mergekit_lite.verify(output, samples=0).findings
        assert findings and findings[0].file == path.name, (path, position, bit)
        inside = [s for s in specs if s.file == path and s.offset <= position < s.offset + s.nbytes]
        if inside:
            (found,) = findings
            assert found.tensor == inside[0].name and found.bytes is not None
            assert found.bytes[0] <= position < found.bytes[1] <= found.bytes[0] + 256 * 8
        flip(path, position, bit)
    assert mergekit_lite.verify(output, samples=0).sound


@pytest.mark.parametrize("reference", ["a", "b"])
def test_a_flipped_byte_of_an_input_is_found_where_it_is(reference: str, place: Path) -> None:
    extrapolated()
    spec = open_checkpoint(place / reference).tensors["model.layers.1.mlp.up_proj.weight"]
    position = spec.offset + 2 * 300
    flip(spec.file, position)
    (found,) = mergekit_lite.verify("out", samples="all").findings
    assert found.file == f"{reference}: {spec.file.name}" and found.tensor == spec.name
    assert found.bytes == (spec.offset + 2 * 256, spec.offset + 2 * 512)
    assert "input that changed" in found.what
    assert mergekit_lite.verify("out", samples=0).sound


def test_a_change_that_reaches_a_sample_by_its_group_is_told_of(place: Path) -> None:
    output = merged("ties-global")
    spec = open_checkpoint("b").tensors["model.embed_tokens.weight"]
    content = bytearray(spec.file.read_bytes())
    content[spec.offset : spec.offset + spec.nbytes] = b"\x00\x41" * spec.numel
    spec.file.write_bytes(content)
    seed = next(s for s in range(99) if "q_proj" in mergekit_lite.verify(output, samples=1, seed=s).recomputed[0])
    (found,) = mergekit_lite.verify(output, samples=1, seed=seed).findings
    assert found.file == "manifest" and "--all" in found.what
    everything = mergekit_lite.verify(output, samples="all").findings
    assert spec.name in {finding.tensor for finding in everything if finding.file == f"b: {spec.file.name}"}


def test_a_flipped_byte_of_the_manifest_is_found(place: Path) -> None:
    seed = random.randrange(2**32)
    print(f"seed {seed}")
    chance = random.Random(seed)
    extrapolated("shards")
    path = manifest_path(Path("out"))
    sound = path.read_bytes()
    for _ in range(150):
        flip(path, chance.randrange(len(sound)), chance.randrange(8))
        try:
            assert not mergekit_lite.verify("out", samples=0).sound
        except UsageError:
            raise
        except MergekitLiteError as error:
            assert path.name in str(error)
        path.write_bytes(sound)


def test_a_digit_that_changes_no_number_is_found(place: Path) -> None:
    extrapolated()
    path = manifest_path(Path("out"))
    number = max(re.findall(r"0\.\d{16,}", path.read_text()), key=len)
    path.write_text(path.read_text().replace(number, f"{number}0"))
    assert not mergekit_lite.verify("out", samples=0).sound


def test_a_changed_digest_or_figure_is_found_though_the_manifest_agrees_with_itself(place: Path) -> None:
    extrapolated()
    name = "model.layers.0.mlp.up_proj.weight"
    sound = manifest_path(Path("out")).read_bytes()

    def findings(change: Callable[[dict[str, Any]], object]) -> list[Finding]:
        manifest_path(Path("out")).write_bytes(sound)
        edit(Path("out"), change)
        return list(mergekit_lite.verify("out", samples="all").findings)

    other = "0" * 32
    assert {f.tensor for f in findings(lambda m: m["tensors"]["model.norm.weight"].update(output=other))} == {
        "model.norm.weight"
    }
    (found,) = findings(lambda m: m["tensors"][name].update(inputs=[other, m["tensors"][name]["inputs"][1]]))
    assert found.tensor == name and found.file.startswith("b: ")
    assert findings(lambda m: m["tensors"][name]["spans"].update(output=other))[0].tensor == name
    assert "another plan" in findings(lambda m: m["recipe"]["parameters"].update(alpha=0.4))[0].what
    assert any(f.tensor == name for f in findings(lambda m: m["recipe"]["parameters"].update(alpha=0.4)))
    (found,) = findings(lambda m: m["effect"].update(effective=0.3001))
    assert "effect" in found.what
    (found,) = findings(lambda m: m["inputs"][0]["files"][0].update(header_xxh3_128=other))
    assert found.file.startswith("b: ") and "header" in found.what


def test_files_that_are_missing_cut_or_changed(place: Path) -> None:
    extrapolated("shards")
    shutil.copytree("out", "sound")
    shard = sorted(Path("out").glob("model-*.safetensors"))[1]

    def told(change: Callable[[], object]) -> str:
        shutil.rmtree("out")
        shutil.copytree("sound", "out")
        change()
        code, text = invoke("out", "--samples", "0")
        assert code == 1 and "not sound" in text
        return text

    assert f"{shard.name}: is missing" in told(shard.unlink)
    assert f"{shard.name}: was cut short" in told(lambda: shard.write_bytes(shard.read_bytes()[:-1]))
    assert f"{shard.name}: is longer" in told(lambda: shard.write_bytes(shard.read_bytes() + b"x"))
    assert "model.safetensors: is not a part" in told(lambda: shutil.copy(shard, "out/model.safetensors"))
    assert "tokenizer.json: is missing" in told(Path("out/tokenizer.json").unlink)
    assert "config.json: is not what was written" in told(lambda: flip(Path("out/config.json"), 0))
    assert "mergekit_lite_manifest.json: is missing" in invoke("a")[1]
    index = Path("out/model.safetensors.index.json")
    assert "index.json: is missing" in told(index.unlink)

    def swapped() -> None:
        content = json.loads(index.read_bytes())
        content["weight_map"]["lm_head.weight"] = content["weight_map"]["model.norm.weight"]
        index.write_text(json.dumps(content))

    assert "lm_head.weight: is in" in told(swapped)
    outside = Path("outside.safetensors")

    def linked() -> None:
        shutil.move(shard, outside)
        shard.symlink_to(outside.resolve())

    assert "leaves its folder" in told(linked)


HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "shard outside": (lambda m: m["files"][0].update(name="../a/model.safetensors"), "files.0.name"),
    "absolute": (lambda m: m["files"][0].update(name="/etc/passwd.bin"), "files.0.name"),
    "beside outside": (lambda m: m["beside"].update({"../a/config.json": "0" * 32}), "leaves its folder"),
    "beside absolute": (lambda m: m["beside"].update({"/etc/passwd": "0" * 32}), "leaves its folder"),
    "beside long": (lambda m: m["beside"].update({"x" * 999: "0" * 32}), "at most 255 bytes"),
    "no files": (lambda m: m.update(files=[]), "files"),
    "many files": (lambda m: m.update(files=m["files"] * 20_000), "each file once"),
    "many wrong files": (lambda m: m.update(files=[7] * 50_000), "49,9"),
    "tensors as a list": (lambda m: m.update(tensors=[]), "tensors"),
    "digest as a number": (lambda m: m["tensors"]["ids"].update(output=7), "tensors.ids.output"),
    "spans too many": (lambda m: m["tensors"]["ids"].update(spans={"output": "0" * 64, "inputs": []}), "ids"),
    "merged beyond": (lambda m: m["tensors"]["ids"].update(merged=2**62), "ids: has no digests"),
    "tricks": (lambda m: m["tensors"].update({"\x1b[2J": m["tensors"]["ids"]}), "printable"),
    "surrogate": (lambda m: m["tensors"].update({"\ud800": m["tensors"]["ids"]}), "half a surrogate pair"),
    "size": (lambda m: m["files"][0].update(size=2**70), "files.0.size"),
    "recipe": (lambda m: m.update(recipe=[]), "recipe"),
    "recipe text": (lambda m: m.update(recipe={"text": "merge_method: [" * 9999}), "no plan"),
    "recipe wrong": (lambda m: m.update(recipe={"merge_method": "expo", "models": 3}), "no plan"),
    "pattern": (lambda m: m["recipe"].update(include=["regex:("]), "no regular expression"),
    "other models": (lambda m: m["recipe"].update(base_model="/"), "not among the inputs"),
    "a long reference": (lambda m: m["inputs"][1].update(reference="x/" * 499), "is not there"),
    "no home": (lambda m: m["inputs"][1].update(reference="~nobody-of-this-name/x"), "is not there"),
    "a hub repository": (lambda m: m["inputs"][1].update(reference="org/name"), "org/name: is not there"),
    "effect": (lambda m: m.update(effect={"x": 1e400}), "effect"),
    "version": (lambda m: m.update(version=None), "version"),
}  # fmt: skip


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_manifests_give_a_message(name: str, place: Path) -> None:
    change, told = HOSTILE[name]
    extrapolated()
    edit(Path("out"), change)
    code, text = invoke("out", "--all")
    assert code == 1 and told in text and len(text) < 20_000, text[:2000]
    assert text.isascii() or "\x1b" not in text


@pytest.mark.parametrize("text", ["", "[]", "[" * 100_000, '{"a":' * 100_000, "\x00", '{"tool": NaN}', "7" * 9999])
def test_manifests_that_are_none(text: str, place: Path) -> None:
    extrapolated()
    manifest_path(Path("out")).write_text(text)
    code, told = invoke("out")
    assert code == 1 and "mergekit_lite_manifest.json" in told and len(told) < 20_000
