"""The pages on distill are true: recipes load and plan, commands are there, tables are complete, links lead on."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from click.testing import CliRunner
from pydantic.fields import FieldInfo

from docs import training as page_of_training
from mergekit_lite.answers.asking import Sampling
from mergekit_lite.answers.scoring import scorer
from mergekit_lite.commands import main
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.objectives.preference import OBJECTIVES
from mergekit_lite.distillation.recipe.choosing import Distinct, Magpie, Nearest, SftRows, Written
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.distillation.recipe.schema import (
    Fuse,
    Lora,
    Preference,
    RecipeSource,
    RecipeTeacher,
    Rounds,
    Rule,
    Sft,
    Train,
    Training,
)
from tests.distill.recipes import recipe_data, write_recipe

ROOT = Path(__file__).parents[2]
PAGES = {
    name: (ROOT / "docs" / f"{name}.md").read_text(encoding="utf-8") for name in ("distill", "sources", "training")
}
PAGE = "\n".join(PAGES.values())
YAML = {name: text for text, name in re.findall(r"```yaml\n(# (\S+\.yaml)\n.*?)```", PAGE, re.DOTALL)}
COMMANDS = re.findall(r"^    mergekit-lite (.*?)(?:  +#.*)?$", PAGE, re.MULTILINE)


def section(heading: str) -> str:
    return PAGE.split(f"\n## {heading}\n")[1].split("\n## ")[0]


def first_column(heading: str) -> set[str]:
    """The names in code in the first column of a section's first table."""
    return set(re.findall(r"^\| `([a-z_0-9]+)` \|", section(heading), re.MULTILINE))


def own(training: type[Training]) -> dict[str, FieldInfo]:
    """The keys that one kind of training has beside those of all."""
    return {name: field for name, field in training.model_fields.items() if name not in Training.model_fields}


def test_the_recipe_plans(tmp_path: Path) -> None:
    (tmp_path / "distill.yaml").write_text(YAML["distill.yaml"])
    prompts = [json.dumps({"prompt": f"Question {number}?"}) for number in range(9)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    result = CliRunner().invoke(main, ["distill", "run", str(tmp_path / "distill.yaml"), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    (domain,) = json.loads(result.output)["domains"]
    assert (domain["domain"], domain["prompts"], domain["sft"]) == ("chat", 9, 3)
    recipe = load(tmp_path / "distill.yaml")
    assert recipe.folder == tmp_path / "made"


def test_the_recipe_of_rounds_plans(tmp_path: Path) -> None:
    (tmp_path / "rounds.yaml").write_text(YAML["rounds.yaml"])
    prompts = [json.dumps({"prompt": f"Question {number}?"}) for number in range(30)]
    (tmp_path / "prompts.jsonl").write_text("\n".join(prompts))
    result = CliRunner().invoke(main, ["distill", "run", str(tmp_path / "rounds.yaml"), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    assert [(each["prompts"], each["replayed"]) for each in json.loads(result.output)["rounds"]] == [
        *((10, 0), (10, 3), (10, 4))
    ]


def test_the_recipe_that_draws_plans(tmp_path: Path) -> None:
    (tmp_path / "magpie.yaml").write_text(YAML["magpie.yaml"])
    result = CliRunner().invoke(main, ["distill", "run", str(tmp_path / "magpie.yaml"), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    (domain,) = json.loads(result.output)["domains"]
    assert (domain["domain"], domain["prompts"], domain["sft"]) == ("chat", 100_000, 30_000)
    keys = set(Magpie.model_fields)
    assert first_column("Prompts that a model draws") <= keys
    told = dict(re.findall(r"^\| `(\w+)` \| (\w+) \|", section("Prompts that a model draws"), re.MULTILINE))
    assert told["early_stopping"] == str(Magpie.model_fields["early_stopping"].default).lower()
    assert told["name"] == Magpie.model_fields["name"].default


def test_the_recipe_that_has_prompts_written_plans(tmp_path: Path) -> None:
    (tmp_path / "written.yaml").write_text(YAML["written.yaml"])
    for name in ("skills", "kinds"):
        (tmp_path / f"{name}.txt").write_text("one\ntwo\nthree\n")
    result = CliRunner().invoke(main, ["distill", "run", str(tmp_path / "written.yaml"), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    assert [domain["prompts"] for domain in json.loads(result.output)["domains"]] == [4000]
    told = dict(re.findall(r"^\| `(\w+)` \| (\w*) ?\|", section("Prompts that a model writes"), re.MULTILINE))
    assert told.keys() <= Written.model_fields.keys() and told["name"] == Written.model_fields["name"].default
    *_, block = re.findall(r"```yaml\n(.*?)```", section("Prompts that a model writes"), re.DOTALL)
    entry = {"written": {"model": "m", "server": "http://x/v1", "number": 3, **yaml.safe_load(block)}}
    assert load(write_recipe(tmp_path, prompts=[entry])).prompts[0].called == "written"


def test_the_recipes_of_given_data_load(tmp_path: Path) -> None:
    answers, rows = re.findall(r"```yaml\n(.*?)```", section("Data that are there"), re.DOTALL)
    train = "train: {sft: {learning_rate: 1.0e-5}, preference: {objective: dpo, learning_rate: 1.0e-6}}\n"
    common = f"folder: made\ntarget: ./small\n{train}"
    (tmp_path / "a.yaml").write_text(common + answers + "pairs: {rule: best_worst, score: overall}\n")
    (tmp_path / "b.yaml").write_text(common + rows)
    assert [source.name for source in load(tmp_path / "a.yaml").sources] == ["gpt-4", "falcon"]
    given = load(tmp_path / "b.yaml").rows
    assert given is not None and given.preference[0].split == "train_prefs"


def test_the_recipes_that_select_load(tmp_path: Path) -> None:
    """Each block in a recipe that has the scorers it names, and some source."""
    blocks = re.findall(r"```yaml\n(.*?)```", section("Selecting prompts and rows"), re.DOTALL)
    blocks += re.findall(r"```yaml\n(.*?)```", section("Prompts near others"), re.DOTALL)
    scorers = [{"name": name, "kind": "exact"} for name in ("right", "judge", "helpful", "honest")]
    loaded = [load(write_recipe(tmp_path, **{"scorers": scorers, **yaml.safe_load(block)})) for block in blocks]
    least = [recipe.pairs.sft_rows.least for recipe in loaded]
    assert least == [4.5, None, 8, 1, 2, None, None]
    assert [bool(recipe.prompts[0].nearest) for recipe in loaded] == [False] * 6 + [True]


def test_the_recipes_without_a_judge_and_of_an_aggregate_plan(tmp_path: Path) -> None:
    """Those that go on, cross, ask for worse, refine, and ask several models; what a block lacks is added."""
    blocks = re.findall(r"```yaml\n(.*?)```", section("Pairs without a judge"), re.DOTALL)
    blocks += re.findall(r"```yaml\n(.*?)```", section("Answers that go on from others"), re.DOTALL)
    page_of_answers = (ROOT / "docs" / "answer.md").read_text(encoding="utf-8")
    blocks += re.findall(r"  ```yaml\n(  sources:.*?)  ```", page_of_answers, re.DOTALL)
    (tmp_path / "prompts.jsonl").write_text("".join(f'{{"prompt": "Question {n}?"}}\n' for n in range(8)))
    for model in ("small", "target"):
        (tmp_path / model).mkdir()
    preference = {"scorers": [], "train": {"preference": {"objective": "dpo", "learning_rate": 5e-7}}}
    sft = {"scorers": [], "pairs": {"rule": "as_is"}}
    planned = []
    for block in map(yaml.safe_load, blocks):
        path = tmp_path / "recipe.yaml"
        path.write_text(yaml.safe_dump(recipe_data(**(preference if "pairs" in block else sft)) | block))
        result = CliRunner().invoke(main, ["distill", "run", str(path), "--dry-run", "--json"])
        assert result.exit_code == 0, result.output
        (domain,) = json.loads(result.output)["domains"]
        planned.append((domain["rule"], domain["prompts"], domain["sft"], domain["preference"]))
    assert planned == [
        ("crossed", 24, 12, 12),
        *[("asked", 8, 0, 8)] * 2,
        ("best_worst", 8, 0, 8),
        ("as_is", 8, 8, 0),
    ]


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str) -> None:
    """They exist, with the options that the page gives, and the recipes that it names are there."""
    *verbs, recipe = command.partition(" -")[0].split()
    found = CliRunner().invoke(main, [*verbs, "--help"])
    assert found.exit_code == 0, found.output
    assert all(option in found.output for option in re.findall(r"--[a-z-]+", command))
    assert recipe == "distill.yaml" or (ROOT / recipe).exists()


def test_the_tables_tell_of_all() -> None:
    assert len(COMMANDS) == 10
    assert first_column("Rules: from scores to rows") == set(get_args(Rule))
    assert first_column("Scorers") == set(scorer.names())
    assert first_column("Objectives") == set(OBJECTIVES)
    assert page_of_training.page() == PAGES["training"], "run: python -m docs.training"


def test_the_files_are_those_of_the_folder() -> None:
    folder = Folder(Path())
    files = [
        folder.prompts,
        folder.drawn("NAME"),
        folder.written("NAME"),
        folder.samples("SOURCE"),
        folder.scores("SCORER", "SOURCE"),
    ]
    files += [folder.pairs(name) for name in ("sft", "preference", "target", "dropped")]
    assert all(f"| `{file}` |" in PAGE for file in files)
    assert all(f"`{folder.trained(name)}/`" in PAGE for name in Train.model_fields)
    assert f"| `{folder.taught('TEACHER')}/` |" in PAGE


def test_accelerate_reads_its_configuration(tmp_path: Path) -> None:
    from accelerate.commands.config.config_args import load_config_from_file

    (tmp_path / "fsdp.yaml").write_text(YAML["fsdp.yaml"])
    config = load_config_from_file(str(tmp_path / "fsdp.yaml"))
    assert config.num_processes == 8 and config.fsdp_config["fsdp_version"] == 2
    launched = re.findall(r"^    accelerate launch (.*)$", PAGE.replace("\\\n", ""), re.MULTILINE)
    from accelerate.commands.launch import launch_command_parser

    for line in launched:
        known = launch_command_parser().parse_args(line.split())
        assert known.training_script == "mergekit_lite" and known.training_script_args[:2] == ["distill", "train"]
    assert len(launched) == 2


def test_the_sources_load(tmp_path: Path) -> None:
    (block,) = re.findall(r"```yaml\n(sources:\n  - name: strong\n.*?)```", PAGE, re.DOTALL)
    loaded = load(write_recipe(tmp_path, **yaml.safe_load(block)))
    assert [source.is_served for source in loaded.sources] == [True, True, False]
    assert loaded.target_source is not None and loaded.target_source.serve


@pytest.mark.parametrize(
    ("heading", "keys"),
    [
        ("Keys of a source", RecipeSource.model_fields),
        ("Keys of a training", Training.model_fields),
        ("Keys of fusing", own(Fuse)),
        ("Keys of SFT", own(Sft)),
        ("Keys of preference training", own(Preference)),
        ("Teachers", RecipeTeacher.model_fields),
        ("Rounds", Rounds.model_fields),
        ("Prompts near others", Nearest.model_fields),
        ("Prompts unlike each other", Distinct.model_fields),
        ("Selecting prompts and rows", SftRows.model_fields),
    ],
)
def test_keys_have_the_defaults_that_the_pages_tell(heading: str, keys: dict[str, FieldInfo]) -> None:
    told = dict(re.findall(r"^\| `(\w+)` \| (.*?) ?\| ", section(heading), re.MULTILINE))
    assert told.keys() == keys.keys()
    for name, default in told.items():
        if default:
            assert default == _told(keys[name].default), name
        else:
            assert keys[name].is_required() or name in ("model", "sampling")
    temperature, top_p, most = (Sampling.model_fields[name].default for name in ("temperature", "top_p", "max_tokens"))
    assert f"`temperature` {temperature}, `top_p` {top_p}, `max_tokens` {most}" in PAGES["sources"]
    lora = {name: field.default for name, field in Lora.model_fields.items()}
    assert (lora["rank"], lora["alpha"], lora["dropout"], lora["target_modules"]) == (16, 32, 0, "all-linear")
    assert "`rank` is 16,\n`alpha` 32, `dropout` 0 and `target_modules` all linear layers" in PAGES["training"]


def _told(default: object) -> str:
    if isinstance(default, bool):
        return str(default).lower()
    return "none" if default is None or default in ((), {}) else str(default)


def test_links_and_named_files_are_there() -> None:
    """Within the pages on distill, and to them from everywhere in the docs."""
    docs = {path: path.read_text(encoding="utf-8") for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]}
    anchors = {
        path.resolve(): {
            re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-")
            for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
        }
        for path, text in docs.items()
    }
    for path, text in docs.items():
        for to, anchor in re.findall(r"\]\(([\w./-]*\.md)?(?:#([\w-]+))?\)", text):
            found = (path.parent / to).resolve() if to else path.resolve()
            if found in anchors:
                assert not anchor or anchor in anchors[found], f"{path.name}: {to}#{anchor}"
            else:
                assert found.exists(), f"{path.name}: {to}"
    for named in re.findall(r"`(?:pytest -m slow\s)?(tests/[\w/.]+)`", PAGE):
        assert (ROOT / named).exists(), named
