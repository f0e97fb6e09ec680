"""The demo on a released model: its checks and how they might be gamed, prompts apart, the page of a made-up result."""

import json
import random

import pytest
import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from demo.real import costs, page
from demo.real.__main__ import write_data
from demo.real.instructions import KINDS, drawn, every, followed, follows, names_topic
from demo.real.plan import ALPHAS, ASKED, DTYPES, FULL, LEFT_OUT, OWN, PARTS, QUICK, STUDENT, Out
from demo.real.student import cut
from demo.real.topics import TOPICS, WORDS
from mergekit_lite.answers.intervals import difference
from mergekit_lite.distillation.recipe.loading import load
from tests.tokenizers import tokenizer

TWO = "Bread is a food that people make of flour and water. Many bakers sell it fresh in the morning."
THREE = f"{TWO} Some of it is sweet."
GOOD = {  # an answer that follows, and what it was asked beyond its kind
    "lowercase": (None, TWO.lower()),
    "uppercase": (None, TWO.upper()),
    "no commas": (None, THREE),
    "at most": (20, TWO),
    "at least": (30, f"{TWO} Its crust is dark where the oven was hot and the dough inside stays soft and warm."),
    "sentences": (2, TWO),
    "use": (["people", "water"], TWO),
    "avoid": ("the", TWO.replace("the ", "each ")),
    "bullets": (3, "- Bread is made of flour\n- Bakers sell it each morning\n- Its crust is hard"),
    "numbered": (3, "1. Bread smells good\n2. It fills the hungry\n3. Crust crackles in your mouth"),
    "JSON": (["fact", "reason"], '{"fact": "Bread is made of flour", "reason": "People grow a lot of wheat"}'),
    "quotes": (None, '"Bread is a food that people make of flour and water."'),
    "begin": ("Honestly", f"Honestly, {TWO}"),
    "end": ("That is all.", f"{TWO} That is all."),
    "title": (None, f"<<About Bread>>\n{TWO}"),
    "postscript": (None, f"{TWO}\nP.S. Try it with butter."),
    "question": (None, "Why does bread rise in the oven?"),
    "two parts": (None, TWO.replace(". ", ".\n***\n")),
}
GAMED = {  # answers that have the form and nothing else, or that have it by accident
    "lowercase": ["bread.", THREE.lower(), "bread. " * 12, TWO],
    "uppercase": ["BREAD. BREAD.", "BREAD IS GOOD. " * 6, "1234. 5678."],
    "no commas": ["Bread. Bread. Bread.", "Bread is good. " * 3, f"{TWO} Some, not all, is sweet."],
    "at most": ["Bread.", "Bread bread bread bread bread bread bread bread bread."],
    "at least": ["bread " * 40, TWO],
    "sentences": ["Bread. Yes.", "Bread is good food to eat. " * 2, THREE],
    "use": ["people water bread", TWO.replace("water", "milk")],
    "avoid": ["Bread", TWO],
    "bullets": ["- \n- \n- ", "**\n**\n**", "\n".join(["- bread bread"] * 3), "- Bread\n- Flour\n- Water"],
    "numbered": ["1.\n2.\n3.", "1. bread\n2. bread\n3. bread", f"Sure!\n{GOOD['numbered'][1]}"],
    "JSON": ['{"fact": "", "reason": ""}', '{"fact": "bread", "reason": "bread"}', "{}", f"Here: {GOOD['JSON'][1]}"],
    "quotes": [
        '""', '"Bread"', f'"{TWO}"', f"Here: {GOOD['quotes'][1]}",
        '"Bread" is a "food" that people eat in the "morning"',
    ],
    "begin": ["Honestly", f"Honestly, {THREE}", "Honestly. Honestly. Honestly.", TWO],
    "end": ["That is all.", f"{THREE} That is all.", "Bread. That is all.", f"That is all. {TWO} That is all."],
    "title": [
        "<<>>", "<<Bread>>", f"<<My Title>> {TWO}", f"<<Bread>> {TWO}", f"<<About Bread>> {THREE}",
        f"<<About Bread>> {'bread ' * 9}",
    ],
    "postscript": [
        "P.S.", f"{TWO} P.S.", f"{THREE} P.S. Try it with butter.",
        "P.S. Bread is a food that people make of flour and water.",
    ],
    "question": ["?", "bread?", "Bread? Bread? Bread? Why not?", "I like bread a lot. Why does bread rise?"],
    "two parts": ["***", "\n***\n", "Bread is a food made of flour\n***\nBread is a food made of flour", TWO],
}  # fmt: skip


@pytest.mark.parametrize("kind", KINDS)
def test_an_answer_that_follows_counts_and_its_form_alone_does_not(kind):
    given, good = GOOD[kind]
    assert follows(kind, given, "bread", good)
    assert not follows(kind, given, "steel", good)  # it is about something else
    assert not follows(kind, given, "bread", "")
    for answer in GAMED[kind]:
        assert not follows(kind, given, "bread", answer), answer


@pytest.mark.parametrize("kind", sorted({*KINDS} - {"sentences", "avoid", "at most", "at least"}))
def test_a_plain_answer_follows_no_instruction_by_itself(kind):
    assert not follows(kind, GOOD[kind][0] if kind != "use" else ["old", "often"], "bread", TWO)


def test_the_scorer_is_a_reward_function():
    columns = {"domain": ["sentences", "quotes"], "given": [2, None], "topic": ["bread", "bread"], "id": ["a", "b"]}
    assert followed(prompts=["", ""], completions=[TWO, TWO], **columns) == [1, 0]


def test_topics_are_named_in_all_their_forms():
    for topics in TOPICS.values():
        assert all(names_topic(f"I like {topic}.", topic) for topic in topics)
    assert names_topic("A wolf howls", "wolves") and names_topic("The library", "libraries")
    assert not names_topic("Nothing of it", "bread") and not names_topic("Iceland's shortbread", "bread")


def test_splits_share_no_topic_no_word_and_no_prompt():
    for table in (TOPICS, WORDS):
        every_one = [one for split in table.values() for one in split]
        assert len(every_one) == len(set(every_one))
    prompts = [row["prompt"] for split in TOPICS for row in every(split)]
    assert len(prompts) == len(set(prompts))


def test_draws_repeat_and_have_each_kind_equally_often():
    rows = drawn("test", 90)
    assert rows == drawn("test", 90)
    assert {sum(row["domain"] == kind for row in rows) for kind in KINDS} == {5}
    assert len({row["id"] for row in rows}) == 90


def test_costs_are_of_other_things():
    assert all(int(row["reference"]) == sum(map(int, row["id"].split("+"))) for row in costs.sums(50))
    assert len({row["text"] for row in costs.texts(50)}) == 50


def test_the_first_new_number_is_the_answer_to_a_sum():
    said = ["17 + 30 = 47, as 7 and 0 are 7", "47", "The sum of 17 and 30 is 37. No, 47.", "17 + 30", "", "470"]
    columns = {"reference": ["47"] * len(said), "id": said}
    assert costs.right(["What is 17 + 30?"] * len(said), said, **columns) == [1, 1, 0, 0, 0, 0]


@pytest.mark.parametrize("size", [FULL, QUICK])
def test_recipes_load_and_prompts_are_apart(size, tmp_path):
    out = Out(tmp_path)
    write_data(out, size)
    for lesson in (OWN, STUDENT):
        recipe = load(out.recipe(lesson.recipe))
        assert tuple(source.name for source in recipe.sources) == lesson.sources
        assert sum(source.samples for source in recipe.sources) == {OWN: 8, STUDENT: 2}[lesson]
        assert recipe.folder.name == lesson.folder
        for name in lesson.sources:
            part = load(out.recipe(name))
            assert [source.name for source in part.sources] == [name] and part.folder.name == out.sampled(name).name
    sets = {name: _ids(out, name) for name in ("train", "lessons", "dev", "report", *PARTS)}
    assert sets["train"] <= sets["lessons"]
    apart = [sets[name] for name in ("lessons", "dev", "report", *PARTS)]
    assert len(set().union(*apart)) == sum(map(len, apart)) == size.lessons + size.dev + size.report + size.test


def test_the_full_test_has_each_kind_equally_often():
    rows = drawn("test", FULL.test)
    assert {sum(row["domain"] == kind for row in rows) for kind in KINDS} <= {FULL.test // 18, FULL.test // 18 + 1}
    assert len({row["prompt"] for row in rows}) == FULL.test


def test_the_student_has_the_layers_that_are_left_and_the_tokenizer(tmp_path):
    shape = {"hidden_size": 16, "intermediate_size": 24, "num_attention_heads": 2, "vocab_size": len(tokenizer())}
    whole = LlamaForCausalLM(LlamaConfig(num_hidden_layers=30, **shape))
    whole.save_pretrained(tmp_path / "whole")
    tokenizer().save_pretrained(tmp_path / "whole")
    cut(tmp_path / "whole", tmp_path / "cut")
    student = AutoModelForCausalLM.from_pretrained(tmp_path / "cut")
    kept = [number for number in range(30) if number not in LEFT_OUT]
    assert student.config.num_hidden_layers == len(student.model.layers) == len(kept)
    for layer, number in zip(student.model.layers, kept, strict=True):
        assert torch.equal(layer.mlp.up_proj.weight, whole.model.layers[number].mlp.up_proj.weight)
    student.generate(torch.tensor([[1, 2, 3]]), max_new_tokens=3)  # the cache knows its layers


def _ids(out, name):
    return {json.loads(line)["id"] for line in out.prompts(name).read_text().splitlines()}


@pytest.fixture
def made_up(tmp_path):
    """A demo's folder in which boost and compare have been: alphas up to 1 follow more, and cost sums."""
    out, rng = Out(tmp_path), random.Random(3)
    write_data(out, QUICK)
    for lesson, kind in ((OWN, "preference"), (STUDENT, "sft")):
        (out.folder(lesson) / "pairs").mkdir(parents=True)
        (out.folder(lesson) / "pairs/table.json").write_text(json.dumps({"all": {kind: 12}}))
    tests = {part: sorted(_ids(out, part)) for part in PARTS}
    asked = [(part, items, ALPHAS) for part, items in tests.items()]
    asked += [(f"student-{part}", items, (-1.0, 0.0)) for part, items in tests.items()]
    asked += [("costs", [*map(str, range(40)), *(f"text:{number}" for number in range(20))], ALPHAS)]
    for name, items, alphas in asked:
        folder = out.figures(name).parent / "candidates"
        folder.mkdir(parents=True)
        for alpha in alphas:
            rows = []
            for item in items[: len(items) - (alpha == 2)]:  # the last one was stopped
                if item.startswith("text:"):
                    rows.append({"item": item, "values": {"nll": -3 - 0.1 * alpha}})
                    continue
                right = rng.random() < 0.3 + 0.2 * min(alpha, 1) * (-1 if name == "costs" else 1)
                values = {"sums" if name == "costs" else "followed": float(right)}
                text = "two\nlines" if right else "one"
                rows.append({"item": item, "values": values, "text": text, "finish": "stop" if right else "length"})
            (folder / f"alpha={alpha:g}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    out.figures("dev").parent.mkdir(parents=True)
    out.figures("dev").write_text(json.dumps({"chosen": {"alpha": 1.0}, "verdict": ["alpha=1 beats alpha=0"]}))
    effective = [[[alpha * scale] for alpha in ASKED] for scale in (0.5, 0.9, 1.0)]
    out.rounding.write_text(json.dumps({"overall": {"rms": [1.5e-4], "effective": effective}}))
    out.times.write_text('{"stage": "Test", "seconds": 60, "processor": 90}\n' * 2)
    return out


def test_the_page_of_a_made_up_result(made_up, tmp_path, capsys):
    docs = tmp_path / "docs"
    (docs / "images").mkdir(parents=True)
    (docs / "real.md").write_text("Before\n<!-- demo-real: test -->\nold\n<!-- end -->\nafter\n")
    page.write(made_up, Console(), docs / "real.md")
    text = (made_up.report / "report.md").read_text()
    pictures = {"real.png", "real-costs.png", "real-rounding.png"}
    assert {path.name for path in made_up.report.glob("*.png")} == pictures
    assert {path.name for path in (docs / "images").iterdir()} == pictures
    found = page.read(made_up)
    assert {len(each.rows) for each in found.test} == {QUICK.test - len(PARTS)}  # those that every alpha has
    assert {len(each.rows) for each in found.student} == {QUICK.test}
    assert found.chosen == 1 and "- alpha=1 beats alpha=0" in text and "12 pairs" in text
    first, trained = found.test[0], found.test[1]
    assert (first.alpha, trained.alpha) == (-1, 0)
    mean = sum(trained.values("followed").values()) / len(trained.rows)
    row = f"| 0, DPO | {100 * mean:.1f} ["
    assert row in text
    filled = (docs / "real.md").read_text()
    assert filled.startswith("Before\n<!-- demo-real: test -->\n| alpha |") and row in filled and "old" not in filled
    assert filled.endswith("|\n<!-- end -->\nafter\n")
    assert trained.cut == pytest.approx(1 - mean)
    assert trained.gain(first, "followed") == difference(trained.values("followed"), first.values("followed"))
    assert trained.gain(trained, "nll")[:3] == (0, 0, 0)  # no doubt about its difference to itself
    assert all(f"| {kind} |" in text for kind in KINDS) and all(dtype in text for dtype in DTYPES)
    assert text.count("two ⏎ lines") >= 1
    assert "| Test | 2.0 | 3.0 |" in text and "| all | 2.0 | 3.0 |" in text


def test_sizes_of_models_are_those_of_their_configurations():
    assert page.size(0) == pytest.approx(134.515, abs=1e-3)  # what the released model's header says


def test_a_search_that_found_nothing_has_a_page_too(made_up, capsys):
    made_up.figures("dev").write_text(json.dumps({"chosen": None, "verdict": ["not", "sure"]}))
    page.write(made_up, Console())
    assert "- not\n- sure" in (made_up.report / "report.md").read_text()
