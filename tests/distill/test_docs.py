"""docs/distill.md is true: its recipe loads and plans, its commands are there, its tables are complete."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import get_args

import pytest
import yaml
from click.testing import CliRunner

from docs import distill as page_of_distill
from mergekit_lite.answers.scoring import scorer
from mergekit_lite.commands import main
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.objectives import OBJECTIVES
from mergekit_lite.distillation.recipe.loading import load
from mergekit_lite.distillation.recipe.schema import Rule
from tests.distill.recipes import write_recipe

ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "distill.md").read_text(encoding="utf-8")
YAML = {name: text for text, name in re.findall(r"```yaml\n(# (\S+\.yaml)\n.*?)```", PAGE, re.DOTALL)}
COMMANDS = re.findall(r"^    mergekit-lite (.*?)(?:  +#.*)?$", PAGE, re.MULTILINE)


def first_column(heading: str) -> set[str]:
    """The names in code in the first column of a section's first table."""
    section = PAGE.split(f"\n## {heading}")[1].split("\n## ")[0]
    return set(re.findall(r"^\| `([a-z_0-9]+)` \|", section, re.MULTILINE))


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


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command: str) -> None:
    """They exist, with the options that the page gives, and the recipes that it names are there."""
    *verbs, recipe = [word for word in command.split() if not word.startswith("-")]
    found = CliRunner().invoke(main, [*verbs, "--help"])
    assert found.exit_code == 0, found.output
    assert all(option in found.output for option in re.findall(r"--[a-z-]+", command))
    assert recipe == "distill.yaml" or (ROOT / recipe).exists()


def test_the_tables_tell_of_all() -> None:
    assert len(COMMANDS) == 9
    assert first_column("Rules") == set(get_args(Rule))
    assert first_column("Scorers") == set(scorer.names())
    assert first_column("Objectives") == set(OBJECTIVES)
    assert page_of_distill.page() == PAGE, "run: python -m docs.distill"


def test_the_files_are_those_of_the_folder() -> None:
    folder = Folder(Path())
    files = [folder.prompts, folder.samples("SOURCE"), folder.scores("SCORER", "SOURCE")]
    files += [folder.pairs(name) for name in ("sft", "preference", "target", "dropped")]
    assert all(f"| `{file}` |" in PAGE for file in files)


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
    (block,) = re.findall(r"```yaml\n(sources:\n.*?)```", PAGE, re.DOTALL)
    loaded = load(write_recipe(tmp_path, **yaml.safe_load(block)))
    assert [source.is_served for source in loaded.sources] == [True, True, False]
    assert loaded.target_source is not None and loaded.target_source.serve
