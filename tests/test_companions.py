"""Recipes: config, tokenizer, chat template, card and recipe that travel beside the weights."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from click.testing import CliRunner

import mergekit_lite
from mergekit_lite import input_files
from mergekit_lite.commands import main
from mergekit_lite.errors import CheckpointError, PlanError
from mergekit_lite.planning.tokenizers import template_of
from mergekit_lite.recipe.templates import TEMPLATES
from tests.models import state, tuned, write_folder

TEXT = """\
# My merge: ``` is no end of it
merge_method: linear   # the mean
models:
  - model: a
  - model: b
  - {model: c}
parameters: {weight: 1}
"""
CONFIG = {"model_type": "llama", "num_hidden_layers": 4, "torch_dtype": "bfloat16", "tie_word_embeddings": False}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Three models of four layers, without tokenizers."""
    base = state(0, layers=4)
    for number, name in enumerate("abc"):
        write_folder(tmp_path / name, tuned(base, number), config=CONFIG)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def merged(more: str = "", text: str = TEXT) -> Path:
    Path("r.yml").write_text(text + more, encoding="utf-8")
    mergekit_lite.merge("r.yml", "out", force=True)
    return Path("out")


def notes(more: str = "", text: str = TEXT) -> str:
    Path("r.yml").write_text(text + more, encoding="utf-8")
    return "\n".join(mergekit_lite.plan_merge("r.yml", "out").notes)


def write_tokenizer(folder: Path, tokens: Mapping[str, int], template: str | None = None) -> None:
    (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}, "added_tokens": []}))
    config = {"model_max_length": 8, "mine": folder.name} | ({"chat_template": template} if template else {})
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


def configured(config: Mapping[str, Any], *names: str) -> None:
    for name in names:
        (Path(name) / "config.json").write_text(json.dumps(CONFIG | dict(config)))


# --- the recipe and the card


@pytest.mark.parametrize("text", [TEXT, TEXT.replace("\n", "\r\n")])
def test_the_recipe_travels_as_it_was_written(place: Path, text: str) -> None:
    Path("r.yml").write_bytes(text.encode())
    mergekit_lite.merge("r.yml", "out")
    assert Path("out/mergekit_config.yml").read_bytes() == text.encode()
    again = mergekit_lite.merge("out/mergekit_config.yml", "again").outputs[0]
    assert (again / "model.safetensors").read_bytes() == Path("out/model.safetensors").read_bytes()
    assert json.loads(Path("out/mergekit_lite_manifest.json").read_text())["recipe"]["text"] == text


def test_the_card_shows_the_recipe_with_its_comments(place: Path) -> None:
    card = (merged() / "README.md").read_text()
    _, front, body = card.split("---\n", 2)
    assert yaml.safe_load(front)["tags"] == ["mergekit-lite", "merge"]
    assert f"\n````yaml\n{TEXT.strip()}\n````\n" in body
    assert "- `a` (config, tokenizer)\n- `b`\n- `c`\n" in body and "method `linear`" in body


def test_models_of_the_hub_are_linked_and_named_in_the_front_matter(place: Path) -> None:
    from dataclasses import replace

    from mergekit_lite.output.card import model_card

    Path("r.yml").write_text(TEXT)
    plan = mergekit_lite.plan_merge("r.yml", "out")
    hub = replace(plan.inputs[1], reference="org/name@main", revision="0123")
    effect = {"merged": 1, "copied": 0, "effective": None}
    card = model_card(replace(plan, inputs=(plan.inputs[0], hub, plan.inputs[2])), 0, effect)
    assert yaml.safe_load(card.split("---\n")[1])["base_model"] == ["org/name"]
    assert "- [org/name@main](https://huggingface.co/org/name)\n" in card and "Merged: 1 tensor." in card


# --- tokenizer


def test_the_tokenizer_of_another_model(place: Path) -> None:
    for name in "ab":
        write_tokenizer(place / name, {"x": 0}, template=f"{{# of {name} #}}")
    (place / "a" / "special_tokens_map.json").write_text("{}")
    (place / "a" / "generation_config.json").write_text("{}")
    (place / "b" / "additional_chat_templates").mkdir()
    (place / "b" / "additional_chat_templates" / "tools.jinja").write_text("tools")
    for more in ("tokenizer_source: b\n", "tokenizer: {source: {model: {path: b}}}\n"):
        out = merged(more)
        names = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
        assert "special_tokens_map.json" not in names  # one tokenizer, not parts of two
        assert {"generation_config.json", "additional_chat_templates/tools.jinja", "tokenizer.json"} <= names
        assert json.loads((out / "tokenizer_config.json").read_text())["mine"] == "b"
        assert "- `b` (tokenizer)\n" in (out / "README.md").read_text()
    for more in ("", "tokenizer_source: base\n", "tokenizer: {source: base}\n", "tokenizer_source: a\n"):
        assert json.loads((merged(more) / "tokenizer_config.json").read_text())["mine"] == "a"


def test_vocabularies_that_contradict_each_other(place: Path) -> None:
    write_tokenizer(place / "a", {"x": 0, "y": 1})
    write_tokenizer(place / "b", {"y": 0, "x": 1})
    write_tokenizer(place / "c", {"x": 0, "y": 1, "z": 2})
    told = notes()
    assert '2 tokens differ between the tokenizers: 0 is "x", but "y" in b; rows are merged as they stand' in told
    assert 'c has 1 token that the output\'s tokenizer lacks: "z"' in told
    assert "b: 0 tokens at the same place, 2 at another, 0 it lacks" in notes("tokenizer_source: base\n")
    write_tokenizer(place / "b", {"x": 0, "y": 1})
    assert "differ" not in notes("tokenizer_source: base\n")


def test_vocabularies_are_understood_in_each_form(place: Path) -> None:
    (place / "a" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": [["x", 0.0], ["y", -1.5]]}}))
    added = [{"id": 1, "content": "z"}]
    (place / "b" / "tokenizer.json").write_text(json.dumps({"model": {"vocab": {"x": 0}}, "added_tokens": added}))
    (place / "c" / "tokenizer.json").write_text("no JSON")
    assert '1 token differ between the tokenizers: 1 is "y", but "z" in b' in notes()


# --- chat template


def templates_in(folder: Path) -> set[str]:
    """Every template that a loader could find."""
    found = {path.read_text() for path in folder.rglob("*.jinja")}
    config = folder / "tokenizer_config.json"
    if config.exists():
        found |= {json.loads(config.read_text()).get("chat_template")}
    return found | {path.read_text() for path in folder.glob("chat_template.json")}


@pytest.mark.parametrize("asked", [*TEMPLATES, "{# a template of my own #}{{ messages }}"])
def test_a_template_is_written_once_for_all_loaders(place: Path, asked: str) -> None:
    write_tokenizer(place / "a", {"x": 0}, template="{# old #}")
    (place / "a" / "chat_template.jinja").write_text("older")
    (place / "a" / "chat_template.json").write_text('{"chat_template": "oldest"}')
    (place / "a" / "additional_chat_templates").mkdir()
    (place / "a" / "additional_chat_templates" / "tools.jinja").write_text("tools")
    out = merged(f"chat_template: {json.dumps(asked)}\n")
    assert templates_in(out) == {TEMPLATES.get(asked, asked)}
    assert json.loads((out / "tokenizer_config.json").read_text())["mine"] == "a"


def test_auto_takes_the_most_common_template_the_first_of_equals(place: Path) -> None:
    assert not templates_in(merged("chat_template: auto\n"))
    (place / "a" / "chat_template.jinja").write_text("first")
    write_tokenizer(place / "b", {"x": 0}, template="second")
    assert templates_in(merged("chat_template: auto\n")) == {"first"}
    named = [{"name": "tools", "template": "t"}, {"name": "default", "template": "second"}]
    (place / "c" / "tokenizer_config.json").write_text(json.dumps({"chat_template": named}))
    assert templates_in(merged("chat_template: auto\n")) == {"second"}
    assert template_of(mergekit_lite.open_checkpoint("c")) == "second"


SECRET = "the root of this host"


def linked_out(name: str, content: str = SECRET) -> None:
    """Make a small file of model a, the donor, a link to a file outside."""
    secret = Path(f"secret-{name}").absolute()
    secret.write_text(content)
    (Path("a") / name).unlink(missing_ok=True)
    (Path("a") / name).symlink_to(secret)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("chat_template.jinja", SECRET),
        ("chat_template.json", json.dumps({"chat_template": SECRET})),
        ("tokenizer_config.json", json.dumps({"chat_template": SECRET})),
    ],
)
def test_no_template_is_read_through_a_link_out_of_the_folder(place: Path, name: str, content: str) -> None:
    linked_out(name, content)
    with pytest.raises(CheckpointError, match=rf"/a/{name}: is a link that leaves its folder") as raised:
        merged("chat_template: auto\n")
    assert SECRET not in str(raised.value) and not Path("out").exists()


def test_no_tokenizer_is_read_through_a_link_out_of_the_folder(place: Path) -> None:
    write_tokenizer(place / "b", {"y": 0})
    linked_out("tokenizer.json", json.dumps({"model": {"vocab": {SECRET: 0}}}))
    with pytest.raises(CheckpointError, match=r"/a/tokenizer.json: is a link that leaves its folder") as raised:
        notes()
    assert SECRET not in str(raised.value)


def test_nothing_of_a_linked_file_reaches_the_output(place: Path) -> None:
    linked_out("README.md", f"---\nlicense: {SECRET!r}\n---\n")
    for name in ("generation_config.json", "special_tokens_map.json", "LICENSE"):
        linked_out(name)
    out = merged()
    assert not any(SECRET.encode() in path.read_bytes() for path in out.rglob("*") if path.is_file())


def test_a_template_of_any_length_is_not_read(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (place / "a" / "chat_template.jinja").write_text("x" * 2000)
    monkeypatch.setattr(input_files, "MAX_BYTES", 1999)
    with pytest.raises(CheckpointError, match=r"a/chat_template.jinja: is 2,000 bytes long; more than 1,999"):
        merged("chat_template: auto\n")


def test_templates_and_cards_in_a_cache_of_the_hub_are_read_through_its_links(place: Path) -> None:
    blobs, snapshot = place / "models--org--a" / "blobs", place / "models--org--a" / "snapshots" / ("a" * 40)
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    (place / "a" / "chat_template.jinja").write_text("{# of a #}")
    (place / "a" / "README.md").write_text("---\nlicense: mit\n---\n")
    write_tokenizer(place / "a", {"x": 0})
    for number, path in enumerate(sorted((place / "a").iterdir())):
        path.rename(blobs / f"{number}")
        (snapshot / path.name).symlink_to(f"../../blobs/{number}")
    (place / "a").rmdir()
    (place / "a").symlink_to(snapshot)
    out = merged("chat_template: auto\n")
    assert templates_in(out) == {"{# of a #}"} and (out / "tokenizer.json").exists()
    assert "license: mit" in (out / "README.md").read_text()


def test_a_single_file_has_no_template(place: Path) -> None:
    Path("r.yml").write_text(TEXT + "chat_template: chatml\n")
    assert any("do nothing" in note for note in mergekit_lite.plan_merge("r.yml", "out.safetensors").notes)
    assert notes("chat_template: chatml\n") == ""


CHAT = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello"},
    {"role": "user", "content": "Bye"},
]
RENDERED = {
    "chatml": "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\nHello"
    "<|im_end|>\n<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n",
    "llama3": "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user"
    "<|end_header_id|>\n\nHi<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello<|eot_id|>"
    "<|start_header_id|>user<|end_header_id|>\n\nBye<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n",
    "mistral": "<s>[INST] Be brief.\n\nHi [/INST] Hello</s>[INST] Bye [/INST]",
    "alpaca": "Be brief.\n\n### Instruction:\nHi\n\n### Response:\nHello</s>\n\n"
    "### Instruction:\nBye\n\n### Response:\n",
    "exaone": "[|system|]Be brief.[|endofturn|]\n[|user|]Hi\n[|assistant|]Hello[|endofturn|]\n"
    "[|user|]Bye\n[|assistant|]",
}


@pytest.mark.parametrize("name", TEMPLATES)
def test_templates_as_their_formats_were_published(name: str) -> None:
    jinja = pytest.importorskip("jinja2.sandbox")
    environment = jinja.ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)  # as in transformers
    template = environment.from_string(TEMPLATES[name])
    got = template.render(messages=CHAT, bos_token="<s>", eos_token="</s>", add_generation_prompt=True)
    assert got == RENDERED[name]


# --- the config where layers are moved

MOVED = """\
merge_method: passthrough
slices:
  - sources: [{model: a, layer_range: [0, 3]}]
  - sources: [{model: b, layer_range: [1, 4]}]
"""


def test_lists_by_layer_follow_the_layers(place: Path) -> None:
    own = {
        "layer_types": ["a0", "a1", "a2", "a3"],
        "mlp_only_layers": [0, 3],
        "eos_token_id": [1, 2, 3, 4],
        "text_config": {"num_hidden_layers": 4, "windows": [0, 1, 2, 3]},
        "vision_config": {"num_hidden_layers": 4, "windows": [0, 1, 2, 3]},
        "first_k_dense_replace": 1,
        "decoder_sparse_step": 1,
        "max_window_layers": 2,
    }
    configured(own, "a")
    configured(own | {"layer_types": ["b0", "b1", "b2", "b3"], "mlp_only_layers": [2]}, "b")
    told = notes(text=MOVED)
    assert "first_k_dense_replace: 1 goes by the layers' numbers" in told
    assert "decoder_sparse_step" not in told and "max_window_layers" not in told
    config = json.loads((merged(text=MOVED) / "config.json").read_text())
    assert config["num_hidden_layers"] == 6
    assert config["layer_types"] == ["a0", "a1", "a2", "b1", "b2", "b3"]
    assert config["mlp_only_layers"] == [0, 4]
    assert config["eos_token_id"] == own["eos_token_id"]
    assert config["text_config"] == {"num_hidden_layers": 6, "windows": [0, 1, 2, 1, 2, 3]}
    assert config["vision_config"] == own["vision_config"]


def test_a_model_that_does_not_list_its_layers(place: Path) -> None:
    configured({"layer_types": ["a0", "a1", "a2", "a3"]}, "a")
    assert "layer_types: the models of 3 moved layers don't list it" in notes(text=MOVED)
    config = json.loads((merged(text=MOVED) / "config.json").read_text())
    assert config["layer_types"] == ["a0", "a1", "a2", "a1", "a2", "a3"]


def test_slices_that_move_nothing_leave_the_config(place: Path) -> None:
    configured({"layer_types": ["x", "y", "x", "y"], "first_k_dense_replace": 1, "mlp_only_layers": [7]}, "a", "b")
    whole = "merge_method: passthrough\nslices: [{sources: [{model: a, layer_range: [0, 4]}]}]\n"
    assert notes(text=whole) == ""
    before = json.loads((place / "a" / "config.json").read_text())
    assert json.loads((merged(text=whole) / "config.json").read_text()) == before


# --- what is refused


def test_tensors_of_whole_numbers_have_one_shape_and_dtype(place: Path) -> None:
    import torch

    for name, ids in {"a": torch.zeros(4).long(), "b": torch.zeros(5).long(), "c": torch.zeros(4).int()}.items():
        write_folder(place / name, state(0, layers=4) | {"ids": ids, "flag": ids > 0}, config=CONFIG)
    with pytest.raises(PlanError) as raised:
        notes()
    [problem] = raised.value.problems  # of both
    assert sorted(problem.partition(":")[0].split(" and ")) == ["flag", "ids"]
    assert problem.endswith(": shape [4], but [5] in b")
    write_folder(place / "b", state(0, layers=4) | {"ids": torch.ones(4).long(), "flag": torch.ones(4) > 0})
    with pytest.raises(PlanError, match="ids: is int64, but int32 in c"):
        notes()


def test_all_models_that_can_not_be_opened_are_told_together(place: Path) -> None:
    (place / "b" / "model.safetensors").write_bytes(b"x")
    (place / "c" / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"2 models can't be opened:\n  - .*b/model.*\n  - .*c: holds no weights"):
        notes()


def test_numbers_that_are_wrong_together_are_told_once(place: Path) -> None:
    text = TEXT.replace("  - model: b\n", "  - {model: b, parameters: {weight: -2}}\n")
    with pytest.raises(PlanError) as raised:
        notes(text=text)
    [problem] = raised.value.problems
    assert "and 14 more tensors: The weights 1, -2, 1 sum to zero" in problem


@pytest.mark.parametrize("command", [["merge", "r.yml", "out"], ["extrapolate", "b", "a", "-a", "0.5", "-o", "out"]])
def test_the_last_line_says_that_the_output_has_no_config_and_whose_model_lacks_one(
    place: Path, command: list[str]
) -> None:
    Path("r.yml").write_text(TEXT)
    planned = ("the output has no config.json, as a has none", "transformers can't load it")
    whole = CliRunner().invoke(main, [*command, "--dry-run"])
    Path("a/config.json").unlink()
    for more in (["--dry-run"], ["-q"]):
        lacking = CliRunner().invoke(main, [*command, *more])
        assert (lacking.exit_code, whole.exit_code) == (0, 0)
        last = " ".join(lacking.output[lacking.output.index("the output has no") :].split())
        assert all(part in last for part in planned) and planned[0] not in whole.output
    assert not Path("out/config.json").exists()
