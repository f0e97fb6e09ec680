"""The demo of merging: its models, recipes and questions, and the page's finding."""

import json
import random
import re
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from demo.distill import making, models
from demo.distill.making import Lesson
from demo.distill.results import Measured
from demo.distill.skills import SKILLS, is_held_out, is_right
from demo.merge import page
from demo.merge.__main__ import adapters, boosts, document, fine_tunes, statistics, whole_models, write_questions
from demo.merge.pictures import BLUE, GREEN, GREY, ORANGE, colour_of
from demo.merge.plan import BOOSTED, LEFT_OUT, QUICK, RANK, Files, density, merges, weights
from mergekit_lite.boosting.candidates.tunable import parse
from mergekit_lite.checkpoint.statistics_file import open_statistics
from mergekit_lite.commands import main as mergekit_lite
from mergekit_lite.methods import METHODS
from mergekit_lite.multimerge import plan_documents
from mergekit_lite.recipe.documents import parse_documents

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`")  # peft's use of transformers


def test_every_method_that_takes_three_fine_tunes_runs_by_what_the_plan_gives_or_is_left_out():
    for name, method in METHODS.items():
        if method.counts(3) and name not in LEFT_OUT:
            given = {**weights(method), **density(method)}
            method.resolve(given, 3, method.base == "required")  # else say why in LEFT_OUT
            assert name in merges()
    assert merges()[0] == page.AVERAGE and {*BOOSTED} <= {*merges()}


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The demo's folder with models of random weights, and an adapter, each made by the command of a lesson."""
    out = Files(tmp_path_factory.mktemp("merge"), (0,))
    skills = tuple(SKILLS)
    lessons = [Lesson(out.base(0), "demo.distill.models:target", skills, 2), *fine_tunes(out, replace(QUICK, tuned=2))]
    for lesson in lessons:
        if lesson.out != out.joint(0):
            words = lesson.job().command
            done = CliRunner().invoke(making.main, words[words.index("demo.distill.making") + 1 :])
            assert done.exit_code == 0, done.output
    write_questions(out, QUICK)
    for job in statistics(out):
        done = CliRunner().invoke(mergekit_lite, list(job.command[job.command.index("mergekit_lite") + 1 :]))
        assert done.exit_code == 0, done.output
    return out


def test_fine_tunes_are_of_their_base_and_adapters_of_their_rank(out):
    config = json.loads((out.adapter(0, "add") / "adapter_config.json").read_text())
    assert config["r"] == RANK and "lm_head" not in config["target_modules"]
    base, tuned = (path / "model.safetensors" for path in (out.base(0), out.tuned(0, "sort")))
    assert base.read_bytes() != tuned.read_bytes() and base.stat().st_size == tuned.stat().st_size
    built, _ = models.FAMILIES["target"].build(0)
    assert built.num_parameters() < base.stat().st_size / 4


def test_all_merges_of_a_seed_are_planned_without_a_note(out):
    """The recipes name adapters that other jobs make first: here one that is there stands for each."""
    [job] = whole_models(out)
    made, there = (out.root / "adapters" / f"0-{name}" for name in ("(core|knots)-[a-z_]+", "add"))
    text = re.sub(f"{made}$", str(there), out.recipe(0, "merges").read_text(), flags=re.MULTILINE)
    steps = plan_documents(parse_documents(text, "merges"), str(job.command[-1]))
    names = [*merges(), *(key for key, _ in adapters(out, 0))]
    assert [Path(step.output).name for step in steps] == [f"0-{name}" for name in names]
    assert all(step.plan.notes == () for step in steps)


def test_boost_begins_within_the_ranges_that_it_searches(out):
    for job, (numbers, tuned) in zip(boosts(out, QUICK), BOOSTED.values(), strict=True):
        assert job.command.count("--tune") == len(tuned)
        recipe = document("linear", out.base(0), ["a", "b", "c"], numbers)
        for each in parse(tuned):
            value = recipe
            for key in each.path:
                value = value[int(key) if isinstance(value, list) else key]
            assert each.range.low <= value <= each.range.high


def test_statistics_are_of_answers_to_questions_that_nobody_is_judged_by(out):
    for skill in SKILLS:
        rows = [json.loads(line) for line in out.prompts(skill).read_text().splitlines()]
        assert len(rows) == QUICK.read and all(is_right(row["prompt"], row["reference"]) for row in rows)
        assert not any(is_held_out(row["prompt"]) for row in rows)
        for kind in ("fisher", "gram", "plus"):
            assert open_statistics(str(out.statistics(0, skill, kind))).examples == QUICK.read


def test_boost_and_judge_ask_other_questions(out):
    choosing, judged = (
        {json.loads(line)["prompt"] for line in out.prompts(name).read_text().splitlines()}
        for name in ("choosing", "held-out")
    )
    assert len(choosing) == 3 * QUICK.choosing and len(judged) == 3 * QUICK.held_out and not choosing & judged


def measured(key, right):
    table = [[float(value) for value in row] for row in right]
    return Measured(key, key, table, table, table)


def test_three_models_each_for_its_skill_are_asked_what_they_learnt():
    tuned = [measured(skill, [[number] * 3, [number + 3] * 3]) for number, skill in enumerate(SKILLS)]
    chosen = page.by_skill("by-skill", "each", tuned, [*SKILLS][::-1])
    assert chosen.right == [[2, 1, 0], [5, 4, 3]]


def test_the_finding_says_what_is_beyond_noise_and_what_is_not():
    rng = random.Random(11)
    low = [[rng.random() < 0.2 for _ in range(200)] for _ in range(3)]
    high = [[rng.random() < 0.8 for _ in range(200)] for _ in range(3)]
    keys = ("base", "linear", "ties", "boosted-ties", "core-linear", "core-ties", "peft-linear")
    found = {key: measured(key, low) for key in keys}
    assert page.verdict(found).count("is better beyond noise") == 2
    found |= {"ties": measured("ties", high), "core-linear": measured("core-linear", high)}
    said = page.verdict(found)
    assert "Beyond noise better than it: ties +" in said and "2 of 2 are worse beyond noise" in said
    colours = {key: colour_of(page.over_average(found, key)) for key in keys}
    assert colours == dict.fromkeys(("base", "linear", "core-linear"), GREY) | {
        "ties": GREEN, "boosted-ties": BLUE, "core-ties": ORANGE, "peft-linear": ORANGE
    }  # fmt: skip
