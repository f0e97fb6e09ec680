"""Recipes of aggregates: everything that is wrong is told at once, with its place; those that are shipped load."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lite.answers.aggregating.recipe import KEYS, AnswerRecipe, load
from mergekit_lite.commands import main
from mergekit_lite.yaml_document import RecipeError
from tests.answers.aggregating.aggregates import answer

ROOT = Path(__file__).parents[3]
SHIPPED = sorted((ROOT / "recipes" / "answer").glob("*.yml"))
SOUND = """\
models:
  - {name: a, model: org/a, server: "http://x/v1"}
  - {name: b, model: org/b}
layers:
  - [{step: generate, model: a}, {step: generate, model: b}]
  - {step: rank, model: b}
"""
WRONG: list[tuple[str, str, str | None]] = [  # what is replaced in the sound one, by what, what is told
    ("models:", "model:", "1:1: unknown key 'model' in the recipe. Did you mean 'models'?"),
    (SOUND[SOUND.index("layers:") :], "layers: []", "4:9: 'layers' is an empty list: begin with a 'generate'"),
    ("step: rank", "step: rnak", "6:12: 'step' is the text 'rnak', expected 'generate', 'fuse', 'rank'"),
    ("step: rank", "step: rnak", "Did you mean 'rank'?"),
    ("model: b}\n", "model: b, kep: 1}\n", "6:28: unknown key 'kep' in layers[2][1]. Did you mean 'keep'?"),
    ("rank, model: b", "rank, model: c", "6:25: no model is named 'c'. There are: a, b."),
    ("rank, model: b", "rank, model: [a, b]", "6:25: a step 'rank' asks one model, not 2"),
    ("rank, model: b", "rank, model: []", "6:25: 'model' is an empty list"),
    ("generate, model: b", "generate, model: [a, a]", "5:62: 'a' is listed twice: for two drafts say samples: 2"),
    ("rank, model: b", "rank, model: b, keep: 3", "6:34: 3 of 2 drafts can't be kept"),
    ("rank, model: b", "rank, model: b, keep: 2", "6:5: the last layer leaves 2 drafts, an answer is one"),
    ("rank, model: b", "rank, model: b, samples: 2", "6:37: 'samples' has no effect on a step 'rank'"),
    (
        "rank, model: b",
        "fuse, model: b, window: 1",
        "6:36: 'window' is the number 1, expected greater than or equal to 2",
    ),
    (
        "{step: rank, model: b}",
        "[{step: rank, model: b}, {step: fuse, model: a}]",
        "6:6: a step 'rank' is a layer by itself",
    ),
    ("{step: rank, model: b}", "[]", "6:5: a layer without steps"),
    (
        "[{step: generate, model: a}, {step: generate, model: b}]",
        "{step: fuse, model: [a, b]}",
        "5:5: there is no draft yet to fuse",
    ),
    (", {step: generate, model: b}", "", "6:5: there is one draft before it: nothing to rank"),
    ("step: rank, model: b", "step: rank, model: a", None),
    ("[{step: generate, model: a}, {step: generate, model: b}]", "{step: generate, model: a, samples: 2}", None),
    ("step: rank, model: b", "step: fuse, model: b, window: 2, prompt: Mix.", None),
    ("name: b,", "name: A,", "3:12: the name 'A' is taken by another of the models"),
    ("org/b", "org/b, server: y", "3:37: 'y' is no URL"),
    ("org/b", "org/b, concurrency: 3", "3:42: 'concurrency' has no effect here: it is for a 'server'"),
    ("org/b", "org/b, sampling: {extra_body: {x: 1}}", "'extra_body' has no effect here: it is for a 'server'"),
    (", model: org/b", "", "3:5: the model 'b' has no 'model'"),
    ("org/b", "org/b, in_context: x.txt, sampling: {chat_template_kwargs: {a: 1}}", "without a template"),
    ("org/b}", "org/b}\n  - {name: c, model: org/c}", "4:12: no step asks the model 'c'"),
]


@pytest.mark.parametrize(("old", "new", "told"), WRONG)
def test_what_is_wrong_is_told(old: str, new: str, told: str | None, tmp_path: Path) -> None:
    assert old in SOUND
    path = tmp_path / "recipe.yml"
    path.write_text(SOUND.replace(old, new, 1))
    if told is None:
        load(path)
        return
    with pytest.raises(RecipeError) as refused:
        load(path)
    assert told in str(refused.value)


@pytest.mark.parametrize("path", SHIPPED, ids=lambda path: path.stem)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load(path)
    assert recipe.name == path.stem and path.read_text().startswith(f"# {path.name}\n")


def test_the_page_tells_of_all_keys_and_its_recipe_loads(tmp_path: Path) -> None:
    page = (ROOT / "docs" / "answer.md").read_text(encoding="utf-8")
    (text,) = re.findall(r"```yaml\n(# moa\.yml\n.*?)```", page, re.DOTALL)
    (tmp_path / "moa.yml").write_text(text)
    assert len(load(tmp_path / "moa.yml").layers) == 3
    tables = [dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\| ", part, re.MULTILINE)) for part in page.split("\n## ")]
    assert tables[0].keys() == AnswerRecipe.model_fields.keys()
    for name in ("name", "seed", "samples"):
        assert tables[0][name] == str(AnswerRecipe.model_fields[name].default)
    assert {kind: tuple(re.findall(r"`(\w+)`", keys)) for kind, keys in tables[1].items()} == KEYS
    assert all(f"`recipes/answer/{path.name}`" in page for path in SHIPPED)
    options = {
        option for command in re.findall(r"^    mergekit-lite (.*)$", page, re.MULTILINE) for option in command.split()
    }
    told = CliRunner().invoke(main, ["answer", "--help"]).output
    assert all(option in told for option in options if option.startswith("-"))


def test_paths_are_from_the_folder_of_the_recipe_and_must_be_there(tmp_path: Path) -> None:
    (tmp_path / "b").mkdir()
    text = SOUND.replace("org/b", "./b").replace("org/a", "./a").replace(', server: "http://x/v1"', "")
    (tmp_path / "recipe.yml").write_text(text.replace("{name: b,", "{name: b, in_context: urial.txt,"))
    model = load(tmp_path / "recipe.yml").by_name["b"]
    assert (model.model, model.in_context) == (str((tmp_path / "b").resolve()), tmp_path / "urial.txt")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "Why?"}\n')
    code, _, error = answer(tmp_path / "recipe.yml")
    assert code == 2
    assert f"the model a: {tmp_path / 'a'} is no folder" in error
    assert f"the model b: there is no file {tmp_path / 'urial.txt'}" in error
