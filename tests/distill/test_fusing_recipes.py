"""What is wrong with teachers and with the trainings that learn from them is told at once, with its place."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from mergekit_lite.commands import main
from mergekit_lite.distillation.distilling import distill
from mergekit_lite.distillation.recipe.loading import parse
from mergekit_lite.distillation.train import check
from mergekit_lite.errors import UsageError
from mergekit_lite.yaml_document import RecipeError
from tests.distill.recipes import recipe, write_recipe
from tests.distill.teaching_models import other_teacher
from tests.distill.training import target

SOUND = """folder: out
target: ./target
rows: {sft: [{path: rows.jsonl}]}
teachers:
  - name: pivot
    model: ./target
  - name: big
    model: org/big
    server: http://localhost:8001/v1
  - name: other
    model: ./other
    top: 10
train:
  fuse: {learning_rate: 1.0e-5, objective: cross_entropy, combine: min_ce}
"""
WRONG = [
    ("  fuse: {", "  sft: {learning_rate: 1}\n  fusing: {", "unknown key 'fusing' in train. Did you mean 'fuse'?"),
    ("cross_entropy", "cross_entropie", "there is no objective 'cross_entropie' of distributions. Did you mean"),
    ("combine: min_ce", "options: {topp: 3}", "objective cross_entropy has no option 'topp'. Did you mean 'top'?"),
    ("combine: min_ce", "options: {top: 0}", "objective cross_entropy, option top: Input should be greater than 0"),
    ("combine: min_ce", "combine: min", "'combine' is the text 'min', expected 'sum', 'min_ce' or 'avg_ce'"),
    ("top: 10", "top: 0", "12:10: cross_entropy needs distributions, and top: 0 keeps none of other: keep 10 to 128"),
    ("top: 10", "concurrency: 3", "12:18: 'concurrency' has no effect here: it is for a 'server'"),
    ("localhost", "me@localhost", "9:13: URLs are shown and logged"),
    ("name: big", "name: Other", "10:11: the name 'other' is taken by another of the teachers"),
    ("model: org/big", "model: org/big\n    device: cpu", "9:13: 'device' has no effect here: a server decides that"),
    ("model: ./other", "model: ./target", "5:3: pivot and other are both the target itself: name it once"),
    ("combine: min_ce", "pairwise: {parameters: {select: 1}}",
     "14:82: sce takes no parameter 'select'. Did you mean 'select_topk'?"),
    ("cross_entropy, combine: min_ce", "alm, vocabulary: exact", "'vocabulary' has no effect here: alm maps no tokens"),
    ("  fuse: {learning_rate: 1.0e-5, objective: cross_entropy, combine: min_ce}", "  sft: {learning_rate: 1}",
     "5:3: 'teachers' has no effect here: 'train' has neither 'fuse' nor 'on_policy'"),
    ("rows: {sft: [{path: rows.jsonl}]}", "rows: {}", "'train' has 'fuse', 'rows' has no 'sft' for it"),
]  # fmt: skip
ALONE = SOUND.replace(SOUND[SOUND.index("  - name: big") : SOUND.index("train:")], "")


def problems(content: str) -> list[str]:
    with pytest.raises(RecipeError) as error:
        parse(content, "r.yaml", Path("/"))
    return [str(problem) for problem in error.value.problems]


def test_sound_ones_are_sound() -> None:
    assert [teacher.model for teacher in parse(SOUND, "r.yaml", Path("/")).teachers] == ["/target", "org/big", "/other"]
    parse(SOUND.replace("min_ce", "sum"), "r.yaml", Path("/"))
    parse(SOUND.replace("min_ce", "min_ce, pairwise: {merge_method: varm}"), "r.yaml", Path("/"))
    parse(ALONE.replace("min_ce", "sum"), "r.yaml", Path("/"))


@pytest.mark.parametrize(("old", "new", "told"), WRONG)
def test_what_is_wrong_is_told_with_its_place(old: str, new: str, told: str) -> None:
    assert SOUND.count(old) == 1
    found = problems(SOUND.replace(old, new))
    assert any(told in problem for problem in found), found


def test_choosing_needs_a_choice() -> None:
    (told,) = problems(ALONE)
    assert "min_ce chooses among teachers, and there is one: name the target among the teachers" in told
    without = SOUND.replace("./target\n  - name: big", "./third\n  - name: big")
    (told,) = problems(without.replace("min_ce", "avg_ce, pairwise: {}"))
    assert "with 'pairwise' avg_ce chooses between the pivot and one" in told
    (told,) = problems(ALONE.replace("min_ce", "sum, pairwise: {}"))
    assert "'pairwise' merges a student of each teacher, and there is one" in told
    (told,) = problems(ALONE[: ALONE.index("teachers:")] + ALONE[ALONE.index("train:") :].replace("min_ce", "sum"))
    assert "'fuse' learns from 'teachers', and the recipe has none" in told


def test_a_vocabulary_of_its_own_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    target(tmp_path / "target")
    other_teacher(tmp_path / "other")
    rows = [{"messages": [{"role": "user", "content": "one"}], "response": "two"}] * 3
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    content = SOUND.replace("cross_entropy", "forward_kl").replace("org/big", "target")
    with pytest.raises(UsageError) as caught:
        check(parse(content, "r.yaml", tmp_path))
    assert "train.fuse: forward_kl needs the target's own vocabulary, and other" in str(caught.value)
    assert "pivot" not in str(caught.value) and "alm" in str(caught.value)
    check(parse(content.replace("./other", "./target/."), "r.yaml", tmp_path))


def test_a_projection_by_a_tokenizer_that_cuts_no_texts_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    """One of Python alone, as T5's for bytes."""
    from transformers import ByT5Tokenizer

    target(tmp_path / "target")
    ByT5Tokenizer().save_pretrained(tmp_path / "other")
    content = SOUND.replace("cross_entropy, combine: min_ce", "p_kl").replace("org/big", "target")
    with pytest.raises(UsageError, match=r"p_kl needs tokenizers of the package tokenizers.*other \(.*alm"):
        check(parse(content, "r.yaml", tmp_path))


def test_a_dry_run_tells_what_teachers_cost(tmp_path: Path) -> None:
    target(tmp_path / "target")
    (tmp_path / "prompts.jsonl").write_text("\n".join(json.dumps({"prompt": f"{n}?"}) for n in range(10)))
    teachers = [
        {"name": "pivot", "model": "./target", "top": 0},
        {"name": "big", "model": "org/big", "server": "http://localhost:1/v1"},
        {"name": "maths", "model": "org/maths", "domains": ["maths"], "top": 10},
    ]
    train = {"fuse": {"learning_rate": 1e-5, "objective": "alm", "batch_size": 2}}
    pairs = {"rule": "best_worst", "score": "right", "sft_share": 1}
    path = write_recipe(tmp_path, teachers=teachers[:2], train=train, pairs=pairs)
    result = CliRunner().invoke(main, ["distill", "run", str(path), "--dry-run", "--json"])
    assert result.exit_code == 0, result.output
    plan = json.loads(result.output)
    pivot, big = plan["teachers"]
    assert (pivot["rows"], pivot["done"], pivot["where"], big["where"]) == (
        *(10, 0, "in this process"), "http://localhost:1/v1",
    )  # fmt: skip
    assert 0 < pivot["bytes"] < big["bytes"] <= 10 * 400 * 300
    assert big["exaflops"] is None and pivot["exaflops"] > 0
    assert plan["training"] == [{"stage": "fuse", "rows": 10, "steps": 5}]
    fuse = train["fuse"] | {"pairwise": {}}
    more = {"name": "more", "model": "org/more", "server": "http://localhost:2/v1"}
    path = write_recipe(tmp_path, teachers=[*teachers[:2], more], train={"fuse": fuse}, pairs=pairs)
    result = CliRunner().invoke(main, ["distill", "run", str(path), "--dry-run", "--json"])
    students = [{"stage": f"fuse-{name}", "rows": 10, "steps": 5} for name in ("big", "more")]
    assert json.loads(result.output)["training"] == students
    path = write_recipe(tmp_path, teachers=teachers[:2], train=train, pairs=pairs)
    shown = CliRunner().invoke(main, ["distill", "run", str(path), "--dry-run"])
    assert "at 400 tokens a response" in shown.output and "EFLOP" in shown.output
    wrong = write_recipe(tmp_path, teachers=teachers, train=train, pairs=pairs)
    refused = CliRunner().invoke(main, ["distill", "run", str(wrong), "--dry-run"])
    assert refused.exit_code == 2 and "the teacher maths: no prompt is of the domain 'maths'" in refused.output


def test_on_policy_alone_needs_prompts_and_teachers_alone(tmp_path: Path) -> None:
    train = {"on_policy": {"learning_rate": 1e-5}}
    found = recipe(tmp_path, train=train, teachers=[{"name": "a", "model": "org/a"}])
    assert not found.train.reads_rows
    content = "folder: out\ntarget: t\nprompts: [{path: p.jsonl}]\ntrain: {on_policy: {learning_rate: 1}}\n"
    parse(content + "teachers: [{name: a, model: org/a}]\n", "r.yaml", tmp_path)
    assert "4:20" in problems(content)[0] and "'on_policy' learns from 'teachers'" in problems(content)[0]


def test_teachers_of_on_policy_training_are_looked_at_before_anything_is_asked(tmp_path: Path) -> None:
    target(tmp_path / "target")
    (tmp_path / "empty").mkdir()
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "1?"}))
    train = "{on_policy: {learning_rate: 1.0e-5, batch_size: 1, sampling: {max_tokens: 8}}}"
    path = tmp_path / "r.yaml"
    path.write_text(
        f"folder: out\ntarget: ./target\nprompts: [{{path: prompts.jsonl}}]\ntrain: {train}\n"
        "teachers: [{name: strong, model: ./empty}]\n"
    )
    with pytest.raises(UsageError, match=r"(?s)Teachers can't teach.*strong: "):
        distill(path)
    assert not (tmp_path / "out").exists()


def test_a_dry_run_of_on_policy_training_alone_counts_no_rows(tmp_path: Path) -> None:
    target(tmp_path / "target")
    (tmp_path / "prompts.jsonl").write_text(json.dumps({"prompt": "1?"}))
    train = "{on_policy: {learning_rate: 1.0e-5, batch_size: 1, rounds: 3, sampling: {max_tokens: 8}}}"
    path = tmp_path / "r.yaml"
    path.write_text(
        f"folder: out\ntarget: ./target\nprompts: [{{path: prompts.jsonl}}]\ntrain: {train}\n"
        "teachers: [{name: strong, model: ./target}]\n"
    )
    result = CliRunner().invoke(main, ["distill", "run", str(path), "--dry-run"])
    assert result.exit_code == 0, result.output
    assert "SFT rows" not in result.output and "scored by" not in result.output
    assert [line.split() for line in result.output.splitlines() if line.startswith("on_policy")] == [
        ["on_policy", "3", "3"]
    ]
