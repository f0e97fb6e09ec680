"""The pages under docs/ are true: their recipes run, their commands work, the generated one is up to date."""

from __future__ import annotations

import json
import re
import shutil
from pathlib import Path

import pytest
import yaml
from click.testing import CliRunner
from safetensors.torch import load_file

import mergekit_lite
from docs import api as page_of_python
from docs import catalogue as page_of_recipes
from docs import methods as page_of_methods
from mergekit_lite.commands import main
from mergekit_lite.methods import METHODS
from mergekit_lite.multimerge import plan_documents
from mergekit_lite.recipe.documents import parse_documents
from tests.adapters import lora, write_adapter
from tests.models import read_folder, same_bytes, state, tuned, write_folder
from tests.statistics_files import write_those_of

DOCS = Path(__file__).parents[1] / "docs"
RECIPES = (DOCS / "recipes.md").read_text(encoding="utf-8")
VECTORS = (DOCS / "vectors.md").read_text(encoding="utf-8")
MERGEKIT = (DOCS / "from-mergekit.md").read_text(encoding="utf-8")
EXAMPLES = {name: text for text, name in re.findall(r"```yaml\n(# (\S+\.yml)\n.*?)```", RECIPES, re.DOTALL)}
COMMANDS = re.findall(r"^    mergekit-lite (.*?)(?:  +#.*)?$", RECIPES, re.MULTILINE)
CONFIG = {"model_type": "llama", "num_hidden_layers": 8, "torch_dtype": "bfloat16", "tie_word_embeddings": False}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with the models and recipes that the page names."""
    base = state(0, layers=8)
    write_folder(tmp_path / "base", base, config=CONFIG)
    write_folder(tmp_path / "math", tuned(base, 1), config=CONFIG)
    write_folder(tmp_path / "code", tuned(base, 2), config=CONFIG)
    q_proj = "model.layers.3.self_attn.q_proj"
    write_adapter(tmp_path / "adapter", lora(q_proj, *base[f"{q_proj}.weight"].shape))
    for name, text in EXAMPLES.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_the_page_on_security_names_tests_that_exist() -> None:
    named = re.findall(r"`(?:\S+/)?(test_\w+\.py)`", (DOCS / "security.md").read_text(encoding="utf-8"))
    assert len(named) > 8
    for name in named:
        assert list((DOCS.parent / "tests").rglob(name)), name


def test_the_examples_are_found() -> None:
    assert len(EXAMPLES) == RECIPES.count("```yaml") == 11
    assert len(COMMANDS) == 3


@pytest.mark.parametrize("name", EXAMPLES)
def test_examples_run_without_a_note(name: str, place: Path) -> None:
    text = (place / name).read_text(encoding="utf-8")
    if "statistics:" in text:
        write_those_of(yaml.safe_load(text))
    documents = parse_documents(text, name)
    for plan in [step.plan for step in plan_documents(documents, "out")]:
        assert plan.notes == ()
    mergekit_lite.merge(name, "out")
    assert json.loads((place / "out" / "config.json").read_text())["num_hidden_layers"] == (
        12 if "stack" in name else 8
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str, place: Path) -> None:
    result = CliRunner().invoke(main, command.split())
    assert result.exit_code == 0, result.output


def test_what_the_additions_say(place: Path) -> None:
    mergekit_lite.merge("additions.yml", "out")
    base, got = read_folder(place / "base"), read_folder(place / "out")
    copied = {name for name in base if same_bytes(base[name], got[name])}
    assert copied == {"lm_head.weight", *(f"model.layers.{layer}.input_layernorm.weight" for layer in (0, 1))}
    jobs = {job.name: job for job in mergekit_lite.plan_merge("additions.yml", "x").jobs}
    assert jobs["model.layers.7.self_attn.q_proj.weight"].method == "task_arithmetic"
    assert jobs["model.layers.7.mlp.up_proj.weight"].parameters[0]["density"] == (0.9, 0.9)
    assert jobs["model.layers.7.mlp.up_proj.weight"].parameters[0]["weight"] == (0.5, 0.5)


def test_the_errors_shown_are_those_of_the_program(place: Path) -> None:
    wrong = EXAMPLES["ties.yml"].replace("weight: 0.6", "wieght: 0.6").replace("\ndtype", "\ndytpe")
    (place / "ties.yml").write_text(wrong, encoding="utf-8")
    result = CliRunner().invoke(main, ["plan", "ties.yml"])
    shown = re.search(r"^    (Error: ties\.yml.*\n(?:    .*\n)+)", RECIPES, re.MULTILINE)
    assert shown is not None and result.exit_code == 2
    assert result.output.strip() == re.sub(r"^    ", "", shown[1], flags=re.MULTILINE).strip()


@pytest.mark.parametrize(
    ("change", "told"),
    [
        ("modules: {}", "modules"),
        ("tokenizer: {tokens: {a: 3}}", "expected the token 'a'"),
        ("tokenizer: {source: base, pad_to_multiple_of: no}", "expects a whole number"),
        ("experts: []", "experts"),
        ("genome: {}", "genome"),
        ("dnsity: 0.5", "unknown key 'dnsity'"),
        ("---\nmerge_method: linear", "two documents have no 'name'"),
    ],
)
def test_what_is_refused(change: str, told: str, place: Path) -> None:
    (place / "ties.yml").write_text(f"{EXAMPLES['ties.yml']}{change}\n", encoding="utf-8")
    result = CliRunner().invoke(main, ["plan", "ties.yml"])
    assert result.exit_code != 0 and told in str(result.output) + str(result.exception)


def test_files_merge_into_a_file(place: Path) -> None:
    text = re.sub(r"\./(\w+)", r"./\1/model.safetensors", EXAMPLES["layers.yml"])
    (place / "files.yml").write_text(text, encoding="utf-8")
    mergekit_lite.merge("files.yml", "out.safetensors")
    mergekit_lite.merge("layers.yml", "out")
    one, folder = load_file("out.safetensors"), read_folder(place / "out")
    assert one.keys() == folder.keys() and all(same_bytes(one[name], folder[name]) for name in one)


def test_the_page_of_methods_is_up_to_date() -> None:
    assert page_of_methods.PAGE.read_text(encoding="utf-8") == page_of_methods.page(), "run: python -m docs.methods"


def test_the_page_of_python_is_up_to_date_and_complete() -> None:
    assert page_of_python.PAGE.read_text(encoding="utf-8") == page_of_python.page(), "run: python -m docs.api"
    listed = [name for names in page_of_python.SECTIONS.values() for name in names]
    assert sorted([*listed, "__version__"]) == mergekit_lite.__all__


def test_the_page_of_recipes_is_up_to_date_and_complete() -> None:
    page = page_of_recipes.page()
    assert page_of_recipes.PAGE.read_text(encoding="utf-8") == page, "run: python -m docs.catalogue"
    files = [path for path in page_of_recipes.FOLDER.rglob("*") if path.suffix in (".yml", ".yaml")]
    assert len(files) > 90
    for path in files:
        assert page.count(f"]({path.relative_to(page_of_recipes.FOLDER).as_posix()})") == 1, path
    assert page.count("not confirmed") == 1  # zephyr_0.05


def test_the_page_of_methods_tells_of_all() -> None:
    page = page_of_methods.page()
    assert all(f"\n### {name}\n" in page for name in METHODS)
    named = {name for names in page_of_methods.WHICH.values() for name in names.split(", ")}
    assert named <= METHODS.keys()


def test_the_mergekit_page_names_real_options() -> None:
    help_text = CliRunner().invoke(main, ["merge", "--help"]).output
    commands = re.findall(r"mergekit-lite merge [^`\n|]*", MERGEKIT)
    assert commands
    for option in {option for command in commands for option in re.findall(r"--[a-z-]+", command)}:
        assert option in help_text, option


VERIFY = re.findall(r"^    mergekit-lite (verify .*?)(?:  +#.*| #.*)?$", (DOCS / "verify.md").read_text(), re.MULTILINE)


@pytest.mark.parametrize("command", VERIFY)
def test_verify_commands(command: str, place: Path) -> None:
    (place / "r.yml").write_text(EXAMPLES["ties.yml"], encoding="utf-8")
    mergekit_lite.merge("r.yml", "merged")
    shutil.copytree("base", place / "models" / "base")
    result = CliRunner().invoke(main, command.replace("=/models", f"={place}/models").split())
    assert result.exit_code == 0 and len(VERIFY) == 4, result.output


def test_the_page_of_vectors_runs(place: Path) -> None:
    """Its commands in their order, then its recipe."""
    commands = re.findall(r"^    mergekit-lite (.*?)(?:  +#.*)?$", VECTORS, re.MULTILINE)
    assert len(commands) == 12
    for number, name in enumerate("abc"):
        write_adapter(place / name, lora("model.layers.0.self_attn.q_proj", 8, 8, seed=number))
    runs = [commands[0], commands[0].replace("math", "code"), *commands[1:]]
    for command in runs:
        result = CliRunner().invoke(main, command.replace("rank 32", "rank 2").split())
        assert result.exit_code == 0, result.output
    for name, tensor in read_folder(place / "math").items():
        assert same_bytes(read_folder(place / "math-again")[name], tensor)
    [recipe] = re.findall(r"```yaml\n(.*?)```", VECTORS, re.DOTALL)
    (place / "vectors.yml").write_text(recipe)
    mergekit_lite.merge("vectors.yml", "of-vectors")
