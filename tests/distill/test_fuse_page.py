"""The page on fusing is true: its recipe loads, its figure and its costs are the code's."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerBase

from demo.distill.models import sample_text
from demo.fuse.models import FAMILIES
from docs import fuse
from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.alignment.groups import groups
from mergekit_lite.distillation.alignment.spans import response_ends
from mergekit_lite.distillation.objectives.distances import DISTANCES
from mergekit_lite.distillation.recipe.loading import load

PAGE = fuse.PAGE.read_text(encoding="utf-8")
EXAMPLES = {name: text for text, name in re.findall(r"```yaml\n(# (\S+\.yml)\n.*?)```", PAGE, re.DOTALL)}


def cells(first: str) -> list[str]:
    """The cells of the row of a table that begins with these words, but for the first."""
    (row,) = re.findall(rf"^\| {first} \| (.*) \|$", PAGE, re.MULTILINE)
    return [cell.strip() for cell in row.split(" | ")]


def test_the_recipe_loads(tmp_path: Path) -> None:
    path = tmp_path / "fuse.yml"
    path.write_text(EXAMPLES["fuse.yml"])
    recipe = load(path)
    assert [teacher.top for teacher in recipe.teachers] == [128, 20]
    assert [*recipe.train.stages] == ["fuse"] and PAGE.count("```yaml") == len(EXAMPLES)


@pytest.mark.parametrize("name", ["student", "gemma"])
def test_the_text_is_aligned_as_the_figure_shows(name: str) -> None:
    text, rows = "7+4=11", {}
    for each in ("student", "gemma"):
        template = ChatTemplate(tokenizer(each))
        tokens = template.tokens([{"role": "user", "content": "add 7+4"}], text).response
        ends = response_ends(template.tokenizer, tokens, text)
        assert ends is not None
        rows[each] = (template.tokenizer.convert_ids_to_tokens(list(tokens)), ends)
    met = groups(rows["student"][1], rows["gemma"][1])
    numbers = met.student if name == "student" else met.teacher
    spelled = [[token for token, number in zip(rows[name][0], numbers, strict=True) if number == group]
               for group in range(met.count)]  # fmt: skip
    told = cells("student" if name == "student" else "teacher gemma")
    assert [re.findall(r"`([^`]+)`", cell) for cell in told[:-1]] == spelled[:-1]
    read = [max(end for end, number in zip(rows[name][1], numbers, strict=True) if number == group)
            for group in range(met.count)]  # fmt: skip
    assert cells("bytes read after it") == [*map(str, read[:-1]), "end"] and read[-1] == len(text) + 1


def tokenizer(name: str) -> PreTrainedTokenizerBase:
    return FAMILIES[name].tokenizer(sample_text(0))


def test_costs_are_the_codes_own() -> None:
    assert fuse.page() == PAGE, "run: python -m docs.fuse"
    assert fuse.bytes_per_token(128, 151_936) <= 300


def test_the_objectives_that_it_names_are_there() -> None:
    advice = PAGE.split("## Which method when")[1].split("## A recipe")[0]
    named = ["forward_kl", "reverse_kl", "jsd", "p_kl", "alm", "gold", "uld", "cross_entropy"]
    assert all(f"`{name}`" in advice and name in DISTANCES for name in named)
