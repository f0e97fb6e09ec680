"""Outputs verified: real ones are sound; damage to output, inputs or manifest is found, and told by its place."""

from __future__ import annotations

import json
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite.checkpoint import open_checkpoint
from mergekit_lite.commands import main
from mergekit_lite.engine import spans
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.output.manifest import SEAL, seal
from mergekit_lite.output.workspace import manifest_path
from mergekit_lite.verification import Finding
from tests.adapters import lora, write_adapter
from tests.models import state, tuned, write_folder

CONFIG = {"model_type": "llama", "num_hidden_layers": 2, "torch_dtype": "bfloat16", "tie_word_embeddings": False}
DELTAS = [{"model": "b", "parameters": {"weight": 0.6}}, {"model": "c", "parameters": {"weight": 0.7}}]
BASED: dict[str, Any] = {"base_model": "a", "models": DELTAS, "seed": 3}
RECIPES: dict[str, dict[str, Any]] = {
    "linear": {"merge_method": "linear", "models": DELTAS},
    "gradient": {"merge_method": "linear", "models": [{"model": "b"}, DELTAS[1]], "parameters": {"weight": [0, 1]}},
    "dare": BASED | {"merge_method": "dare_ties", "parameters": {"density": 0.5}},
    "ties": BASED | {"merge_method": "ties", "parameters": {"density": 0.5}},
    "ties-global": BASED | {"merge_method": "ties", "parameters": {"density": 0.5, "trim": "global"}},
    "varm-model": {"merge_method": "varm", "base_model": "a", "models": [{"model": "b"}, {"model": "c"}],
                   "parameters": {"granularity": "model"}},
    "varm-layer": {"merge_method": "varm", "base_model": "a", "models": [{"model": "b"}, {"model": "c"}],
                   "parameters": {"granularity": "layer"}},
    "franken": {"merge_method": "passthrough",
                "slices": [{"sources": [{"model": "a", "layer_range": [0, 2]}]},
                           {"sources": [{"model": "b", "layer_range": [1, 2]}]}]},
    "exclude": {"merge_method": "linear", "models": DELTAS, "exclude": ["norm", "lm_head"]},
    "stochastic": {"merge_method": "linear", "models": DELTAS, "rounding": "stochastic", "seed": 7},
    "wide": {"merge_method": "linear", "models": DELTAS, "out_dtype": "float32"},
    "expo": {"merge_method": "expo", "base_model": "a", "models": [{"model": "b"}], "parameters": {"alpha": 0.3}},
}  # fmt: skip
PAIRS: dict[str, tuple[str, dict[str, Any]]] = {
    "nearest": ("out", {"alpha": 0.3}),
    "stochastic": ("out", {"alpha": 0.3, "rounding": "stochastic", "seed": 5}),
    "unused seed": ("out", {"alpha": 0.3, "seed": 5}),
    "wide": ("out", {"alpha": 0.3, "out_dtype": "float32"}),
    "parts": ("out", {"alpha": 0.3, "alpha_for": {"norm": 0.0, "layers.1": 1.0}, "exclude": ["lm_head"]}),
    "only": ("out", {"alpha": 0.3, "include": ["mlp"]}),
    "shards": ("out", {"alpha": 0.3, "shard_size": 1000}),
    "several": ("out-{alpha}", {"alpha": [0.1, 1.0]}),
    "several files": ("out-{alpha}.pt", {"alpha": [0.1, 1.0], "rounding": "stochastic"}),
    "safetensors": ("out.safetensors", {"alpha": 0.3}),
    "torch": ("out.pt", {"alpha": 0.3}),
}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A model and two tuned ones; spans are short, so that tensors have several."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(spans, "SPAN", 1 << 8)
    base = state(0, hidden=16) | {"ids": torch.arange(7)}
    write_folder(tmp_path / "a", base, config=CONFIG)
    write_folder(tmp_path / "b", tuned_floats(base, 1), shards=2, config=CONFIG)
    write_folder(tmp_path / "c", tuned_floats(base, 2), config=CONFIG)
    (tmp_path / "b" / "tokenizer.json").write_text("{}")
    return tmp_path


def tuned_floats(base: dict[str, torch.Tensor], seed: int) -> dict[str, torch.Tensor]:
    return tuned({name: tensor for name, tensor in base.items() if name != "ids"}, seed) | {"ids": base["ids"]}


def merged(name: str) -> Path:
    Path("r.yml").write_text(yaml.safe_dump(RECIPES[name]))
    return mergekit_lite.merge("r.yml", "out").outputs[0]


def extrapolated(name: str = "nearest") -> tuple[Path, ...]:
    output, options = PAIRS[name]
    return mergekit_lite.extrapolate("a", "b", output, **options).outputs


def edit(output: Path, change: Callable[[dict[str, Any]], object], *, sealed: bool = True) -> None:
    """Change a manifest, and let its own digest agree again."""
    path = manifest_path(output)
    content = json.loads(path.read_bytes())
    change(content)
    path.write_text(json.dumps(content | ({SEAL: seal(content)} if sealed else {})))


def flip(path: Path, position: int, bit: int = 0) -> None:
    content = bytearray(path.read_bytes())
    content[position] ^= 1 << bit
    path.write_bytes(content)


def invoke(*arguments: str) -> tuple[int, str]:
    result = CliRunner().invoke(main, ["verify", *arguments])
    assert result.exception is None or isinstance(result.exception, SystemExit), result.exception
    return result.exit_code, result.output


# --- sound outputs


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


# --- damage


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


# --- inputs and versions


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


# --- hostile manifests

HOSTILE: dict[str, tuple[Callable[[dict[str, Any]], object], str]] = {
    "shard outside": (lambda m: m["files"][0].update(name="../a/model.safetensors"), "files.0.name"),
    "absolute": (lambda m: m["files"][0].update(name="/etc/passwd.bin"), "files.0.name"),
    "beside outside": (lambda m: m["beside"].update({"../a/config.json": "0" * 32}), "leaves its folder"),
    "beside absolute": (lambda m: m["beside"].update({"/etc/passwd": "0" * 32}), "leaves its folder"),
    "beside long": (lambda m: m["beside"].update({"x" * 999: "0" * 32}), "at most 255 bytes"),
    "no files": (lambda m: m.update(files=[]), "files"),
    "many files": (lambda m: m.update(files=m["files"] * 100_000), "each file once"),
    "many wrong files": (lambda m: m.update(files=[7] * 300_000), "299,9"),
    "tensors as a list": (lambda m: m.update(tensors=[]), "tensors"),
    "digest as a number": (lambda m: m["tensors"]["ids"].update(output=7), "tensors.ids.output"),
    "spans too many": (lambda m: m["tensors"]["ids"].update(spans={"output": "0" * 64, "inputs": []}), "ids"),
    "merged beyond": (lambda m: m["tensors"]["ids"].update(merged=2**62), "ids: has no digests"),
    "tricks": (lambda m: m["tensors"].update({"\x1b[2J": m["tensors"]["ids"]}), "printable"),
    "surrogate": (lambda m: m["tensors"].update({"\ud800": m["tensors"]["ids"]}), "printable"),
    "size": (lambda m: m["files"][0].update(size=2**70), "files.0.size"),
    "recipe": (lambda m: m.update(recipe=[]), "recipe"),
    "recipe text": (lambda m: m.update(recipe={"text": "merge_method: [" * 9999}), "no plan"),
    "recipe wrong": (lambda m: m.update(recipe={"merge_method": "expo", "models": 3}), "no plan"),
    "pattern": (lambda m: m["recipe"].update(include=["("]), "not a regular expression"),
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


# --- the command


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
