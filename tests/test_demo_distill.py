"""The demo of distillation: its questions, tokenizers, recipes, server and statistics."""

import json
import random
import subprocess
import sys
from pathlib import Path
from string import Template
from urllib.request import Request, urlopen

import pytest
import yaml
from transformers import AutoTokenizer

from demo.distill import models, skills
from demo.distill.__main__ import RECIPES
from demo.distill.comparison import gain, interval, t_quantile
from demo.distill.plan import LEARNT, ROADS
from mergekit_lite.answers.prompts import from_row
from mergekit_lite.answers.scoring.registry import open_scorer
from mergekit_lite.answers.scoring.scorer import Judged, ScorerSettings
from mergekit_lite.distillation.recipe.loading import load

NAMES = list(skills.SKILLS)


@pytest.mark.parametrize("name", NAMES)
def test_questions_are_unlike_and_their_ideal_answers_right(name):
    rng = random.Random(1)
    learnt = skills.questions(name, 60, rng)
    unseen = skills.questions(name, 60, rng, held_out=True)
    assert len({*learnt, *unseen}) == 120
    for question in (*learnt, *unseen):
        answer = skills.solve(question)
        assert skills.is_right(question, answer)
        assert not skills.is_right(question, answer + "1")
        assert not skills.is_right(question, "")
        assert skills.is_right(question, skills.demonstrate(question, 1, rng))


def test_the_careless_are_mostly_wrong():
    rng = random.Random(4)
    asked = [question for name in NAMES for question in skills.questions(name, 100, rng)]
    wrong = sum(not skills.is_right(question, skills.demonstrate(question, 0, rng)) for question in asked)
    assert 0.8 < wrong / len(asked) < 1  # who sorts different letters can't go wrong


def test_ideal_answers_by_hand():
    assert skills.solve("add 7+4+9+3") == "7+4=11+9=20+3=23"
    assert skills.solve("sort dbeac") == "abcde"
    assert skills.solve("reverse dbeac") == "caebd"
    assert skills.is_right("add 7+4", "11")  # the road doesn't count


def test_the_recipes_reward_scores_right_answers_highest():
    scorers = yaml.safe_load((RECIPES / "common.yaml").read_text().replace("$", ""))["scorers"]
    settings = ScorerSettings(**next(each for each in scorers if each["name"] == "reward"))
    rng = random.Random(5)
    asked = [question for name in NAMES for question in skills.questions(name, 4, rng)]
    with open_scorer(settings) as scorer:
        for question in asked:
            row = skills.as_row(question)
            plain = {"messages": [{"role": "user", "content": row.pop("prompt")}], "plain": True, "tests": []}
            answers = (skills.solve(question), f"{skills.solve(question)}1", "")
            found = scorer.score([Judged(from_row(row | plain), answer) for answer in answers])
            best, wrong, none = (score.value for score in found)
            assert best == 1 > wrong > none, question


@pytest.mark.parametrize("family", models.FAMILIES)
def test_tokenizers_give_back_what_they_are_given_also_when_they_are_loaded(family, tmp_path):
    model, made = models.FAMILIES[family].build(seed=0)
    model.save_pretrained(tmp_path)
    made.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    for question in (question for name in NAMES for question in skills.questions(name, 20, random.Random(2))):
        for text in (question, skills.solve(question)):
            tokens = made(text, add_special_tokens=False).input_ids
            assert loaded(text, add_special_tokens=False).input_ids == tokens
            assert loaded.decode(tokens) == text


def test_no_two_families_have_the_same_tokenizer_or_template():
    made = [models.FAMILIES[name].tokenizer(models.sample_text(0)) for name in models.FAMILIES]
    assert len({json.dumps(sorted(tokenizer.get_vocab().items())) for tokenizer in made}) == len(made)
    assert len({tokenizer.chat_template for tokenizer in made}) == len(made)


@pytest.mark.parametrize("road", ROADS)
def test_recipes_load(road, tmp_path):
    text = Template((RECIPES / "common.yaml").read_text() + (RECIPES / f"{road}.yaml").read_text())
    path = tmp_path / "recipe.yaml"
    path.write_text(text.substitute(seed=3, road=road, server="http://127.0.0.1:1/v1", batch=8, correct="right"))
    recipe = load(path)
    assert recipe.seed == 3 and {source.name for source in recipe.sources} == {*LEARNT} - {"target"}


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    """A real process that serves a small model with random weights."""
    folder = tmp_path_factory.mktemp("served") / "random"
    model, tokenizer = models.FAMILIES["gpt2"].build(seed=0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    process = subprocess.Popen(
        [sys.executable, "-m", "demo.distill.server", str(folder)],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[1],
    )
    with process:
        yield process.stdout.readline().strip(), model, tokenizer
        process.terminate()


def asked(address, question, **settings):
    body = {"model": "random", "messages": [{"role": "user", "content": question}], "max_tokens": 12, **settings}
    request = Request(f"{address}/chat/completions", json.dumps(body).encode(), {"Content-Type": "application/json"})
    with urlopen(request, timeout=60) as response:
        return json.load(response)["choices"][0]


def test_server_answers_like_the_model_and_by_seed(server):
    address, model, tokenizer = server
    chat = [{"role": "user", "content": "add 1+2"}]
    inputs = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.eval().generate(**inputs, do_sample=False, max_new_tokens=12)[0, inputs["input_ids"].shape[1] :]
    greedy = asked(address, "add 1+2", temperature=0)
    assert greedy["message"]["content"] == tokenizer.decode(made, skip_special_tokens=True)
    drawn = [asked(address, "add 1+2", temperature=1, seed=seed)["message"]["content"] for seed in (1, 2, 1)]
    assert drawn[0] == drawn[2] != drawn[1]


def test_t_quantiles_are_those_of_the_tables():
    table = {1: 12.706, 5: 2.571, 9: 2.262, 10: 2.228, 20: 2.086, 60: 2.000, 1e9: 1.960}
    for freedom, quantile in table.items():
        assert t_quantile(freedom) == pytest.approx(quantile, abs=4e-3)


def test_intervals_hold_the_truth_as_often_as_they_say():
    """Seeds and prompts drawn anew each time; an interval over prompts alone would hold it in half of the cases."""
    rng, hits, times = random.Random(5), 0, 300
    for _ in range(times):
        seeds, prompts = [rng.gauss(0, 0.4) for _ in range(3)], [rng.gauss(0, 1) for _ in range(40)]
        found = interval([[seed + prompt + rng.gauss(0, 1) for prompt in prompts] for seed in seeds])
        hits += found.low <= 0 <= found.high
    assert 0.92 <= hits / times <= 0.995


def test_gains_are_paired():
    rng = random.Random(6)
    hard = [rng.random() for _ in range(50)]
    one = [[value + 0.1 for value in hard]] * 3
    found = gain(one, [hard])  # what was made once stands beside every seed
    assert found.low == pytest.approx(0.1) and found.high == pytest.approx(0.1)
