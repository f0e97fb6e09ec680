"""Text of strangers where it is shown: no terminal obeys it, no card or page takes it for anything but text."""

from __future__ import annotations

import io
import json
import os
import re
import unicodedata
from collections.abc import Mapping
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st
from rich.text import Text

import mergekit_lite
from mergekit_lite.commands import COMMANDS, main
from mergekit_lite.commands.screen import PlainConsole, console, table
from mergekit_lite.output.card import _without_paths
from mergekit_lite.pages import html, markdown
from mergekit_lite.plain_text import CONTROLS, REPLACEMENT, is_plain_line, plain, plain_line
from tests.models import state, tuned, write_folder

ESCAPES = "\x1b]0;owned\x07\x1b[2J\x9b31m\u202e\u2066\r\b"
TRICKS = ESCAPES + "[/bold][link=https://x.y]"


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Two models with tricks in every name and value that a stranger chooses, and a third whose own name is one."""
    base = state(0)
    config = {"model_type": f"llama{TRICKS}", "architectures": [TRICKS], "num_hidden_layers": 2, "rope_theta": TRICKS}
    for seed, name in enumerate(("sft", "dpo", f"x{TRICKS}".replace("/", ""))):
        folder = write_folder(tmp_path / name, tuned(base, seed), config=config | {"hidden_act": f"{name}{TRICKS}"})
        (folder / f"a{ESCAPES}.py").write_text("evil")
        (folder / f"b{ESCAPES}\nmade out").mkdir()
        tokens = {f"{name}{TRICKS}": 0, "<s>": 1}
        (folder / "tokenizer.json").write_text(json.dumps({"model": {"vocab": tokens}}))
        (folder / "tokenizer_config.json").write_text(json.dumps({"chat_template": TRICKS}))
        (folder / "README.md").write_text(f"---\nlicense: {json.dumps(TRICKS)}\n---\n")
    recipe = "merge_method: linear\nmodels: [{model: sft}, {model: dpo}]\nparameters: {weight: 1}\n"
    (tmp_path / "r.yml").write_text(recipe)
    odd = json.dumps(TRICKS)
    (tmp_path / "odd.yml").write_text(
        f"{recipe}{odd}: {odd}\nseed: {odd}\nchat_template: {odd}\ndtype: {odd}\nmerge_methods: {odd}\n"
    )
    (tmp_path / "odd-models.yml").write_text(recipe.replace("dpo", odd))
    (tmp_path / "odd-files.yml").write_text(recipe.replace("model: dpo", f"model: {json.dumps('sft+' + TRICKS)}"))
    monkeypatch.chdir(tmp_path)
    return tmp_path


def third(place: Path) -> str:
    return next(path.name for path in place.iterdir() if path.name.startswith("x\x1b"))


def shown(*arguments: str) -> str:
    """What a command shows, which has nothing that a terminal would obey."""
    result = CliRunner().invoke(main, list(arguments))
    assert result.exception is None or isinstance(result.exception, SystemExit), (arguments, result.exception)
    text = result.stdout + result.stderr
    assert not CONTROLS.search(text), (arguments, CONTROLS.search(text), text)
    return text


def test_no_command_shows_what_a_terminal_obeys(place: Path) -> None:
    odd = third(place)
    driven = [
        ["extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", "out"],
        ["extrapolate", "sft", odd, "--alpha", "0.3", "-o", "out2"],
        ["extrapolate", "sft", odd, "--alpha", "0.3", "--dry-run", "-v"],
        ["extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", f"o{ESCAPES}"],
        ["extrapolate", "sft", "dpo", "--alpha", ESCAPES],
        ["extrapolate", TRICKS, f"./{TRICKS}", "--alpha", "0.3", "--alpha-for", f"{TRICKS}=x"],
        ["merge", "r.yml", "-o", "merged", "-v"],
        ["merge", "r.yml", "-o", "merged-as-data", "--json"],
        ["merge", "r.yml", "-o", f"[/b]{ESCAPES}"],
        *(["merge", name, "-o", "x"] for name in ("odd.yml", "odd-models.yml", "odd-files.yml", f"no{TRICKS}")),
        ["plan", "r.yml"],
        ["plan", "r.yml", "-v"],
        ["plan", "r.yml", "--json"],
        ["plan", "odd.yml"],
        ["verify", "out"],
        ["verify", "out", "--input", f"sft{TRICKS}=x"],
        ["verify", odd],
        ["methods", TRICKS],
        ["inspect", "dpo"],
        ["inspect", "dpo", "--json"],
        ["inspect", odd, "-v"],
        ["compare", "sft", "dpo", odd, "--csv", "x.csv", "--html", "x.html"],
        ["compare", "sft", odd, "--json", "--alpha", "0.1"],
        ["compare", "sft", "dpo", "--plot", f"no{ESCAPES}/x.png"],
        ["vector", "extract", "sft", "dpo", "-o", "v.safetensors"],
        ["vector", "extract", "sft", odd, "-o", f"v{ESCAPES}.safetensors", "-v"],
        ["vector", "apply", "sft", "v.safetensors", "-o", "applied"],
        ["vector", "apply", "sft", f"v{TRICKS}:0.5", "-o", "applied"],
        ["vector", "combine", "--method", "linear", "-p", f"{TRICKS}={TRICKS}", "v.safetensors", "-o", "c.safetensors"],
        ["vector", "combine", "--method", TRICKS, "v.safetensors", "-o", "c.safetensors"],
        ["distill", "run", "odd.yml", "--dry-run"],
        ["distill", "sample", f"no{TRICKS}.yml"],
        ["distill", TRICKS],
        ["answer", f"no{TRICKS}.jsonl", "--recipe", "odd.yml", "-o", "answers.jsonl"],
        ["answer", "r.yml", "--recipe", f"no{TRICKS}.yml", "-o", f"a{ESCAPES}.txt"],
        ["boost", "sft", odd, "--prompts", f"no{TRICKS}.jsonl", "--score", f"maths,{TRICKS}=1", "-o", "boosted"],
        ["boost", "sft", odd, "--prompts", f"no{TRICKS}.jsonl", "--score", "maths", "-o", "boosted", "--dry-run"],
        ["preview", "sft", odd, "--alpha", "0.3", "--prompt", TRICKS],
        ["preview", f"./{TRICKS}", "dpo", "--alpha", TRICKS, "--prompt", "a"],
        ["statistics", odd, "--prompts", f"no{TRICKS}.jsonl", "-o", "s.safetensors"],
        ["statistics", "sft", "--prompts", "r.yml", "-o", f"s{ESCAPES}.txt"],
        ["app", "--root", f"./{TRICKS}"],
        ["push", "out", f"org/{TRICKS}"],
        ["moe", "r.yml", "-o", f"mixture{TRICKS}"],
        ["moe", f"no{TRICKS}", "-o", "mixture"],
        ["moe", "split", odd, "--experts", TRICKS, "-o", "split"],
        ["moe", "prune", f"./{TRICKS}", "--keep", "1", "--by", "weights", "-o", "pruned"],
        ["upcycle", odd, "--experts", "2", "-o", f"up{TRICKS}"],
        ["upcycle", f"./{TRICKS}", "--experts", "2", "-o", "up"],
        ["tokenizer", "transplant", "sft", odd, "-o", f"other{TRICKS}"],
        ["tokenizer", "transplant", "sft", f"./{TRICKS}", "--method", TRICKS, "-o", "other"],
        ["estimate", "scores", f"no{TRICKS}.npz", TRICKS, "r.yml"],
        ["estimate", "convert", odd, f"x{TRICKS}"],
        ["push", f"./{TRICKS}", "org/name"],
        ["extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", f"s3://bucket/{TRICKS}"],
        ["extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", f"s3://bucket/x?{ESCAPES}"],
        [TRICKS],
        [f"--{TRICKS}"],
        ["merge", f"--{TRICKS}"],
    ]
    for arguments in driven:
        shown(*arguments)
        if arguments[-1] == "out":
            (place / "out" / f"evil{ESCAPES}\nout is sound").write_text("x")
    told = shown("verify", "out", "--samples", "0")
    assert "out is not sound, 1 finding" in told and "\nout is sound" not in told
    assert {arguments[0] for arguments in driven} >= set(COMMANDS)


def test_brackets_in_a_name_are_brackets(place: Path) -> None:
    """Rich takes them for markup, and stumbled over them once all was done."""
    text = shown("extrapolate", "sft", "dpo", "--alpha", "0.3", "-o", "a[bold]b")
    assert "made a[bold]b" in text and (place / "a[bold]b" / "model.safetensors").exists()


@pytest.mark.parametrize("name", [os.fsdecode(b"caf\xe9"), "x\x1b[2Jy", "x\ny", "\u202ex"], ids=ascii)
def test_names_that_no_manifest_can_hold_are_refused_before_the_work(place: Path, name: str) -> None:
    (place / "dpo").rename(place / name)
    for arguments in (["extrapolate", "sft", name, "--alpha", "0.3"], ["vector", "extract", "sft", name]):
        assert "characters that a manifest can't hold" in shown(*arguments, "-o", "out.safetensors")
    (place / name).rename(place / "dpo")
    for output in (name, f"{name}.safetensors"):
        assert "characters that a manifest can't hold" in shown("merge", "r.yml", "-o", output)
    (place / "dpo" / "model.safetensors").rename(place / "dpo" / f"{name}.safetensors")
    assert "characters that a manifest can't hold" in shown("merge", "r.yml", "-o", "out")
    assert not list(place.glob(".*partial")) and not (place / "out").exists()


def test_a_card_shows_text_of_strangers_as_text(place: Path) -> None:
    for output in ("out", "[x](javascript:1) <b> `c` *d*"):
        mergekit_lite.merge("r.yml", output)
        card = (place / output / "README.md").read_text()
        assert not CONTROLS.search(card)
    assert r"# \[x\](javascript:1) \<b\> \`c\` \*d\*" in card
    assert "a\\x1b" not in card and "evil" not in card


def test_rich_shows_brackets_and_controls_as_text() -> None:
    stream = io.StringIO()
    screen = console(stream)
    screen.print("[bold]x[/] :smile: \x1b[31m")
    screen.print(Text("\x1b[2J"), table(("[red]h",), [("\u202ecell",), (Text("\x07bell"),)]))
    text = stream.getvalue()
    assert "[bold]x[/] :smile: �[31m" in text and "[red]h" in text and "�cell" in text and not CONTROLS.search(text)
    coloured = io.StringIO()
    PlainConsole(file=coloured, force_terminal=True, color_system="standard").print(Text("x\x1b[2J", "red"))
    assert coloured.getvalue() == "\x1b[31mx�[2J\x1b[0m\n"  # what rich itself writes is no text


TURNING = ("LRE", "RLE", "LRO", "RLO", "PDF", "LRI", "RLI", "FSI", "PDI")  # what begins or ends a change of direction


@given(st.text() | st.text("\x1b\x9b\u202e\ud800a\n\t "))
def test_plain_text_has_nothing_that_is_obeyed(text: str) -> None:
    made = plain(text)
    made.encode()
    assert plain(made) == made
    for old, new in zip(text, made, strict=True):
        assert new in (old, REPLACEMENT)
        assert unicodedata.category(new) not in ("Cc", "Cs", "Zl", "Zp") or new in "\n\t"
        assert unicodedata.bidirectional(new) not in TURNING
    assert is_plain_line(plain_line(text)) and "\n" not in plain_line(text)


class Elements(HTMLParser):
    """The names of the elements of a page."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.names.append(tag)


@given(st.text(), st.text())
def test_a_page_has_no_element_but_its_own(text: str, value: str) -> None:
    made = html.element("p", text, title=value)
    elements = Elements()
    elements.feed(made)
    assert elements.names == ["p"] and not CONTROLS.search(made)


@given(st.text("`ab \n"))
def test_code_in_markdown_ends_where_it_should(text: str) -> None:
    fence, *lines, end = markdown.block(text, "yaml").split("\n")
    assert fence == f"{end}yaml" and set(end) == {"`"} and not any(line.strip().startswith(end) for line in lines)
    line = markdown.code(text)
    opening = re.match("`+", line)
    assert opening is not None and opening[0] not in re.findall("`+", line[len(opening[0]) : -len(opening[0])])


# --- the card names no path of this machine


def card_of(place: Path, recipe: str) -> str:
    (place / "r.yml").write_text(recipe)
    mergekit_lite.merge("r.yml", "out", force=True)
    return (place / "out" / "README.md").read_text()


@pytest.mark.parametrize("form", ["{}", "'{}'", "{{model: {{path: '{}'}}}}", '"{}"'])
def test_no_absolute_path_is_in_a_card(place: Path, form: str) -> None:
    spaced = place / "my models" / "dpo one"
    spaced.parent.mkdir()
    (place / "dpo").rename(spaced)
    models: Mapping[str, str] = {"sft": form.format(place / "sft"), "dpo": form.format(spaced)}
    recipe = (
        f"# made at {place}/notes.txt, see https://example.org/a/b and </end/of/x>\nmerge_method: linear\n"
        f"models:\n- model: {models['sft']}\n- model: {models['dpo']}\nparameters: {{weight: 1}}\n"
    )
    card = card_of(place, recipe)
    assert str(place) not in card and str(place.parent) not in card
    assert "- `sft` (config, tokenizer)\n- `dpo one`\n" in card
    assert "# made at notes.txt, see https://example.org/a/b and </end/of/x>" in card
    assert f"- model: {form.format('sft')}\n" in card
    assert json.loads((place / "out" / "mergekit_lite_manifest.json").read_text())["inputs"][0]["reference"] == str(
        place / "sft"
    )


@pytest.mark.parametrize(
    ("written", "shown"),
    [
        ("- /m", "- m"),
        ("- /m/a, /m/ab, ./m/a, x/m, a/b/c", "- a, ab, ./m/a, x/m, a/b/c"),
        ("[/m/a+/m/lora:0.5]", "[a+lora:0.5]"),
        ("~/models/base@main ../up/x", "base@main ../up/x"),
        ("'{{ x }}</s>' https://a.b/c/d regex:/x", "'{{ x }}</s>' https://a.b/c/d regex:/x"),
    ],
)
def test_paths_in_a_recipe(place: Path, written: str, shown: str) -> None:
    checkpoint = mergekit_lite.open_checkpoint("sft")
    sources = [replace(checkpoint, reference=path, path=Path(path)) for path in ("/m", "/m/a")]
    assert _without_paths(written, sources) == shown


def test_paths_that_extrapolate_and_vectors_put_into_a_card(place: Path) -> None:
    mergekit_lite.extract_vector(place / "sft", place / "dpo", place / "v.safetensors")
    mergekit_lite.extrapolate(f"{place}/sft", f"{place}/sft+{place}/v.safetensors:0.5", place / "out", 0.3)
    card = (place / "out" / "README.md").read_text()
    assert str(place) not in card and "- `sft+v.safetensors:0.5` (config, tokenizer)\n- `sft`\n" in card
