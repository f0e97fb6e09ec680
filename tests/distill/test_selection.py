"""What is selected of prompts and SFT rows, against second implementations: bounds, ties, vetoes, several scorers."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mergekit_lite.answers.rows import write_rows
from mergekit_lite.distillation.folder import Folder
from mergekit_lite.distillation.pair import pair
from mergekit_lite.distillation.pairing.assign import Assignment, Dropped, SftExample
from mergekit_lite.distillation.pairing.selection import selected
from mergekit_lite.distillation.recipe.schema import Pairing
from mergekit_lite.distillation.reporter import Reporter
from mergekit_lite.distillation.rules import Answers, Candidate, PreferencePair
from tests.distill import test_pair as files

Prompts = dict[str, Answers]


@pytest.fixture
def seed() -> int:
    number = random.SystemRandom().randrange(10**6)
    print(f"seed {number}")
    return number


def answered(seed: int, prompts: int = 40, values: int = 6) -> Prompts:
    """Answers of a teacher, who is the better one, and of a student; few different scores and lengths, so many ties."""
    draws = np.random.default_rng(seed)

    def answers(source: str, number: int, above: int) -> list[Candidate]:
        scores, lengths = draws.integers(0, values, number) + above, draws.integers(1, values, number) * 10
        return [Candidate(source, k, float(scores[k]), length=int(lengths[k])) for k in range(number)]

    return {
        f"p{number}": Answers([*answers("student", 1 + number % 2, 0), *answers("teacher", 3, 1)])
        for number in range(prompts)
    }


def of(pairing: dict[str, Any], prompts: Prompts) -> dict[str, Assignment]:
    assigned = selected(Pairing.model_validate({"score": "s", **pairing}), prompts, seed=3)
    assert list(assigned) == list(prompts)
    return assigned


def kept(assigned: dict[str, Assignment]) -> list[str]:
    return [prompt for prompt, each in assigned.items() if isinstance(each, SftExample)]


def best_of(answers: Answers, *sources: str) -> Candidate:
    """The first with the highest score."""
    some = [answer for answer in answers.sources if not sources or answer.source in sources]
    return some[int(np.argmax([answer.score for answer in some]))]


def difficulty(answers: Answers) -> float:
    student = [answer.score for answer in answers.sources if answer.source == "student"]
    return float(best_of(answers, "teacher").score - np.mean(student))


FIGURES: dict[str, Callable[[Answers], float]] = {
    "score": lambda answers: best_of(answers).score,
    "length": lambda answers: best_of(answers).length,
    "difficulty": difficulty,
}


@pytest.mark.parametrize("by", FIGURES)
@pytest.mark.parametrize("rule", ["best_worst", "fusechat3"])
def test_sft_rows(seed: int, by: str, rule: str) -> None:
    """``least`` is included; of equal figures the earlier prompt is kept; each that is not kept has a reason."""
    prompts = answered(seed)
    figures = {prompt: FIGURES[by](answers) for prompt, answers in prompts.items()}
    least, top = float(np.median([*figures.values()])), 7
    sft_rows = {"by": by, "least": least, "top": top, **({"student": "student"} if by == "difficulty" else {})}
    assigned = of({"rule": rule, "sft_share": 1, "sft_rows": sft_rows}, prompts)
    enough = [prompt for prompt in prompts if figures[prompt] >= least]
    order = np.argsort([-figures[prompt] for prompt in enough], kind="stable")
    assert len(enough) > top
    assert set(kept(assigned)) == {enough[place] for place in order[:top]}
    for prompt, each in assigned.items():
        if isinstance(each, SftExample):
            assert each.figure == figures[prompt] and f"{by} {figures[prompt]:.6g}" in each.why
            assert each.answer == best_of(prompts[prompt], *(["teacher"] if by == "difficulty" else []))
        else:
            assert isinstance(each, Dropped) and each.stage == "sft"
            below = f"sft_rows: {by} below {least:g}"
            assert each.reason.why.startswith(below if figures[prompt] < least else "sft_rows: not among the 7 ")


def test_preference_rows_stay_as_they_are(seed: int) -> None:
    prompts = answered(seed)
    plain = of({"rule": "best_worst", "sft_share": 0.5}, prompts)
    few = of({"rule": "best_worst", "sft_share": 0.5, "sft_rows": {"top": 3}}, prompts)
    pairs = {prompt: each for prompt, each in plain.items() if isinstance(each, PreferencePair)}
    assert pairs == {prompt: each for prompt, each in few.items() if isinstance(each, PreferencePair)}
    assert len(kept(few)) == 3 < len(kept(plain))
    assert of({"rule": "best_worst", "sft_share": 0.5, "sft_rows": {}}, prompts) == plain


def test_a_student_without_an_answer() -> None:
    prompts = {"a": Answers([Candidate("teacher", 0, 5.0)]), "b": Answers([Candidate("student", 0, 5.0)])}
    rows = {"by": "difficulty", "student": "student", "least": -9}
    assigned = of({"rule": "best_worst", "sft_share": 1, "sft_rows": rows}, prompts)
    reasons = [each.reason.why for each in assigned.values() if isinstance(each, Dropped)]
    assert reasons == ["sft_rows: no answer of student with a score", "no answer with a score"]


@pytest.mark.parametrize("rest", [{"sft_share": 1}, {"sft_share": 0}, {"sft_share": 0.5}, {"split": "availability"}])
def test_rip_of_prompts(seed: int, rest: dict[str, Any]) -> None:
    """Published as a filter of prompts: the worst answer is good and long, and near the best one."""
    prompts = answered(seed, 60)
    bounds = {"rejected_score": 1, "rejected_length": 20, "gap": 4}
    assigned = of({"rule": "fusechat3", "rip": {**bounds, "of": "prompts"}, **rest}, prompts)
    passed = set()
    for prompt, answers in prompts.items():
        scores = np.array([answer.score for answer in answers.sources])
        worst = answers.sources[int(scores.argmin())]
        if np.ptp(scores) > 0 and worst.score >= 1 and worst.length >= 20 and np.ptp(scores) <= 4:
            passed.add(prompt)
    assert 0 < len(passed) < len(prompts)
    left_out = {name for name, each in assigned.items() if isinstance(each, Dropped) and each.stage == "selection"}
    assert left_out == prompts.keys() - passed
    if rest == {"sft_share": 1}:
        assert set(kept(assigned)) == passed


def test_rip_of_pairs_is_another_thing() -> None:
    """A pair of one source may pass where the best and worst answer of all don't."""
    scores = {"teacher": (1.0, 2.0), "student": (8.0, 9.0)}
    prompts = {
        "a": Answers([Candidate(name, k, score) for name, each in scores.items() for k, score in enumerate(each)])
    }
    made = {of: selected(Pairing.model_validate({"rule": "fusechat3", "score": "s", "sft_share": 0, "rip": {"gap": 1,
            "of": of}}), prompts, 0)["a"] for of in ("pairs", "prompts")}  # fmt: skip
    assert isinstance(made["pairs"], PreferencePair) and made["pairs"].gap == 1
    assert isinstance(made["prompts"], Dropped) and made["prompts"].reason.why == "RIP: gap above 1"


# On files.


def write_scores(folder: Path, scorer: str, source: str, scores: dict[tuple[str, int], float | None]) -> None:
    rows = [{"prompt": prompt, "index": index, "score": value, "why": ""} for (prompt, index), value in scores.items()]
    write_rows(Folder(folder).scores(scorer, source), rows)


def read_scores(folder: Path, scorer: str, source: str) -> dict[tuple[str, int], float]:
    lines = Folder(folder).scores(scorer, source).read_text().splitlines()
    return {(row["prompt"], row["index"]): row["score"] for row in map(json.loads, lines)}


@pytest.mark.parametrize(("how", "figure"), [("mean", np.mean), ("minimum", np.min)])
def test_several_scorers(tmp_path: Path, how: str, figure: Callable[..., float]) -> None:
    """Each answer is ranked by one figure of its scores; one that lacks a score is counted, and not used."""
    prompts = files.write_all(tmp_path, domains=("maths",), number=12)
    for source in files.SOURCES:  # the second scorer has the scale of the first
        draw = random.Random(f"other {source}")
        scores = {(prompt, index): round(draw.random(), 2) for prompt in prompts for index in range(files.SAMPLES)}
        write_scores(tmp_path, "checked", source, scores | ({("p0", 0): None} if source == "gemma" else {}))
    recipe = files.recipe(tmp_path, rule="best_worst", score={how: ["reward", "checked"]}, sft_share=0.5)
    heard = files.Heard()
    table = pair(recipe, heard)
    assert table.domains["maths"].answers["answers: no score by checked"] == 1 and not heard.warnings
    figures: dict[str, dict[tuple[str, int], float]] = {prompt: {} for prompt in prompts}
    for source in files.SOURCES:
        first, second = (read_scores(tmp_path, scorer, source) for scorer in ("reward", "checked"))
        for (prompt, index), value in first.items():
            if second[prompt, index] is not None:
                figures[prompt][source, index] = float(figure([value, second[prompt, index]]))
    for row in files.rows(tmp_path, "sft"):
        assert row["score"] == pytest.approx(max(figures[row["prompt"]].values()))
        assert figures[row["prompt"]][row["source"], row["index"]] == pytest.approx(row["score"])
    preference = files.rows(tmp_path, "preference")
    assert len(preference) == 6
    for row in preference:
        values = figures[row["prompt"]].values()
        assert row["gap"] == pytest.approx(max(values) - min(values))
        assert row["chosen"][0]["scores"].keys() == {"reward", "checked"}


def test_scales_that_are_unlike_are_told(tmp_path: Path) -> None:
    prompts = files.write_all(tmp_path, domains=("maths",), number=6)
    for source in files.SOURCES:
        draw = random.Random(source)
        scores: dict[tuple[str, int], float | None] = {(p, k): draw.uniform(1, 10) for p in prompts for k in range(3)}
        write_scores(tmp_path, "checked", source, scores)
    heard = files.Heard()
    pair(files.recipe(tmp_path, rule="best_worst", score={"mean": ["reward", "checked"]}), heard)
    (warning,) = heard.warnings
    assert "spread unlike" in warning and "reward by 0." in warning and "checked by 2." in warning


def test_a_veto(tmp_path: Path) -> None:
    """What a scorer gives too little is never chosen nor imitated, but may be rejected; the bound itself is enough."""
    prompts = files.write_prompts(tmp_path, 3, ("maths",))
    rewards = {"gemma": (0.9, 0.5, 0.1), "qwen": (0.8, 0.4, 0.2)}
    checks = {"p0": (0, 5, 5, 5, 5, 0), "p1": (4.99, 5, 5, 0, 0, 0), "p2": (0, 0, 0, 0, 0, 0)}
    for source, number in (("gemma", 0), ("qwen", 3)):
        files.write_source(tmp_path, source, prompts)
        write_scores(
            tmp_path, "reward", source, {(p, k): value for p in prompts for k, value in enumerate(rewards[source])}
        )
        write_scores(tmp_path, "checked", source, {(p, k): checks[p][number + k] for p in prompts for k in range(3)})
    for rest, rule in (({"sft_share": 0}, "best_worst"), ({"sft_share": 1}, "best_worst"), ({}, "as_is")):
        recipe = files.recipe(tmp_path, rule=rule, veto={"checked": 5}, **rest)
        table = pair(recipe, Reporter())
        assert table.domains["maths"].answers["answers: vetoed, so not chosen"] == 12
        dropped = files.rows(tmp_path, "dropped")
        assert [(row["prompt"], row["why"]) for row in dropped] == [("p2", "no answer without a veto")]
        if rest == {"sft_share": 0}:
            pairs = [
                (row["chosen"][0]["score"], row["rejected"][0]["score"]) for row in files.rows(tmp_path, "preference")
            ]
            assert pairs == [(0.8, 0.1), (0.5, 0.1)]
        else:
            first = {"best_worst": [("qwen", 0), ("gemma", 1)], "as_is": [("gemma", 1)] * 2}[rule]
            assert [(row["source"], row["index"]) for row in files.rows(tmp_path, "sft")] == first


def test_rows_of_rising_difficulty(tmp_path: Path) -> None:
    """Over all domains; each prompt that is no row is in the table, and a second run changes no byte."""
    files.write_all(tmp_path)
    rows = {"by": "difficulty", "student": "qwen", "least": 0, "rising": True}
    recipe = files.recipe(tmp_path, rule="best_worst", sft_share=1, sft_rows=rows)
    table = pair(recipe, Reporter())
    first = files.contents(tmp_path)
    scores = {source: read_scores(tmp_path, "reward", source) for source in files.SOURCES}
    expected = {
        prompt: max(scores["gemma"][prompt, k] for k in range(3))
        - np.mean([scores["qwen"][prompt, k] for k in range(3)])
        for prompt, _ in scores["gemma"]
    }
    order = sorted((prompt for prompt in expected if expected[prompt] >= 0), key=lambda prompt: expected[prompt])
    written = files.rows(tmp_path, "sft")
    assert [row["prompt"] for row in written] == order and {row["source"] for row in written} == {"gemma"}
    assert {row["domain"] for row in written} == {"instruction", "maths"}
    assert sum(table.overall.dropped.values()) == 20 - len(order) > 0
    assert set(table.overall.dropped) == {"prompts, sft: sft_rows: difficulty below 0"}
    pair(recipe, Reporter())
    assert files.contents(tmp_path) == first


def test_the_longest_answers_need_no_score(tmp_path: Path) -> None:
    """Long Is More, on answers as they are: of each domain the longest, without any scorer."""
    prompts = files.write_prompts(tmp_path, 9, ("a", "b", "c"))
    for source in files.SOURCES:
        files.write_answers(tmp_path, source, prompts[0], [])
        write_rows(
            Folder(tmp_path).samples(source),
            [
                {"prompt": p, "source": source, "index": 0, "text": "x" * (1 + int(p[1:])), "finish": "stop"}
                for p in prompts
            ],
        )
    longest = {"by": "length", "top": 2}
    domains = {"c": {"sft_rows": {**longest, "top": 1}}}
    recipe = files.recipe(tmp_path, rule="as_is", score=None, sft_rows=longest, domains=domains)
    pair(recipe, Reporter(), skip_missing=True)
    assert [row["prompt"] for row in files.rows(tmp_path, "sft")] == ["p3", "p4", "p6", "p7", "p8"]
    assert {row["why"] for row in files.rows(tmp_path, "dropped")} == {
        "sft_rows: not among the 2 longest",
        "sft_rows: not among the 1 longest",
    }
