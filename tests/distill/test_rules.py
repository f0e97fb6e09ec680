"""The published rules against their numbers, against a naive second implementation, and against what can go wrong."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mergekit_lite.distillation.pairing.assign import Dropped, SftExample, Waiting, assignments, drawn
from mergekit_lite.distillation.recipe.schema import Pairing
from mergekit_lite.distillation.rules import (
    Answers,
    Candidate,
    PreferencePair,
    Refusal,
    admitted,
    best,
    best_worst,
    extremes,
    fusechat3,
    gap_between,
    rip,
    simplemix,
    sweet_spot,
    win,
    wrpo,
)

# The worked example: scores of a reward model on the answers of three sources to one prompt.
SCORES = {
    "A": (0.140, 0.152, 0.131, 0.149, 0.160),
    "B": (0.170, 0.168, 0.172, 0.169, 0.171),
    "C": (0.050, 0.165, 0.140, 0.120, 0.100),
}
BOUNDS = gap_between(0.01, 0.1)


def answered(scores: dict[str, Sequence[float]], own: bool = False) -> list[Candidate]:
    return [
        Candidate(source, index, score, own=own) for source, each in scores.items() for index, score in enumerate(each)
    ]


def scores_of(pair: PreferencePair | Refusal) -> tuple[float, float]:
    assert isinstance(pair, PreferencePair), pair
    return pair.chosen[-1].score, pair.rejected[0].score


class TestFuseChat3:
    def test_worked_example(self) -> None:
        answers = Answers(answered(SCORES))
        example = best(answers.sources)
        assert isinstance(example, Candidate) and (example.source, example.score) == ("B", 0.172)
        pair = admitted(fusechat3(answers), [BOUNDS])
        assert scores_of(pair) == (0.160, 0.131)
        assert isinstance(pair, PreferencePair) and pair.gap == 0.029 and pair.chosen[0].source == "A"

    def test_refused_sources_say_why(self) -> None:
        answers = Answers(answered({name: SCORES[name] for name in "BC"}))
        pair = admitted(fusechat3(answers), [BOUNDS])
        assert isinstance(pair, Refusal)
        assert pair.why == "gap above 0.1; gap below 0.01"
        assert "0.004" in pair.detail and "0.115" in pair.detail

    def test_maths(self) -> None:
        right = [Candidate("M", 0, 0.15, True), Candidate("M", 1, 0.14, True)]
        wrong = [Candidate("M", 2, 0.12, False), Candidate("M", 3, 0.11, False)]
        pair = admitted(fusechat3(Answers([*right, *wrong])), [BOUNDS])
        assert scores_of(pair) == (0.15, 0.11)
        assert isinstance(pair, PreferencePair) and pair.gap == 0.04
        for some, why in ((right, "no wrong answer"), (wrong, "no right answer")):
            assert admitted(fusechat3(Answers(some)), [BOUNDS]) == Refusal(why)

    def test_right_is_chosen_though_wrong_scores_higher(self) -> None:
        answers = Answers([Candidate("M", 0, 0.1, True), Candidate("M", 1, 0.3, False)])
        pair = admitted(fusechat3(answers), [gap_between(None, None)])
        assert scores_of(pair) == (0.1, 0.3)

    def test_several_admissible_sources(self) -> None:
        """The highest chosen score wins, and of equal ones the first source."""
        scores = {"first": (0.1, 0.15), "second": (0.12, 0.16), "third": (0.13, 0.16)}
        pair = admitted(fusechat3(Answers(answered(scores))), [BOUNDS])
        assert isinstance(pair, PreferencePair) and pair.chosen[0].source == "second"

    def test_bounds_are_included(self) -> None:
        for low, high in ((0.10, 0.11), (0.10, 0.20)):  # 0.11 − 0.10 is 0.00999… in binary
            assert high - low != pytest.approx(0, abs=1e-9)
            assert isinstance(admitted(fusechat3(Answers(answered({"A": (low, high)}))), [BOUNDS]), PreferencePair)


class TestOtherRules:
    def test_wrpo(self) -> None:
        own = answered({"target": (0.11, 0.14, 0.09, 0.14, 0.09)}, own=True)
        (pair,) = wrpo(Answers(answered(SCORES), own))
        assert isinstance(pair, PreferencePair)
        assert [(one.source, one.index) for one in pair.chosen] == [("B", 2), ("target", 1)]
        assert [(one.source, one.index) for one in pair.rejected] == [("target", 2)]
        assert pair.gap == 0.05
        (none,) = wrpo(Answers(answered(SCORES), own[:1]))
        assert none == Refusal("the target's own answers: fewer than two answers")

    def test_sweet_spot(self) -> None:
        scores = [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0, 9.0, 10.0, -30.0]
        spot = statistics.fmean(scores) - 2 * statistics.pstdev(scores)
        assert spot == pytest.approx(-18.8, abs=0.1)  # between 1 and −30, nearer to −30
        assert scores_of(sweet_spot(Answers(answered({"A": scores})))[0]) == (10.0, -30.0)
        milder = sweet_spot(Answers(answered({"A": scores})), sigmas=0.5)[0]
        assert scores_of(milder) == (10.0, 1.0)  # μ − σ/2 is −2.9

    def test_simplemix(self) -> None:
        answers = Answers(answered({"A": (0.3, 0.1)}), answered({"target": (0.2, 0.05)}, own=True))
        assert scores_of(admitted(simplemix(answers, draw=0.49), [])) == (0.3, 0.1)
        assert scores_of(admitted(simplemix(answers, draw=0.5), [])) == (0.2, 0.05)
        alone = Answers(answers.sources, answers.target[:1])
        assert scores_of(admitted(simplemix(alone, draw=0.9), [])) == (0.3, 0.1)

    def test_rip(self) -> None:
        def pair(rejected: float, length: int, chosen: float) -> PreferencePair:
            return PreferencePair(
                (Candidate("A", 0, chosen),), (Candidate("A", 1, rejected, None, length),), chosen - rejected, ""
            )

        published = rip(rejected_score=0.126, rejected_length=1878, gap=0.042)
        assert published(pair(0.126, 1878, 0.15)) == ""
        assert "score below" in published(pair(0.125, 1878, 0.15))
        assert "shorter than 1878" in published(pair(0.126, 1877, 0.15))
        assert "gap above" in published(pair(0.126, 1878, 0.17))

    def test_win(self) -> None:
        pool = answered({"A": (0.0, 1.0, 5000.0)})
        assert [win(one, pool) for one in pool] == pytest.approx([0.7689414 / 3, 1.2310586 / 3, 2.5 / 3])
        assert win(pool[0], pool[:1]) == 0.5

    def test_same_text_is_no_pair(self) -> None:
        twins = [Candidate("A", index, score, digest=7) for index, score in enumerate((0.2, 0.1))]
        assert extremes(twins) == Refusal("chosen and rejected are the same text")


many_scores = st.lists(st.integers(-3, 3).map(float), max_size=6)
by_source = st.dictionaries(st.sampled_from("ABCD"), many_scores, max_size=4)
verdicts = st.lists(st.booleans(), min_size=24, max_size=24)


def naive_fusechat3(answers: Sequence[Candidate], least: float, most: float) -> tuple[Candidate, Candidate] | None:
    """All pairs of one source whose scores are its extremes, by brute force."""
    found = []
    for chosen in answers:
        for rejected in answers:
            own = [one for one in answers if one.source == chosen.source]
            right = [one for one in own if one.correct in (True, None)]
            wrong = [one for one in own if one.correct in (False, None)]
            if rejected.source != chosen.source or chosen not in right or rejected not in wrong:
                continue
            if any(
                one.score > chosen.score or (one.score == chosen.score and one.index < chosen.index) for one in right
            ):
                continue
            lower = [one for one in wrong if (one.score, one.index) < (rejected.score, rejected.index)]
            if lower or not least <= chosen.score - rejected.score <= most:
                continue
            if chosen.correct is None and chosen.score <= rejected.score:
                continue
            found.append((chosen, rejected))
    found.sort(key=lambda pair: -pair[0].score)
    return found[0] if found else None


@given(by_source, verdicts, st.booleans(), st.integers(-2, 3), st.integers(0, 6))
def test_fusechat3_by_brute_force(
    scores: dict[str, list[float]], correct: list[bool], verified: bool, least: int, most: int
) -> None:
    plain = answered(scores)
    answers = [
        Candidate(one.source, one.index, one.score, correct[number] if verified else None)
        for number, one in enumerate(plain)
    ]
    pair = admitted(fusechat3(Answers(answers)), [gap_between(least, most)])
    expected = naive_fusechat3(answers, least, most)
    assert (isinstance(pair, PreferencePair) and (pair.chosen[0], pair.rejected[0])) == (expected or False)


@given(by_source)
def test_rules_don_t_invent(scores: dict[str, list[float]]) -> None:
    """Whatever a rule offers is of the prompt's answers, and chosen over what scores less."""
    answers = Answers(answered(scores), answered({"target": scores.get("A", [])}, own=True))
    for offers in (
        fusechat3(answers),
        wrpo(answers),
        best_worst(answers),
        sweet_spot(answers),
        simplemix(answers, draw=0),
    ):
        for offer in offers:
            if isinstance(offer, PreferencePair):
                every = [*answers.sources, *answers.target]
                assert {*offer.chosen, *offer.rejected} <= set(every)
                assert offer.gap > 0 and offer.chosen[-1].score - offer.rejected[0].score == offer.gap


class TestSplit:
    @pytest.mark.parametrize(
        "prompts, sft",
        [(51_098, 20_439), (20_374, 8_149), (9_435, 3_774)],
        ids=["ultrafeedback", "magpie", "helpsteer2"],
    )
    def test_published_counts(self, prompts: int, sft: int) -> None:
        first = drawn([f"prompt {number}" for number in range(prompts)], 0.4, seed=0)
        assert len(first) == sft

    def test_a_third(self) -> None:
        assert len(drawn(list(map(str, range(60_000))), 0.33333333, seed=0)) == 20_000

    @given(st.lists(st.text(max_size=4), unique=True, max_size=30), st.randoms(), st.floats(0, 1), st.integers(0, 9))
    def test_order_doesn_t_matter(self, prompts: list[str], random: object, share: float, seed: int) -> None:
        shuffled = sorted(prompts, key=lambda _: random.random())  # type: ignore[attr-defined]
        assert drawn(prompts, share, seed) == drawn(shuffled, share, seed)

    def test_another_seed_draws_others(self) -> None:
        prompts = [str(number) for number in range(100)]
        assert drawn(prompts, 0.5, 0) != drawn(prompts, 0.5, 1)

    def test_a_larger_share_keeps_the_smaller_one(self) -> None:
        prompts = [str(number) for number in range(100)]
        assert drawn(prompts, 0.2, 0) < drawn(prompts, 0.6, 0)


grades = st.lists(st.integers(1, 6), max_size=4)


def pairing(**settings: object) -> Pairing:
    return Pairing.model_validate({"rule": "fusechat3", "score": "reward", "gap": (0.01, 0.1), **settings})


class TestAssignments:
    def test_instruction(self) -> None:
        """4:6 of the prompts that have a pair; the others are dropped before the split."""
        good, bad = Answers(answered(SCORES)), Answers(answered({"B": SCORES["B"]}))
        prompts = {f"good {number}": good for number in range(10)} | {f"bad {number}": bad for number in range(3)}
        assigned = assignments(pairing(), prompts, seed=0)
        kinds = [type(assignment) for assignment in assigned.values()]
        assert (kinds.count(SftExample), kinds.count(PreferencePair), kinds.count(Dropped)) == (4, 6, 3)
        assert all(isinstance(assigned[name], Dropped) for name in prompts if name.startswith("bad"))

    def test_maths_by_availability(self) -> None:
        right, wrong = Candidate("M", 0, 0.15, True), Candidate("M", 1, 0.12, False)
        prompts = {"both": Answers([right, wrong]), "right": Answers([right]), "wrong": Answers([wrong])}
        assigned = assignments(pairing(split="availability", correct="checked"), prompts, seed=0)
        assert isinstance(assigned["both"], PreferencePair)
        assert isinstance(assigned["right"], SftExample) and assigned["right"].answer == right
        assert assigned["wrong"] == Dropped("sft", Refusal("no right answer"))

    def test_wrpo_waits_for_the_target(self) -> None:
        strong = answered(SCORES)
        prompts = {f"prompt {number}": Answers(strong) for number in range(9)}
        rule = pairing(rule="wrpo", sft_share=0.33333333, gap=(None, None))
        before = assignments(rule, prompts, seed=3, answered=False)
        assert sum(isinstance(assignment, SftExample) for assignment in before.values()) == 3
        waiting = {prompt for prompt, assignment in before.items() if isinstance(assignment, Waiting)}
        own = answered({"target": (0.1, 0.2)}, own=True)
        after = assignments(rule, {prompt: Answers(strong, own) for prompt in prompts}, seed=3)
        assert {prompt for prompt, assignment in after.items() if isinstance(assignment, PreferencePair)} == waiting

    def test_as_is(self) -> None:
        prompts = {"one": Answers([Candidate("Q", 0, 0.0), Candidate("Q", 1, 1.0)]), "none": Answers()}
        assigned = assignments(pairing(rule="as_is", gap=(None, None)), prompts, seed=0)
        assert isinstance(assigned["one"], SftExample) and assigned["one"].answer.index == 0
        assert assigned["none"] == Dropped("sft", Refusal("no answer"))

    def test_gap_quantiles(self) -> None:
        """Bounds from the domain's own gaps: of 0.1, 0.2 … 1.0 the middle half."""
        prompts = {str(number): Answers(answered({"A": (0.0, number / 10)})) for number in range(1, 11)}
        rule = pairing(gap=(None, None), gap_quantiles=(0.25, 0.75), sft_share=0.0)
        assigned = assignments(rule, prompts, seed=0)
        kept = [prompt for prompt, assignment in assigned.items() if isinstance(assignment, PreferencePair)]
        assert kept == ["4", "5", "6", "7"]

    @given(st.lists(st.tuples(grades, grades), max_size=12))
    def test_dno_keeps_pairs_far_apart(self, each: list[tuple[list[int], list[int]]]) -> None:
        """Of grades to 6 the chosen one is 5 at least, and 2 above the rejected one, or 1 where it is the target's."""
        prompts = {
            str(number): Answers(answered({"gold": gold}), answered({"target": own}, own=True))
            for number, (gold, own) in enumerate(each)
        }
        filters = {"chosen_score": 5, "gap": (2, None), "gap_own": (1, None)}
        rule = pairing(rule="best_worst", answers="all", sft_share=0.0, **filters)
        assigned = assignments(rule, prompts, seed=0)
        for number, (gold, own) in enumerate(each):
            grades = [*gold, *own]
            best, is_own = max(grades, default=0), max(own, default=0) > max(gold, default=0)
            kept = best >= 5 and best - min(grades) >= (1 if is_own else 2)
            assert isinstance(assigned[str(number)], PreferencePair) == kept, (gold, own)

    def test_why_a_pair_is_not_kept(self) -> None:
        prompts = {"low": Answers(answered({"A": (4, 1)})), "near": Answers(answered({"A": (6, 5)}))}
        rule = pairing(rule="best_worst", chosen_score=5, gap=(2, None), sft_share=0.0)
        assigned = assignments(rule, prompts, seed=0)
        whys = [each.reason.why for each in assigned.values() if isinstance(each, Dropped)]
        assert whys == ["chosen score below 5", "gap below 2"]

    @given(st.lists(by_source, max_size=12), st.sampled_from(["share", "availability"]), st.integers(0, 5))
    def test_every_prompt_has_one_assignment(self, each: list[dict[str, list[float]]], split: str, share: int) -> None:
        prompts = {str(number): Answers(answered(scores)) for number, scores in enumerate(each)}
        rule = pairing(split=split, sft_share=share / 5, gap=(1, 4))
        assigned = assignments(rule, prompts, seed=1)
        assert assigned.keys() == prompts.keys()
        if split == "share" and 0 < share < 5:
            sft = sum(isinstance(assignment, SftExample) for assignment in assigned.values())
            pairs = sum(isinstance(assignment, PreferencePair) for assignment in assigned.values())
            assert sft == share * (sft + pairs) // 5


def test_an_answer_that_was_cut_is_rejected_at_most() -> None:
    """Whatever its score: it is never the best one, and no whole one is rejected for it."""
    cut = [Candidate("A", 0, 0.9, whole=False), Candidate("A", 3, 0.1, whole=False)]
    whole = [Candidate("A", 1, 0.5), Candidate("A", 2, 0.4)]
    for rule in (best_worst, fusechat3):
        (pair,) = rule(Answers([*cut, *whole]))
        assert scores_of(pair) == (0.5, 0.1)
    assert scores_of(sweet_spot(Answers([cut[0], *whole]), sigmas=0)[0]) == (0.5, 0.4)
    for rule in (best_worst, sweet_spot):
        assert rule(Answers([cut[0], whole[0]])) == [Refusal("no answer has a lower score")]
        assert rule(Answers(cut)) == [Refusal("no right answer that is whole")]
    right = [Candidate("A", 0, 0.9, correct=True, whole=False), Candidate("A", 1, 0.2, correct=True)]
    assert best(right) == right[1]
    assert extremes([*right, Candidate("A", 2, 0.1, correct=False)]) == extremes(
        [right[1], Candidate("A", 2, 0.1, correct=False)]
    )
