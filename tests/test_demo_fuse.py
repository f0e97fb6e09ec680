"""The demo of fusing: its tokenizers, rows, recipes, and the page's finding."""

import json
import random

import pytest
from transformers import AutoTokenizer

from demo.distill import skills
from demo.distill.models import sample_text
from demo.distill.results import Measured
from demo.fuse import page
from demo.fuse.__main__ import write_questions, write_recipes
from demo.fuse.models import FAMILIES
from demo.fuse.plan import FULL, QUICK, ROADS, STUDENT, TEACHERS, Files
from mergekit_lite.answers.template import ChatTemplate
from mergekit_lite.distillation.recipe.loading import load


@pytest.fixture(scope="module")
def out(tmp_path_factory):
    """The demo's folder with tokenizers and configs of all models, questions and recipes."""
    out = Files(tmp_path_factory.mktemp("fuse"), (0, 1))
    text = sample_text(0)
    for name, family in FAMILIES.items():
        tokenizer = family.tokenizer(text)
        tokenizer.save_pretrained(out.model(name))
        family.config({"vocab_size": len(tokenizer)}).save_pretrained(out.model(name))
    write_questions(out, QUICK)
    write_recipes(out, QUICK)
    return out


@pytest.mark.parametrize("name", FAMILIES)
def test_tokenizers_give_back_what_they_are_given_also_when_they_are_loaded(name, out):
    made, loaded = FAMILIES[name].tokenizer(sample_text(0)), AutoTokenizer.from_pretrained(out.model(name))
    for question in (question for skill in STUDENT for question in skills.questions(skill, 20, random.Random(2))):
        for text in (question, skills.solve(question)):
            tokens = made(text, add_special_tokens=False).input_ids
            assert loaded(text, add_special_tokens=False).input_ids == tokens
            assert loaded.decode(tokens) == text


def test_no_two_models_cut_a_text_alike_or_have_the_same_template_or_architecture(out):
    loaded = [AutoTokenizer.from_pretrained(out.model(name)) for name in FAMILIES]
    texts = [skills.solve(question) for skill in STUDENT for question in skills.questions(skill, 20, random.Random(3))]
    assert len({json.dumps([each.tokenize(text) for text in texts]) for each in loaded}) == len(FAMILIES)
    assert len({each.chat_template for each in loaded}) == len(FAMILIES)
    types = {json.loads((out.model(name) / "config.json").read_text())["model_type"] for name in FAMILIES}
    assert len(types) == len(FAMILIES)


def test_each_skill_has_two_teachers():
    assert all(sum(skill in learnt for learnt in TEACHERS.values()) == 2 for skill in STUDENT)


def test_no_row_is_another_seeds_or_held_out(out):
    rows = [[json.loads(line)["prompt"] for line in out.rows(seed).read_text().splitlines()] for seed in out.seeds]
    judged = [json.loads(line)["prompt"] for line in out.prompts("held-out").read_text().splitlines()]
    asked = [question for some in rows for question in some] + judged
    assert len(set(asked)) == len(asked) == 3 * (2 * QUICK.rows + QUICK.held_out)
    together = [json.loads(line)["prompt"] for line in out.rows("all").read_text().splitlines()]
    assert sorted(together) == sorted(question for some in rows for question in some)


@pytest.mark.parametrize("road", ROADS)
def test_recipes_load_and_train_what_the_road_says(road, out):
    recipe = load(out.recipe(1, road))
    assert recipe.seed == 1 and tuple(recipe.train.stages) == ROADS[road]
    assert {teacher.name for teacher in recipe.teachers} >= ({*TEACHERS} if road != "sft" else set())


def test_all_roads_train_as_many_responses(out):
    asked = QUICK.rows * len(STUDENT)
    for road in ROADS:
        stages = load(out.recipe(0, road)).train.stages
        rows = sum(each.epochs * getattr(each, "rounds", 1) * (getattr(each, "prompts", None) or asked)
                   for each in stages.values())  # fmt: skip
        pairwise = getattr(stages.get("fuse"), "pairwise", None)
        assert rows * (len(TEACHERS) if pairwise else 1) == 3 * asked, road


def test_own_answers_are_as_many_tokens_as_the_rows_they_stand_for(out):
    """At the mean lengths that the whole demo had: 8.48 tokens of the student's answers in training, 6.31 of rows."""
    stages = load(out.recipe(0, "onpolicy")).train.stages
    assert FULL.asked % FULL.batch == 0  # all answers are in a step
    own = stages["on_policy"].rounds * FULL.asked * 8.48
    assert own == pytest.approx(2 * FULL.rows * len(STUDENT) * 6.31, rel=0.02)


def test_prompts_and_responses_are_what_each_template_says(out):
    for name in FAMILIES:
        template = ChatTemplate(AutoTokenizer.from_pretrained(out.model(name)))
        tokens = template.tokens([{"role": "user", "content": "sort dbac"}], "abcd")
        assert template.tokenizer.decode(tokens.response).lstrip().startswith("abcd")


def measured(key, right):
    table = [[float(value) for value in row] for row in right]
    return Measured(key, key, table, table, table)


def test_the_finding_says_what_is_beyond_noise_and_what_is_not():
    rng = random.Random(11)
    low = [[rng.random() < 0.2 for _ in range(200)] for _ in range(3)]
    high = [[rng.random() < 0.8 for _ in range(200)] for _ in range(3)]
    models = {road: measured(road, low) for road in ROADS}
    assert page.verdict(models).startswith("No road gains over SFT alone beyond noise.")
    models["alm"] = measured("alm", high)
    finding = page.verdict(models)
    assert finding.startswith("Beyond noise over SFT alone: ALM +") and "ahead of" in finding
    assert set(page.colours(models).values()) == {page.GREEN, page.BLUE}
    models["sft"] = measured("sft", high)
    assert "Beyond noise below SFT alone" in page.verdict(models)


def test_tokens_of_a_log_are_all_its_steps(tmp_path):
    rows = [{"step": 2, "length/response": 5.0}, {"step": 3, "length/response": 8.0}, {"step": 3, "eval_loss": 1.0}]
    (tmp_path / "log.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "training.json").write_text(json.dumps({"settings": {"batch_size": 4}}))
    assert page.trained_tokens(tmp_path / "log.jsonl") == 4 * (2 * 5 + 8)
