"""Small files of a model folder that mean harm: a message in the plan, or an output without them; never a hang."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

import mergekit_lite
from mergekit_lite.checkpoint.companion_patterns import COMPANIONS, matches
from mergekit_lite.errors import MergekitLiteError, UsageError
from mergekit_lite.output.companions import companions, companions_of
from mergekit_lite.planning.tokenizers import is_tokenizer_file
from mergekit_lite.recipe import RecipeError, parse, text_of
from tests.models import state, tuned, write_folder
from tests.waiting import woken_after

MERGE = "merge_method: linear\nmodels: [{model: a}, {model: b}]\nparameters: {weight: 1}\n"
SECRET = "the root of this host"
NAMES = ("config.json", "README.md", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja",
         "chat_template.json", "generation_config.json", "tokenizer.model", "LICENSE",
         "additional_chat_templates/x.jinja", "1_Pooling/config.json")  # fmt: skip
Spoil = Callable[[Path], object]


def text(content: str | bytes) -> Spoil:
    return lambda path: path.write_bytes(content if isinstance(content, bytes) else content.encode())


NO_FILES: dict[str, Spoil] = {
    "pipe": os.mkfifo,
    "folder": Path.mkdir,
    "device": lambda path: path.symlink_to("/dev/zero"),
    "secret": lambda path: path.symlink_to(Path("secret").absolute()),
    "to nothing": lambda path: path.symlink_to("nothing"),
    "latin-1": text(b"caf\xe9"),
    "empty": text(""),
}
ODD_JSON: dict[str, Spoil] = {
    "deep": text('{"chat_template":' + "[" * 5000 + "]" * 5000 + "}"),
    "half a surrogate pair": text(r'{"chat_template":"\ud800","model_type":"\ud800"}'),
    "long number": text('{"vocab_size":' + "9" * 4000 + "}"),
    "list": text("[1]"),
    "odd names": text('{"chat_template":[{"name":[1],"template":"x"},{"name":{},"template":1}]}'),
}
ODD_CARDS: dict[str, Spoil] = {
    "tag": text("---\nlicense: !!int ''\n---\n"),
    "deep flow": text("---\nlicense: " + "[" * 500 + "]" * 500 + "\n---\n"),
    "deep block": text("---\nlicense:\n" + "\n".join(" " * depth + "a:" for depth in range(1, 120)) + "\n---\n"),
    "long time": text("---\nlicense: " + "1:" * 100_000 + "1\n---\n"),
    "half a letter": text('---\nlicense: "\\ud800"\n---\n'),
    "binary": text("---\nlicense: !!binary '!!!'\n---\n"),
    "many": text("---\nlanguage: [" + "x, " * 5000 + "]\n---\n"),
}
KINDS = NO_FILES | ODD_JSON | ODD_CARDS


@pytest.fixture(autouse=True)
def _no_waiting() -> Iterator[None]:
    with woken_after(120):
        yield


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    base = state(0)
    write_folder(tmp_path / "a", base)
    write_folder(tmp_path / "b", tuned(base, 1))
    (tmp_path / "b" / "tokenizer.json").write_text('{"model": {"vocab": {"x": 0}}}')
    (tmp_path / "secret").write_text(json.dumps({"chat_template": SECRET, "license": SECRET}))
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_each_small_file_of_each_odd_kind(place: Path, kind: str) -> None:
    """A message in the plan, or a sound output; never one after the work, and nothing of another file in it."""
    told = 0
    for name in NAMES:
        if (kind in ODD_JSON and not name.endswith(".json")) or (kind in ODD_CARDS and name != "README.md"):
            continue
        path = place / "a" / name
        before = path.read_bytes() if path.exists() else None
        path.unlink(missing_ok=True)
        path.parent.mkdir(exist_ok=True)
        KINDS[kind](path)
        asked = "chat_template: auto\n" if is_tokenizer_file(name) else ""
        Path("r.yml").write_text(f"{MERGE}{asked}")
        try:
            plan = mergekit_lite.plan_merge("r.yml", "out")
        except MergekitLiteError as error:
            assert len(str(error)) < 5000 and SECRET not in str(error)
            told += 1
        else:
            mergekit_lite.run(plan, force=True)
            assert mergekit_lite.verify("out", samples=0).sound
            for made in Path("out").rglob("*"):
                assert not made.is_symlink() and (made.is_dir() or SECRET.encode() not in made.read_bytes())
            told += bool(plan.notes) or bool(companions(plan)[1])
        path.rmdir() if path.is_dir() and not path.is_symlink() else path.unlink()
        if before is not None:
            path.write_bytes(before)
    assert told


def test_what_decides_between_left_out_and_refused(place: Path) -> None:
    """A card is left out with a note, what the recipe asks for is refused, a config always."""
    Path("r.yml").write_text(MERGE + "chat_template: chatml\n")
    (place / "a" / "README.md").write_text("---\nlicense: !!bool maybe\n---\n")
    notes = "\n".join(mergekit_lite.plan_merge("r.yml", "out").notes)
    assert "nothing of the card of a is taken over, not even its licence: 'maybe' is not a value of type bool" in notes
    (place / "a" / "tokenizer_config.json").write_text("{")
    with pytest.raises(MergekitLiteError, match=r"a/tokenizer_config\.json: is not valid JSON"):
        mergekit_lite.plan_merge("r.yml", "out")
    Path("plain.yml").write_text(MERGE)
    mergekit_lite.merge("plain.yml", "out")
    assert Path("out/tokenizer_config.json").read_text() == "{"
    (place / "a" / "config.json").write_text("{")
    with pytest.raises(MergekitLiteError, match=r"a/config\.json: is not valid JSON"):
        mergekit_lite.plan_merge("plain.yml", "out2")


def test_a_vocabulary_that_can_not_be_read_is_told(place: Path) -> None:
    (place / "a" / "tokenizer.json").write_text("{")
    Path("r.yml").write_text(MERGE)
    notes = "\n".join(mergekit_lite.plan_merge("r.yml", "out").notes)
    assert "a/tokenizer.json: is not valid JSON" in notes and "Whether the vocabularies agree can't be told" in notes


CODE_AND_PICKLES = (
    "modeling_x.py", "modeling.PY", "a.pyw", "a.pyd", "a.dll", "a.dylib", "a.so", "a.so.1", "run.bat", "run.ps1",
    "x.js", "hook.bash", "a.pkl", "a.pickle", "a.joblib", "a.pyz", "a.npy", "Makefile", "sitecustomize", "x.PTH",
    "evil.BIN", "w.SAFETENSORS", "optimizer.bin", "training_args.bin", "tokenizer.json.py", "LICENSE.py", "LICENSE.pkl",
    "LICENSE-x.py", "tokenizer.model.py", "vocab.py", "chat_template.py", "chat_template.jinja.so", "x.gguf",
    "tokenizer_config.json\n.py", "evil.model", "merges.txt.exe", "adapter_config.json", "quantize_config.json",
    "additional_chat_templates/x.py", "1_Pooling/modeling.py", "1_Pooling/pytorch_model.bin", "vocab\x1b.json",
    os.fsdecode(b"vocab\xe9.json"), "sub/config.json", "sub/tokenizer.json", "README.MD", "TOKENIZER.JSON",
)  # fmt: skip


def test_neither_code_nor_pickles_travel_in_whatever_spelling(place: Path) -> None:
    for name in CODE_AND_PICKLES:
        path = place / "a" / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (place / "a" / "tokenizer.json").write_text("{}")
    (place / "a" / "LICENSE").write_text("mine")
    copied, left = companions_of(mergekit_lite.open_checkpoint("a"))
    assert copied == ["LICENSE", "tokenizer.json"]
    assert set(left) == {name for name in CODE_AND_PICKLES if not name.startswith("sub/")} | {"sub/"}
    Path("r.yml").write_text(MERGE)
    mergekit_lite.merge("r.yml", "out")
    made = {str(path.relative_to("out")) for path in Path("out").rglob("*") if path.is_file()}
    assert made == {"LICENSE", "tokenizer.json", "README.md", "config.json", "mergekit_config.yml", "model.safetensors",
                    "mergekit_lite_manifest.json"}  # fmt: skip


@pytest.mark.parametrize(
    "name",
    ["tokenizer.json", "tokenizer.model.v3", "qwen.tiktoken", "preprocessor_config.json", "NOTICE", "LICENSE.txt",
     "license", "USE_POLICY.md", "additional_chat_templates/tools.jinja", "1_Pooling/config.json", "modules.json",
     "generation_config.json", "vocab.json", "chat_template.jinja"],
)  # fmt: skip
def test_what_travels(name: str) -> None:
    assert matches(name, COMPANIONS)


RECIPE = "merge_method: linear\nmodels:\n  - model: a\n    parameters: {weight: 1}\n  - model: b\n"


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("seed: !!int ''", "6:7: '' is not a value of type int"),
        ("seed: !!float ''", "6:7: '' is not a value of type float"),
        ("normalize: !!bool perhaps", "6:12: 'perhaps' is not a value of type bool"),
        ("parameters: {weight: " + "9" * 400 + "}", "6:22: a number of 400 characters is refused"),
        ("parameters: {weight: 0x" + "f" * 400 + "}", "6:22: a number of 402 characters is refused"),
        ("seed: " + "1:" * 100_000 + "1", "6:7: a number of 200,001 characters is refused"),
        ('chat_template: "{{ \\ud800 }}"', "6:16: half a surrogate pair"),
        ('"\\ud800": 1', "6:1: half a surrogate pair"),
        ("seed: !!python/object/apply:os.system [exit]", "is refused"),
        ("seed: " + "[" * 500, "nested too deeply"),
    ],
    ids=lambda value: value[:24],
)
def test_odd_numbers_and_tags_of_a_recipe_are_told_with_their_line(line: str, told: str) -> None:
    with pytest.raises(RecipeError) as raised:
        parse(RECIPE + line + "\n")
    assert told in str(raised.value) and len(str(raised.value)) < 2000


def test_a_weight_of_as_many_digits_as_a_float_holds() -> None:
    number = "0x" + "f" * 248
    assert parse(RECIPE + f"parameters: {{weight: {number}}}\n").parameters["weight"][0].values[0] == float(
        int(number, 16)
    )


@pytest.mark.parametrize("kind", ["pipe", "folder", "device", "to nothing", "latin-1"])
def test_a_recipe_that_is_no_text(tmp_path: Path, kind: str) -> None:
    KINDS[kind](tmp_path / "r.yml")
    with pytest.raises(UsageError, match=r"Can't read the recipe .*r\.yml: "):
        text_of(tmp_path / "r.yml")


def test_a_vector_that_is_a_pipe(place: Path) -> None:
    os.mkfifo("v.safetensors")
    for reference in ("a+vector:v.safetensors", "a+v.safetensors"):
        with pytest.raises(MergekitLiteError, match=r"v\.safetensors: (is not a regular file|can't be opened)"):
            mergekit_lite.open_checkpoint(reference)
