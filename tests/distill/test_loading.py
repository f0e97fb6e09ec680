"""Recipes of distillations: everything that is wrong is told at once, with line and column."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from mergekit_lite.distillation.recipe.checks import unknown_domains
from mergekit_lite.distillation.recipe.loading import load, parse
from mergekit_lite.distillation.recipe.schema import TARGET
from mergekit_lite.errors import UsageError
from mergekit_lite.yaml_document import RecipeError
from tests.distill.recipes import recipe, write_recipe

SOUND = """\
folder: out
target: org/target
prompts:
  - path: p.jsonl
sources:
  - name: a
    model: org/a
scorers:
  - {name: rm, kind: reward, model: org/rm}
pairs: {rule: fusechat3, score: rm}
train:
  sft: {learning_rate: 1e-5}
"""

WRONG: list[tuple[str, str, str]] = [  # what is replaced in the sound one, by what, what is told
    ("target: org/target", "taget: org/target", "1:1: the recipe has no 'target'"),
    ("target: org/target", "taget: x", "2:1: unknown key 'taget' in the recipe. Did you mean 'target'?"),
    ("path: p.jsonl", "path: p.jsonl\n    domian: x", "5:5: unknown key 'domian' in prompts[1]. Did you mean"),
    ("model: org/a", "model: 7", "7:12: 'model' is the number 7, expected text: put it in quotes, if it is one"),
    ("model: org/a", "model: org/a\n    samples: yes", "8:14: 'samples' is yes, expected a whole number"),
    ("model: org/a", "model: org/a\n    samples: 2.5", "8:14: 'samples' is the number 2.5, expected a whole number"),
    ("model: org/a", "model: org/a\n    samples: 0", "8:14: 'samples' is the number 0, expected greater than or equal"),
    (
        "model: org/a",
        "model: org/a\n    sampling: {temprature: 1}",
        "8:16: unknown key 'temprature' in sampling. Did you mean 'temperature'?",
    ),
    ("model: org/a", "model: org/a\n    samples_for: {x: many}", "8:22: 'x' is the text 'many', expected a whole"),
    ("name: a", "name: a/../b", "6:11: 'name' is the text 'a/../b', expected letters, digits"),
    ("kind: reward", "kind: rewrad", "9:22: 'kind' is the text 'rewrad', expected 'code', 'exact'"),
    ("kind: reward", "kind: rewrad", "Did you mean 'reward'?"),
    ("1e-5", "-1e-5", "12:24: 'learning_rate' is the number -1e-5, expected greater than 0"),
    ("1e-5", ".inf", "12:24: .inf is no number to compute with"),
    ("1e-5}", "1e-5, lora: {target_modules: 3}}", "'target_modules' is the number 3, expected a list, or 'all-linear'"),
    ("score: rm}", "score: rm, gap: [1]}", "10:42: 'gap' has too few values"),
    ("folder: out", "folder: out\nfolder: in", "2:1: 'folder' is given twice, first in line 1"),
    ("  - name: a\n    model: org/a", "  []", "6:3: 'sources' is an empty list"),
    ("  sft: {learning_rate: 1e-5}", "  sft:", "'train' has none of sft, fuse, on_policy, preference"),
    ("path: p.jsonl", "path: p.jsonl\n    dataset: org/d", "4:5: prompts are given by exactly one of"),
    ("path: p.jsonl", "domain: x", "4:5: prompts are given by exactly one"),
    ("path: p.jsonl", "path: p.jsonl\n    nearest: {to: [], k: 1, model: m}", "5:19: 'to' is an empty list: name the"),
    ("path: p.jsonl", "path: p.jsonl\n    nearest: {to: [{path: t}], k: 1}", "5:14: embeddings are given by exactly"),
    ("path: p.jsonl", "path: p.jsonl\n    nearest: {to: [{limit: 1}], k: 1, model: m}", "5:20: prompts are given by"),
    ("path: p.jsonl", "path: p.jsonl\n    nearest: {to: [{path: t}], model: m}", "5:14: prompts[1].nearest has no 'k'"),
    ("path: p.jsonl", "path: p.jsonl\n    nearest: {too: [{path: t}]}", "5:15: unknown key 'too' in nearest. Did you"),
    (
        "path: p.jsonl",
        "path: p.jsonl\n    nearest: {to: [{path: t}], k: 1, column: c, batch_size: 2}",
        "5:61: 'batch_size' has no effect here: it is for a 'model'",
    ),
    ("path: p.jsonl", "magpie: {model: org/m}", "4:13: prompts[1].magpie has no 'number'"),
    ("path: p.jsonl", "magpie: {number: 3}", "4:13: 'magpie' has no 'model'"),
    ("path: p.jsonl", "magpie: {model: org/m, number: 0}", "4:36: 'number' is the number 0, expected greater than or"),
    ("path: p.jsonl", "magpie: {modle: org/m, number: 3}", "4:14: unknown key 'modle' in magpie. Did you mean 'model'"),
    ("path: p.jsonl", "path: p.jsonl\n    magpie: {model: m, number: 3}", "4:11: 'path' has no effect here: the"),
    (
        "path: p.jsonl",
        "magpie: {model: m, number: 3, sampling: {temperature: 0}}",
        "4:59: 'temperature' is the number 0, expected greater than 0",
    ),
    (
        "path: p.jsonl",
        "magpie: {model: m, number: 3, tokenizer: m}",
        "4:46: 'tokenizer' has no effect here: the model's own is used",
    ),
    ("path: p.jsonl", "magpie: {model: m, number: 3, engine: vllm}", "4:43: prompts aren't drawn by vllm in this"),
    ("path: p.jsonl", "magpie: {model: m, number: 3, in_context: x}", "4:47: 'in_context' has no effect here"),
    ("path: p.jsonl", "magpie: {model: m, number: 3, concurrency: 2}", "4:48: 'concurrency' has no effect here"),
    (
        "path: p.jsonl",
        "magpie: {model: m, number: 3}\n  - magpie: {model: n, number: 3}",
        "5:13: the name 'magpie' is taken by another of the prompts",
    ),
    (
        "path: p.jsonl",
        "magpie: {model: m, number: 3}\n    systems: {column: c}",
        "5:23: prompts that are drawn have no columns: give `texts`",
    ),
    ("path: p.jsonl", "path: p.jsonl\n    split: test", "5:12: 'split' has no effect on a file"),
    ("model: org/a", "model: org/a\n  - {name: A, model: x}", "8:12: the name 'A' is taken by another of the sources"),
    ("name: a", "name: a.partial", "6:11: the name 'a.partial' ends like a file that is not finished"),
    ("name: a", "name: target", "6:11: 'target' is the trained model's own name"),
    ("model: org/a", "model: org/a\n    concurrency: 3", "8:18: 'concurrency' has no effect here: it is for a"),
    (
        "model: org/a",
        "model: org/a\n    server: http://x/v1\n    batch_size: 3",
        "9:17: 'batch_size' has no effect here: a server decides that itself",
    ),
    (
        "model: org/a",
        "model: org/a\n    domains: [maths]\n    samples_for: {math: 3}",
        "9:25: samples for 'math', which is not among the source's 'domains'. Did you mean 'maths'?",
    ),
    (", model: org/rm", "", "9:5: a scorer of the kind 'reward' needs 'model'"),
    ("model: org/rm", "model: org/rm, weak: x", "9:51: 'weak' has no effect on a scorer of the kind 'reward'"),
    ("reward, model: org/rm", "function, model: mine", "9:39: 'mine': a function is given as module:function"),
    ("reward, model: org/rm", "judge, model: mine", "9:5: a scorer of the kind 'judge' needs 'server'"),
    ("reward, model: org/rm", "log_ratio, strong: x", "9:5: a scorer of the kind 'log_ratio' needs 'weak'"),
    ("reward, model: org/rm", "code", "9:5: a scorer of the kind 'code' needs 'allow_code'"),
    ("score: rm", "score: mr", "10:33: no scorer is named 'mr'"),
    ("score: rm", "score: [rm]", "10:33: 'score' is a list, expected the name of a scorer, or {mean: [NAME, NAME]}"),
    ("score: rm", "score: {meen: [rm]}", "10:34: unknown key 'meen' in score. Did you mean 'mean'?"),
    ("score: rm", "score: {mean: rm}", "10:40: 'mean' is the text 'rm', expected a list"),
    ("score: rm", "score: {mean: [rm, mr]}", "10:45: no scorer is named 'mr'. There are: rm."),
    ("score: rm", "score: {minimum: [rm, rm]}", "10:33: 'rm' is listed twice"),
    ("score: rm", "score: {mean: [rm], minimum: [rm]}", "10:33: several scorers rank by exactly one of 'mean' and"),
    ("score: rm", "score: {mean: [rm]}", "10:33: one scorer alone is named without mean: `score: NAME`"),
    ("score: rm", "score: rm, veto: {mr: 1}", "10:48: no scorer is named 'mr'"),
    ("score: rm", "score: rm, veto: {rm: much}", "10:48: 'rm' is the text 'much', expected a number"),
    ("score: rm", "score: rm, rip: {gap: 1, of: prompt}", "10:55: 'of' is the text 'prompt', expected 'pairs' or"),
    ("score: rm", "score: rm, sft_share: 1, rip: {gap: 1}", "10:56: 'rip' has no effect here: with sft_share 1"),
    ("fusechat3, score: rm", "as_is, rip: {gap: 1}", "10:27: 'rip' has no effect here: as_is compares no answers"),
    ("score: rm", "score: rm, rip: {of: prompts}", "10:42: it selects nothing: give `rejected_score`"),
    ("fusechat3, score: rm", "as_is, correct: rm", "10:31: 'correct' has no effect here: as_is takes each prompt's"),
    ("fusechat3, score: rm", "as_is, gap: [1, 2]", "10:27: 'gap' has no effect here: as_is takes each prompt's"),
    ("score: rm", "score: rm, domains: {x: {rule: as_is, chosen_score: 2}}", "10:78: 'chosen_score' has no effect"),
    ("score: rm", "score: rm, sft_rows: {by: lenth}", "10:52: 'by' is the text 'lenth', expected 'score', 'length'"),
    ("score: rm", "score: rm, sft_rows: {by: length}", "10:47: it selects nothing: give `least`, `top`, or"),
    ("score: rm", "score: rm, sft_rows: {top: 0}", "10:53: 'top' is the number 0, expected greater than or equal to 1"),
    ("score: rm", "score: rm, sft_share: 0, sft_rows: {top: 1}", "10:61: 'sft_rows' has no effect here"),
    ("fusechat3, score: rm", "as_is, sft_rows: {top: 1}", "10:32: rows are selected by score: name the scorer"),
    ("score: rm", "score: rm, sft_rows: {by: difficulty, top: 1}", "10:47: `by: difficulty` and `student:"),
    ("score: rm", "score: rm, sft_rows: {by: difficulty, top: 1, student: b}", "10:81: no source is named 'b'"),
    ("score: rm", "score: rm, sft_rows: {by: difficulty, top: 1, student: a}", "10:81: the student is the only source"),
    ("score: rm", "score: rm, sft_rows: {rising: true}", "10:56: no training reads rows in their order: give"),
    (
        "score: rm",
        "score: rm, sft_rows: {rising: true}, domains: {x: {sft_rows: {top: 2}}}",
        "10:87: `rising` orders the rows of all domains together",
    ),
    ("rule: fusechat3", "rule: wrpo", "target_source"),
    ("train:", "target_source: {name: own}\ntrain:", "11:23: this source is always called 'target'"),
    ("train:", "target_source: {model: own}\ntrain:", "11:24: the model of 'target_source' is the one that SFT makes"),
    ("train:", "target_source: {server: http://x}\ntrain:", "11:16: a 'server' needs the 'model'"),
    ("train:", "report: {scores: [rm, mr]}\ntrain:", "11:23: no scorer is named 'mr'. There are: rm."),
]  # fmt: skip


def problems(content: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        parse(content, "r.yaml", Path("/"))
    return [str(problem) for problem in error.value.problems]


def test_the_sound_recipe_is_sound() -> None:
    parse(SOUND, "r.yaml", Path("/"))


@pytest.mark.parametrize(("old", "new", "told"), WRONG)
def test_what_is_wrong_is_told_with_its_place(old: str, new: str, told: str) -> None:
    assert SOUND.count(old) == 1
    found = problems(SOUND.replace(old, new))
    assert any(told in problem for problem in found), found


def test_what_a_domain_inherits_has_an_effect_there() -> None:
    """``rip`` and ``sft_rows`` that are idle but in one domain."""
    pairs = "pairs: {rule: fusechat3, score: rm}"
    for idle, domain in (
        ("sft_share: 1, rip: {gap: 1}", "{sft_share: 0.5}"),
        ("sft_share: 0, sft_rows: {top: 1}", "{split: availability}"),
        ("sft_share: 0, sft_rows: {top: 1}", "{rule: as_is}"),
    ):
        made = SOUND.replace(pairs, f"pairs: {{rule: fusechat3, score: rm, {idle}, domains: {{x: {domain}}}}}")
        assert parse(made, "r.yaml", Path("/")).pairs.domains.keys() == {"x"}
        assert "has no effect here" in " ".join(problems(made.replace(domain, "{gap: [0, 1]}")))


def test_all_problems_are_told_at_once() -> None:
    content = SOUND.replace("name: a", "nam: a").replace("kind: reward", "kind: x").replace("1e-5", "fast")
    assert [problem.split(": ")[0] for problem in problems(content)] == ["6:5", "6:5", "9:22", "12:24"]
    content = SOUND.replace("score: rm", "score: x").replace("path: p.jsonl", "split: test")
    assert [problem.split(": ")[0] for problem in problems(content)] == ["4:5", "10:33"]


@pytest.mark.parametrize("content", ["", "- a", "a: [", "x: &a [*a]", "3"])
def test_what_is_no_mapping_is_refused(content: str) -> None:
    assert problems(content)


def test_paths_are_those_of_the_recipes_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    place = tmp_path / "place"
    (place / "there").mkdir(parents=True)
    changes: dict[str, Any] = {
        "sources": [
            {"name": "a", "model": "there"},
            {"name": "b", "model": "org/b"},
            {"name": "c", "model": "../c"},
            {"name": "d", "model": "there", "server": "http://x/v1"},
        ],
        "scorers": [{"name": "right", "kind": "reward", "model": "./rm"}, {"name": "x", "kind": "exact"}],
        "report": {"prompts": [{"path": "held.jsonl"}, {"dataset": "org/d"}]},
        "train": {"preference": {"learning_rate": 1e-5, "objective": "dpo", "reference": "there"}},
    }
    write_recipe(place, **changes)
    monkeypatch.chdir(tmp_path)
    made = load(Path("place/recipe.yaml"))
    assert made.folder == place / "out" and made.target == str(place / "target")
    assert made.prompts[0].path == place / "prompts.jsonl"
    assert [source.model for source in made.sources] == [str(place / "there"), "org/b", str(tmp_path / "c"), "there"]
    assert made.scorers[0].model == str(place / "rm")
    assert made.train.preference is not None and made.train.preference.reference == str(place / "there")
    assert [prompts.path for prompts in made.report.prompts] == [place / "held.jsonl", None]


def test_the_targets_own_source_needs_no_name_and_no_model(tmp_path: Path) -> None:
    changes = {"pairs": {"rule": "wrpo", "score": "right"}, "target_source": {"samples": 3}}
    own = recipe(tmp_path, **changes).target_source
    assert own is not None and (own.name, own.samples) == (TARGET, 3)


def test_a_domain_without_prompts_is_refused(tmp_path: Path) -> None:
    made = recipe(
        tmp_path,
        sources=[{"name": "a", "model": "m", "domains": ["math", "code"]}],
        scorers=[{"name": "right", "kind": "exact", "domains": ["poems"]}],
        pairs={"rule": "best_worst", "score": "right", "domains": {"poems": {"rule": "as_is"}}},
    )
    with pytest.raises(UsageError) as error:
        unknown_domains(made, ["maths", "code"])
    told = str(error.value)
    assert "the source a: no prompt is of the domain 'math'. Did you mean 'maths'?" in told
    assert "the scorer right" in told and "pairs.domains" in told and "'code'" in told.splitlines()[0]
    assert "the domain 'code'" not in told
    unknown_domains(made, ["math", "code", "poems"])


def test_a_recipe_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match="Can't read the recipe"):
        load(tmp_path / "none.yaml")
